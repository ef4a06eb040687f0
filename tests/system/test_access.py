"""Who gets in: real servers with tokens and TLS, and what they may not say about them."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from certificates import Certificate, make_certificate
from tensorwire import AsyncClient, Client, ConnectionLost, Forbidden, Unauthenticated
from tensorwire_server.gateway.auth import add_credential

from .serving import RunningServer, assert_oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .serving import Command

pytestmark = pytest.mark.slow


class Keys:
    """A file with two tokens, and a certificate."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "auth.toml"
        self.admin = add_credential(self.file, "root", ["infer", "admin"])
        self.user = add_credential(self.file, "alice", ["infer"])
        self.tls: Certificate = make_certificate(folder)

    @property
    def auth_words(self) -> list[str]:
        return ["--auth-file", str(self.file)]

    @property
    def tls_words(self) -> list[str]:
        return ["--tls-cert", str(self.tls.cert), "--tls-key", str(self.tls.key)]

    def wrong(self) -> str:
        """Return a token with a key id that exists."""
        return self.user[:12] + self.admin[12:]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def plain(keys: Keys) -> Iterator[RunningServer]:
    """Asks for tokens, without TLS."""
    with RunningServer("oracle:", *keys.auth_words) as server:
        server.address = server.wait_ready()[1]
        yield server


@pytest.fixture(scope="module")
def secure(keys: Keys) -> Iterator[RunningServer]:
    """Asks for tokens, over TLS."""
    with RunningServer("oracle:", "echo:", *keys.auth_words, *keys.tls_words) as server:
        server.address = server.wait_ready()[1]
        yield server


# -- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.parametrize("with_auth", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_which_combinations_start(
    serve: Callable[..., RunningServer], keys: Keys, host: str, with_auth: bool, with_tls: bool
) -> None:
    words = ["oracle:", "--host", host]
    words += keys.auth_words if with_auth else []
    words += keys.tls_words if with_tls else []
    server = serve(*words)
    if host == "127.0.0.1" or with_auth:
        server.wait_ready()
        in_plain = host != "127.0.0.1" and not with_tls
        assert ("WARNING tensorwire_server.app listening_in_plain" in server.stderr) == in_plain
    else:
        assert server.wait() == 1
        assert "refusing to listen on 0.0.0.0" in server.stderr
        assert "`tensorwire token new --name NAME --file FILE`" in server.stderr
        assert "--auth-file FILE" in server.stderr


def test_an_open_file_or_half_a_tls_refuses_to_start(
    launch: Callable[..., Command], keys: Keys, tmp_path: Path
) -> None:
    opened = tmp_path / "open.toml"
    opened.write_bytes(keys.file.read_bytes())
    opened.chmod(0o644)
    for words, message in (
        (["--auth-file", str(opened)], "chmod 600"),
        (["--auth-file", str(tmp_path / "none")], "tensorwire token new"),
        (["--tls-cert", str(keys.tls.cert)], "tls.key is not"),
        (["--tls-cert", str(keys.tls.cert), "--tls-key", "/none"], "cannot be read"),
    ):
        command = launch("serve", "oracle:", "--port", "0", *words)
        assert command.wait() == 2
        assert message in command.stderr


def test_token_new_prints_a_token_that_works_and_keeps_only_hashes(tmp_path: Path) -> None:
    file = tmp_path / "made.toml"
    code = "import sys; from tensorwire_server.cli import token; token(sys.argv[1:])"

    def token_new(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, "new", *words],
            capture_output=True,
            text=True,
            timeout=30,
        )

    done = token_new("--name", "ci", "--rights", "infer,admin", "--file", str(file))
    assert done.returncode == 0, done.stderr
    token = done.stdout.strip()
    assert token not in file.read_text()
    refused = token_new("--name", "ci", "--rights", "root", "--file", str(file))
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "no right 'root'" in refused.stderr
    with RunningServer("oracle:", "--auth-file", str(file)) as server:
        stats = ask_sync(server.wait_ready()[1], "stats", token=token)
        assert stats["gateway"]["sessions"] == 1


# -- tokens --------------------------------------------------------------------------------------


def by_name(address: str) -> str:
    """Return an address that clients do not know as loopback, so that they log in by hmac."""
    return address.replace("127.0.0.1", "127.1")


