"""TLS on the port: 1.3 only, and a handshake that fails leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest
from certificates import Certificate, make_certificate
from tensorwire_protocol.messages import Result
from tensorwire_server.config import ConfigError, ListenConfig, TlsConfig
from tensorwire_server.gateway.listener import Listener, bind
from tensorwire_server.gateway.tls import TlsError, load_tls

from .house import PATIENCE_S, Client, House, house
from .loops import pass_time
from .test_auth import TOKEN, knowing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from .conftest import Run


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def config_of(certificate: Certificate) -> TlsConfig:
    return TlsConfig(cert=str(certificate.cert), key=str(certificate.key))


@contextlib.asynccontextmanager
async def listening(opened: House, certificate: Certificate, **bounds: Any) -> AsyncIterator[int]:
    config = ListenConfig(port=0, **bounds)
    tls = load_tls(config_of(certificate))
    listener = Listener(opened.gateway, bind(config), config, tls)
    await listener.start()
    try:
        yield int(listener.address.rpartition(":")[2])
    finally:
        listener.close()


def trusting(certificate: Certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate.cert)


def test_a_client_is_served_over_tls_1_3(run: Run, certificate: Certificate) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened, certificate) as port:
            client = Client()
            loop = asyncio.get_running_loop()
            raw, _ = await loop.create_connection(
                lambda: client.transport, "127.0.0.1", port, ssl=trusting(certificate)
            )
            assert raw.get_extra_info("ssl_object").version() == "TLSv1.3"
            answer = await client.answered(client.ask("health", None))
            assert isinstance(answer, Result)
            assert len(opened.gateway.sessions) == 1
            client.transport.close()

    run(test)


def test_the_last_words_reach_a_client_over_tls(run: Run, certificate: Certificate) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened, certificate) as port:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=trusting(certificate)
            )
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert (await reader.read()).startswith(b"tensorwire: this port speaks")
            writer.close()

    run(test)


def test_tls_1_2_and_plain_bytes_are_refused_and_leave_no_session(
    run: Run, certificate: Certificate
) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened, certificate) as port:
            old = trusting(certificate)
            old.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                await asyncio.open_connection("127.0.0.1", port, ssl=old)
            plain = Client()
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: plain.transport, "127.0.0.1", port)
            await plain.until_lost()
            assert not opened.gateway.sessions

    run(test)


def test_over_tls_a_token_is_taken_from_anywhere(certificate: Certificate) -> None:
    from tensorwire_server.gateway.listener import is_private

    class FakeTransport(asyncio.BaseTransport):
        def __init__(self, **extra: object) -> None:
            super().__init__(extra)

    far = ("192.0.2.1", 5)
    tls = load_tls(config_of(certificate))
    assert is_private(FakeTransport(sslcontext=tls, peername=far))
    assert is_private(FakeTransport(peername=("127.0.0.1", 5)))
    assert is_private(FakeTransport(peername=("::1", 5, 0, 0)))
    assert is_private(FakeTransport(peername=""))  # a Unix socket
    assert not is_private(FakeTransport(peername=far))
    assert not is_private(FakeTransport(peername=None))  # gone already
    assert knowing().over(is_private=False).check_token(TOKEN) is not None


@pytest.mark.parametrize("given", ["cert", "key"])
def test_tls_needs_both_files(given: str) -> None:
    with pytest.raises(ConfigError, match=f"tls.{given} is set, tls.(cert|key) is not"):
        TlsConfig(**{given: "x.pem"})


def test_no_tls_without_files() -> None:
    assert load_tls(TlsConfig()) is None


def test_files_that_cannot_be_used_are_named(tmp_path: Path, certificate: Certificate) -> None:
    with pytest.raises(TlsError, match="cannot be read: No such file"):
        load_tls(TlsConfig(cert=str(tmp_path / "none.pem"), key=str(certificate.key)))
    other = make_certificate(tmp_path)
    with pytest.raises(TlsError, match="no PEM certificate and its unencrypted key"):
        load_tls(TlsConfig(cert=str(certificate.cert), key=str(other.key)))


async def silent(port: int) -> socket.socket:
    """Return a connection to a TLS port that says nothing."""
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return sock


async def is_cut(sock: socket.socket) -> bool:
    """Wait for the end of a connection."""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.get_running_loop().sock_recv(sock, 1) == b""
    return True


def is_open(sock: socket.socket) -> bool:
    try:
        sock.recv(1)
    except BlockingIOError:
        return True
    return False


async def greeted(port: int, certificate: Certificate) -> Client:
    """Return a client that was greeted over TLS."""
    client = Client()
    loop = asyncio.get_running_loop()
    await loop.create_connection(
        lambda: client.transport, "127.0.0.1", port, ssl=trusting(certificate)
    )
    await client.until(lambda c: c.messages)
    return client


def test_who_never_shakes_hands_has_no_session_and_makes_room_for_others(
    run: Run, certificate: Certificate
) -> None:
    async def test() -> None:
        async with (
            house() as opened,
            listening(opened, certificate, max_unauthenticated=3) as port,
        ):
            silents = [await silent(port) for _ in range(4)]
            assert await is_cut(silents[0])
            assert [is_open(sock) for sock in silents[1:]] == [True] * 3
            client = await greeted(port, certificate)
            assert await is_cut(silents[1])
            assert [is_open(sock) for sock in silents[2:]] == [True] * 2
            assert len(opened.gateway.sessions) == 1
            client.transport.close()
            for sock in silents:
                sock.close()

    run(test)


def test_handshakes_count_among_the_connections_of_their_source(
    run: Run, certificate: Certificate
) -> None:
    async def test() -> None:
        async with (
            house() as opened,
            listening(opened, certificate, max_connections_per_source=2) as port,
        ):
            first, second, third = [await silent(port) for _ in range(3)]
            assert await is_cut(third)
            first.close()
            second.close()
            client = None
            async with asyncio.timeout(PATIENCE_S):
                while client is None:  # until the server has noticed
                    with contextlib.suppress(ConnectionError):
                        client = await greeted(port, certificate)
            client.transport.close()

    run(test)


@pytest.mark.parametrize("shakes_hands", [False, True])
def test_a_greeting_over_tls_has_no_more_time_than_another(
    run_fast: Run, certificate: Certificate, shakes_hands: bool
) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened, certificate) as port:
            sock = await silent(port)
            await pass_time(4.0)
            assert is_open(sock)
            if shakes_hands:
                _, writer = await asyncio.open_connection(
                    sock=sock, ssl=trusting(certificate), server_hostname="localhost"
                )
                await pass_time(0.5)
                (session,) = opened.gateway.sessions
                assert not session.transport.connection.is_closed
                await pass_time(2.0)  # 5 s after it came the time is over, and not 5 s after this
                assert session.transport.connection.is_closed
                writer.close()
            else:
                await pass_time(2.0)
                assert not is_open(sock)
                sock.close()

    run_fast(test)
