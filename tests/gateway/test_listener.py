"""The port: where it may be, and who may come in."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest
from tensorwire_protocol.connection import NOT_OURS, Connection
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.frames import HEADER
from tensorwire_protocol.messages import Kind
from tensorwire_protocol.roles import Role
from tensorwire_server.config import AdmissionConfig, ListenConfig
from tensorwire_server.gateway.listener import Listener, ListenError, bind, is_loopback

from .house import Client, House, house
from .loops import pass_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tensorwire_protocol.login import Login

    from .conftest import Run

ANY_PORT = ListenConfig(port=0)


@contextlib.asynccontextmanager
async def listening(opened: House, **bounds: Any) -> AsyncIterator[Listener]:
    config = ListenConfig(port=0, **bounds)
    listener = Listener(opened.gateway, bind(config), config)
    await listener.start()
    try:
        yield listener
    finally:
        listener.close()


async def connect(listener: Listener, login: Login | None = None) -> Client:
    client = Client(login=login)
    host, _, port = listener.address.rpartition(":")
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: client.transport, host.strip("[]"), int(port))
    return client


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_addresses_of_this_machine_alone_are_known_as_such(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "192.168.1.1", "::", "8.8.8.8", "example.org", "", "127.0.0.1.example.org"]
)
def test_an_address_that_others_reach_is_refused_with_advice(host: str) -> None:
    assert not is_loopback(host)
    advice = r"refusing to listen on .*`tensorwire token new .*--auth-file"
    with pytest.raises(ListenError, match=advice):
        bind(ListenConfig(host=host, port=0))


def test_with_authentication_any_address_may_be_listened_on() -> None:
    with bind(ListenConfig(host="0.0.0.0", port=0), has_auth=True) as sock:
        assert sock.getsockname()[0] == "0.0.0.0"


def test_a_port_that_is_taken_is_named() -> None:
    with bind(ANY_PORT) as first:
        port = first.getsockname()[1]
        with pytest.raises(ListenError, match=rf"port {port} on 127.0.0.1 is taken; .* --port"):
            bind(ListenConfig(port=port))


def test_a_port_is_free_again_after_a_server_s_end() -> None:
    with bind(ANY_PORT) as first:
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            accepted, _ = first.accept()
            accepted.close()
    bind(ListenConfig(port=port)).close()


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(ListenError, match="cannot listen on"):
        bind(ListenConfig(host="::1%nothing", port=0))


def test_clients_are_served_on_the_address_that_the_listener_tells(run: Run) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened) as listener:
            assert listener.address.startswith("127.0.0.1:")
            client = await connect(listener)
            answer = await client.answered(client.ask("models", None))
            assert answer.extra == {"models": []}
            assert len(opened.gateway.sessions) == 1
            client.transport.close()

    run(test)


def test_one_connection_above_the_limit_is_told_that_the_server_is_busy(run: Run) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened, max_connections=2) as listener:
            clients = [await connect(listener) for _ in range(2)]
            for client in clients:
                await client.answered(client.ask("health", None))
            error = await (await connect(listener)).until_lost()
            assert error is not None
            assert error.code is ErrorCode.BUSY
            assert error.retryable
            assert "2 connections" in error.message
            for client in clients:
                await client.answered(client.ask("health", None))

    run(test)


def test_a_connection_that_has_ended_makes_room_for_another(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened, max_connections=1) as listener:
            for _ in range(3):
                client = await connect(listener)
                await client.answered(client.ask("health", None))
                client.transport.close()
                await pass_time()

    run_fast(test)


def test_strangers_that_stay_make_room_for_whoever_logs_in(run: Run) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened, max_unauthenticated=2) as listener:
            host, _, port = listener.address.rpartition(":")
            strangers = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
            for _ in range(3):
                client = await connect(listener)
                await client.answered(client.ask("health", None))
                client.transport.close()
            async with asyncio.timeout(5):
                assert b"newer connections have not logged in" in await strangers[0][0].read()
            for _, writer in strangers:
                writer.close()

    run(test)


def test_a_source_with_too_many_connections_is_refused(run: Run) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened, max_connections_per_source=1) as listener:
            client = await connect(listener)
            error = await (await connect(listener)).until_lost()
            assert error is not None
            assert error.code is ErrorCode.BUSY
            assert "1 connections from one address" in error.message
            await client.answered(client.ask("health", None))

    run(test)


def test_unfinished_frames_of_all_connections_have_one_bound(run: Run) -> None:
    half = HEADER.pack(2**20, Kind.REQ, 0, 0, 1, 2**20) + bytes(600 * 1024)
    hello = b"".join(Connection(Role.CLIENT).take_output())

    async def test() -> None:
        # A quarter of 16 MiB; each of the ten takes at least what it sends.
        config = AdmissionConfig(memory_bytes=16 * 1024 * 1024)
        async with house(config) as opened, listening(opened) as listener:
            client = await connect(listener)
            host, _, port = listener.address.rpartition(":")
            greedy = [await asyncio.open_connection(host, int(port)) for _ in range(10)]
            for _, writer in greedy:
                writer.write(hello + half)
            async with asyncio.timeout(5):
                said = [asyncio.ensure_future(reader.read()) for reader, _ in greedy]
                await asyncio.wait(said, return_when=asyncio.FIRST_COMPLETED)
            told = [task.result() for task in said if task.done()]
            assert all(b"memory for what it receives is full" in words for words in told)
            assert opened.gateway.receive_memory.num_bytes <= 4 * 1024 * 1024
            await client.answered(client.ask("health", None))
            for task in said:
                task.cancel()
            for _, writer in greedy:
                writer.close()

    run(test)


def test_something_that_speaks_another_protocol_is_told_what_this_port_is(run: Run) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened) as listener:
            host, _, port = listener.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(5):
                assert await reader.read() == NOT_OURS
            writer.close()

    run(test)


def test_a_closed_listener_leaves_open_connections_alone(run: Run) -> None:
    async def test() -> None:
        async with house() as opened, listening(opened) as listener:
            client = await connect(listener)
            await client.answered(client.ask("health", None))
            address = listener.address
            listener.close()
            host, _, port = address.rpartition(":")
            with pytest.raises(OSError, match=r"."):
                await asyncio.open_connection(host, int(port))
            await client.answered(client.ask("health", None))

    run(test)
