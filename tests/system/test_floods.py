"""Peers that mean harm and know the grammar: each is cut in time, and nobody else is hurt."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

import msgpack
import pytest
from tensorwire import Client
from tensorwire_protocol.codec import encode
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.frames import build_frame
from tensorwire_protocol.limits import CLIENT_LINK
from tensorwire_protocol.messages import Cancel, Goaway, Kind, Message, Ping, Pong, Request
from tensorwire_server.gateway.auth import add_credential

from .serving import RunningServer, wait_until
from .strangers import (
    MIB,
    Innocent,
    assert_costs_no_memory,
    connect,
    frames_of,
    gateway_rss,
    greeting,
    header,
    read_to_end,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tensorwire_protocol.frames import Frame

pytestmark = pytest.mark.slow


def _wire(*messages: Message) -> bytes:
    return b"".join(part for message in messages for part in encode(message, CLIENT_LINK))


def _generate(stream: int) -> Request:
    return Request(
        stream=stream,
        op="generate",
        key=os.urandom(16),
        model="oracle",
        inputs={"prompt": "x"},
        params={"max_new_tokens": 3000},
    )


def _flood(sock: socket.socket, data: bytes) -> list[tuple[int, int, int]]:
    """Send until the server has had enough; return kind, code and stream of all its frames."""
    with contextlib.suppress(ConnectionError):
        sock.sendall(data)
    return [(frame.kind, frame.aux, frame.stream) for frame in frames_of(read_to_end(sock))]


def _read_answers(sock: socket.socket, num_errors: int) -> list[Frame]:
    """Return what comes until a PING and so many requests are answered, or the server closes.

    In any order: what only a worker opens, it refuses behind the PONG.
    """
    heard = b""
    frames: list[Frame] = []
    while part := sock.recv(65536):
        heard += part
        frames = frames_of(heard, whole=False)
        kinds = [frame.kind for frame in frames]
        if Kind.PONG in kinds and kinds.count(Kind.ERR) == num_errors:
            break
    return frames


FLOODS: dict[str, Callable[[], bytes]] = {
    "resets": lambda: b"".join(
        _wire(_generate(i), Cancel(stream=i), Cancel(stream=i)) for i in range(1, 500)
    ),
    "cancels-of-nothing": lambda: _wire(*[Cancel(stream=7)] * 500),
    "requests-that-fail": lambda: b"".join(
        build_frame(Kind.REQ, i, b"\xc1") for i in range(1, 500)
    ),
    "requests-above-the-limit": lambda: b"".join(_wire(_generate(i)) for i in range(1, 900)),
    "pings": lambda: _wire(*[Ping()] * 500),
    "pongs": lambda: _wire(*[Pong()] * 500),
    "farewells": lambda: _wire(*[Goaway()] * 500),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_is_cut_with_a_farewell_and_an_error(
    server: RunningServer, innocent: Innocent, name: str
) -> None:
    with connect(server) as sock:
        *_, goaway, flood = _flood(sock, greeting() + FLOODS[name]())
    assert goaway[:2] == (Kind.GOAWAY, ErrorCode.FLOOD)
    assert flood == (Kind.ERR, ErrorCode.FLOOD, 0)
    innocent.see_another()


def test_a_flood_of_floods_does_not_grow_the_gateway(
    server: RunningServer, innocent: Innocent
) -> None:
    def attack() -> None:
        for flood in floods:
            with connect(server) as sock:
                _flood(sock, greeting() + flood)
        wait_until(lambda: server.stats()["gateway"]["sessions"] == 2, "all are cut")

    floods = [make() for make in FLOODS.values()] * 4
    assert_costs_no_memory(server, attack)


def _tensor(descriptor: list[object]) -> bytes:
    """Return the meta of a REQ with a tensor that says this of itself."""
    value = msgpack.ExtType(1, msgpack.packb(descriptor))
    packed: bytes = msgpack.packb(["infer", os.urandom(16), "echo", {"x": value}])
    return packed


BOMBS = {
    "a million elements": b"\xdd\x00\x0f\x42\x40",
    "four thousand million elements": b"\xdd\xff\xff\xff\xff",
    "four thousand million pairs": b"\xdf\xff\xff\xff\xff",
    "four gibibytes of text": b"\xdb\xff\xff\xff\xff",
    "four gibibytes of bytes": b"\xc6\xff\xff\xff\xff",
    "four gibibytes of a tensor": b"\xc9\xff\xff\xff\xff\x01",
    "maps, as many as fit": b"\xdc\x3f\xf0" + b"\x80" * 0x3FF0,
    "lists in lists": b"\x91" * 16_000 + b"\xc0",
    "maps in maps": b"\x81\xa1k" * 5_000 + b"\xc0",
    "a huge tensor": _tensor(["F64", [2**40], 0]),
    "a tensor whose size wraps": _tensor(["F64", [2**32, 2**32], b""]),
}
SEGMENTS = {
    "65,535 segments": header(65535 * 8 + 1, Kind.REQ, aux=65535, stream=1, meta=1)
    + bytes(65535 * 8)
    + b"\xc0",
    "a segment of 16 EiB": header(9, Kind.REQ, aux=1, stream=1, meta=1)
    + struct.pack("<Q", 2**64 - 1)
    + b"\xc0",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_msgpack_bomb_fails_alone_and_takes_no_memory(
    server: RunningServer, innocent: Innocent, bomb: bytes
) -> None:
    with connect(server) as sock:
        sock.sendall(greeting() + build_frame(Kind.REQ, 1, bomb))
        before = gateway_rss(server)
        sock.sendall(b"".join(build_frame(Kind.REQ, i, bomb) for i in range(2, 150)))
        sock.sendall(_wire(Ping(payload=b"survived")))
        heard = _read_answers(sock, 149)
    errors = [frame.aux for frame in heard if frame.kind == Kind.ERR and frame.stream]
    assert len(errors) == 149
    assert set(errors) <= {ErrorCode.BAD_META, ErrorCode.BAD_TENSOR}
    assert gateway_rss(server) - before < 4 * MIB


@pytest.mark.parametrize("bomb", SEGMENTS.values(), ids=SEGMENTS)
def test_a_header_bomb_is_refused_and_takes_no_memory(
    server: RunningServer, innocent: Innocent, bomb: bytes
) -> None:
    before = gateway_rss(server)
    for _ in range(20):
        with connect(server) as sock:
            sock.sendall(greeting() + bomb + _wire(Ping(payload=b"survived")))
            answers = _read_answers(sock, 1)
            (code,) = [frame.aux for frame in answers if frame.kind == Kind.ERR]
            assert code in (ErrorCode.BAD_TENSOR, ErrorCode.FRAMING)
    assert gateway_rss(server) - before < 4 * MIB


def test_frames_that_trickle_are_cut_on_all_sockets_at_once(
    server: RunningServer, innocent: Innocent
) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(server)) for _ in range(100)]
        for sock in socks:
            sock.sendall(greeting())
            assert sock.recv(4096)[4] == Kind.WELCOME
            sock.setblocking(False)
        frame = _wire(_generate(1))
        heard = dict.fromkeys(socks, b"")
        began = time.monotonic()
        for byte in frame:  # one each second: it would take two minutes
            for sock in [s for s in socks if not heard[s]]:
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    sock.sendall(bytes([byte]))
                    heard[sock] = sock.recv(4096)
            if all(heard.values()):
                break
            time.sleep(1)
        assert all(heard.values())
        assert time.monotonic() - began > 9
        for said in heard.values():
            goaway, error = frames_of(said)
            assert (goaway.kind, error.kind) == (Kind.GOAWAY, Kind.ERR)
            assert error.aux == ErrorCode.FLOOD
    innocent.see_another()


@pytest.fixture
def guarded(serve: Callable[..., RunningServer], tmp_path: Path) -> tuple[RunningServer, str]:
    """A server that asks for a login, and a token for it."""
    file = tmp_path / "auth.toml"
    token = add_credential(file, "root", ["infer", "admin"])
    return serve("echo:", "--auth-file", str(file)).ready(), token


def test_strangers_that_never_read_keep_nobody_out_and_take_no_memory(
    guarded: tuple[RunningServer, str],
) -> None:
    server, token = guarded
    flood = greeting() + b"".join(_wire(_generate(i)) for i in range(1, 20))

    def rush() -> None:
        """Come as strangers that ask and do not read; an honest client gets in among them."""
        with contextlib.ExitStack() as stack:
            for i in range(700):
                sock = stack.enter_context(connect(server))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                with contextlib.suppress(ConnectionError):
                    sock.sendall(flood if i % 2 else b"")
                if i % 100 == 99:
                    with Client(server.address, token=token) as client:
                        client.infer("echo", {"x": [1.0]})

    with Client(server.address, token=token) as watcher:
        rush()
        before = watcher.stats()["gateway"]["rss_bytes"]
        for _ in range(2):
            rush()
        wait_until(lambda: watcher.stats()["gateway"]["sessions"] == 1, "all are gone")
        assert watcher.stats()["gateway"]["rss_bytes"] - before < 8 * MIB