def ask_async(address: str, op: str, **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient(address, **options) as client:
            return await getattr(client, op)()

    return asyncio.run(main())


def ask_sync(address: str, op: str, **options: Any) -> Any:
    with Client(address, **options) as client:
        return getattr(client, op)()


@pytest.mark.parametrize("ask", [ask_sync, ask_async])
@pytest.mark.parametrize("way", ["token", "hmac", "tls"])
def test_a_token_opens_what_it_is_for_and_nothing_else(
    plain: RunningServer, secure: RunningServer, keys: Keys, way: str, ask: Callable[..., Any]
) -> None:
    options: dict[str, Any] = {"timeout": 10.0}
    if way == "tls":
        address, options["ca"] = f"tensorwires://{secure.address}", keys.tls.cert
    else:
        address = plain.address if way == "token" else by_name(plain.address)
    assert ask(address, "health", token=keys.user, **options)["status"] == "ready"
    with pytest.raises(Forbidden, match="stats needs the right 'admin'"):
        ask(address, "stats", token=keys.user, **options)
    assert "gateway" in ask(address, "stats", token=keys.admin, **options)
    with pytest.raises(Unauthenticated, match="does not accept these credentials"):
        ask(address, "health", token=keys.wrong(), **options)
    with pytest.raises(Unauthenticated, match="asks for a token"):
        ask(address, "health", **options)


def test_the_environment_s_token_is_used(
    plain: RunningServer, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORWIRE_TOKEN", keys.user)
    assert ask_sync(plain.address, "health")["status"] == "ready"


def test_a_generation_after_a_login_by_hmac(plain: RunningServer, keys: Keys) -> None:
    with Client(by_name(plain.address), token=keys.user, timeout=10.0) as client:
        made = client.generate("oracle", "hi", max_new_tokens=8, seed=3)
        assert_oracle(made, "hi", 3, 8)


# -- TLS -----------------------------------------------------------------------------------------


def test_large_arrays_and_many_threads_over_one_tls_connection(
    secure: RunningServer, keys: Keys
) -> None:
    array = np.arange(200_000, dtype=np.float32)
    errors: list[BaseException] = []
    address = f"tensorwires://{secure.address}"
    with Client(address, token=keys.user, ca=keys.tls.cert, timeout=60.0) as client:

        def work(seed: int) -> None:
            try:
                for _ in range(5):
                    assert np.array_equal(
                        np.asarray(client.infer("echo", {"x": array})["x"]), array
                    )
                    made = client.generate("oracle", "hi", max_new_tokens=20, seed=seed)
                    assert_oracle(made, "hi", seed, 20)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert errors == []


@pytest.mark.parametrize("ask", [ask_sync, ask_async])
def test_a_certificate_that_nobody_vouches_for_is_refused(
    secure: RunningServer, keys: Keys, ask: Callable[..., Any]
) -> None:
    address = f"tensorwires://{secure.address}"
    with pytest.raises(ConnectionLost, match=r"certificate .* is not accepted: self-signed"):
        ask(address, "health", token=keys.user)
    with pytest.raises(ConnectionLost, match=r"certificate .* is not accepted: .*mismatch"):
        ask(address, "health", token=keys.user, ca=keys.tls.cert, server_name="example.org")


@pytest.mark.parametrize("ask", [ask_sync, ask_async])
def test_tls_against_a_plain_port_and_plain_against_tls_fail_in_a_sentence(
    plain: RunningServer, secure: RunningServer, keys: Keys, ask: Callable[..., Any]
) -> None:
    with pytest.raises(ConnectionLost, match=r"no TLS 1\.3 connection to"):
        ask(f"tensorwires://{plain.address}", "health", token=keys.user, timeout=10.0)
    with pytest.raises(ConnectionLost):
        ask(secure.address, "health", token=keys.user, timeout=10.0)
    assert ask(plain.address, "health", token=keys.user)["status"] == "ready"


# -- what is told --------------------------------------------------------------------------------


def test_no_secret_is_in_a_log_an_error_or_the_numbers(keys: Keys) -> None:
    secrets = [token[12:] for token in (keys.admin, keys.user)]
    secrets += [line.split('"')[1] for line in keys.file.read_text().splitlines()
                if line.startswith(("token_sha256", "hmac_key"))]  # fmt: skip
    said: list[str] = []
    with RunningServer("oracle:", *keys.auth_words) as server:
        address = server.wait_ready()[1]
        for place in (address, by_name(address)):
            for token in (keys.user, keys.admin, keys.wrong(), None):
                for op in ("health", "stats", "models"):
                    try:
                        said.append(repr(ask_sync(place, op, token=token)))
                    except (Forbidden, Unauthenticated) as error:
                        said += [repr(error), str(error.__dict__)]
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as stranger:
            stranger.sendall(keys.user.encode())
            said.append(stranger.recv(1000).decode())
        for pid in (server.pid, *server.children()):
            for kind in ("cmdline", "environ"):
                with open(f"/proc/{pid}/{kind}", "rb") as file:
                    said.append(file.read().decode(errors="replace"))
        server.terminate()
        said += [server.stderr, server.stdout]
    everything = "\n".join(said)
    assert "oracle" in everything
    for secret in secrets:
        assert secret not in everything
