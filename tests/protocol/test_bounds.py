"""Every limit, one below it, at it, and one above; a limit without a case fails the first test."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from gateway.test_bounds import test_a_client_that_reads_nothing_is_stuck_after_ten_seconds
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.frames import PREFACE, build_frame
from tensorwire_protocol.limits import CLIENT_LINK, Limits
from tensorwire_protocol.messages import Cancel, Failure, Hello, Kind, Ping, Result
from tensorwire_protocol.roles import Role
from tensorwire_protocol.transports.aio import AioTransport
from vectors.making.limits import BOUNDS

from .samples import cut, request, wire
from .test_connection import open_end, output
from .test_login import (
    server_with,
    test_a_peer_without_a_login_has_four_frames,
    test_a_peer_without_a_login_has_four_kib_in_all,
)
from .test_transfers import test_a_body_is_refused_on_its_announced_size
from .transports.driving import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_protocol.connection import Connection

MS = 0.001
# Golden frames at each of these are in vectors/making/limits.py, which both clients run.
IN_VECTORS = {name for _, _, limits, _, _ in BOUNDS for name in limits} | {"segments"}
IN_OTHER_TESTS = {
    "message_bytes": test_a_body_is_refused_on_its_announced_size,
    "preauth_bytes": test_a_peer_without_a_login_has_four_kib_in_all,
    "preauth_frames": test_a_peer_without_a_login_has_four_frames,
    "send_stuck_s": test_a_client_that_reads_nothing_is_stuck_after_ten_seconds,
}


def server(**limits: Any) -> Connection:
    return open_end(Role.SERVER, Limits(**limits))


def refusals(connection: Connection) -> list[ErrorCode]:
    """Return the errors that the connection has sent."""
    return [ErrorCode(frame.aux) for frame in cut(output(connection)) if frame.kind == Kind.ERR]


def _request_with(**fields: Any) -> bytes:
    """Return a REQ from a sender that knows no bounds."""
    meta = ["infer", bytes(16), "m", fields.get("inputs", {}), fields.get("params", {})]
    packed: bytes = msgpack.packb(meta)
    return build_frame(Kind.REQ, 1, packed)


# Each takes how far from the limit to go, and returns if that was accepted.


def preauth_out_bytes(more: int) -> bool:
    answers = server_with(limits=Limits(preauth_frames=9))
    answers.feed(PREFACE + wire(Hello()))
    output(answers)  # WELCOME does not count
    answers.feed(wire(request(1)))
    one = len(output(answers))
    limits = Limits(preauth_frames=9, preauth_out_bytes=3 * one - more)
    again = server_with(limits=limits)
    again.feed(PREFACE + wire(Hello()) + b"".join(wire(request(i)) for i in (1, 2, 3)))
    return not again.is_closed


def meta_depth(more: int) -> bool:
    value: Any = 1
    for _ in range(5 + more - 2):  # the meta's own array and `params` are two
        value = [value]
    peer = server(meta_depth=5)
    peer.feed(_request_with(params={"x": value}))
    return refusals(peer) != [ErrorCode.BAD_META]


def tensor_dims(more: int) -> bool:
    descriptor = msgpack.packb(["U8", [1] * (4 + more), b"x"])
    peer = server(tensor_dims=4)
    peer.feed(_request_with(inputs={"x": msgpack.ExtType(1, descriptor)}))
    return refusals(peer) != [ErrorCode.BAD_TENSOR]


def streams(more: int) -> bool:
    peer = server(streams=3)
    peer.feed(b"".join(wire(request(i)) for i in range(1, 3 + more + 1)))
    return refusals(peer) != [ErrorCode.BUSY]


def handshake_s(more: int) -> bool:
    stranger = server_with(limits=Limits(handshake_s=2.0))
    stranger.on_timer(100.0)
    stranger.on_timer(102.0 - MS + more * MS)  # at the limit it is over
    return not stranger.is_closed


def ping_after_s(more: int) -> bool:
    peer = server(ping_after_s=2.0)
    peer.feed(wire(request(1)), 100.0)
    peer.on_timer(102.0 - MS + more * MS)
    return output(peer) == b""


def dead_after_s(more: int) -> bool:
    peer = server(dead_after_s=3.0)
    peer.feed(wire(request(1)), 100.0)
    peer.on_timer(103.0 - MS + more * MS)
    return not peer.is_closed


def ping_burst(more: int) -> bool:
    peer = server(ping_burst=3)
    peer.feed(wire(Ping()) * (3 + more), 100.0)
    return not peer.is_closed


def ping_interval_s(more: int) -> bool:
    peer = server(ping_burst=1, ping_interval_s=2.0)
    peer.feed(wire(Ping()), 100.0)
    peer.feed(wire(Ping()), 102.0 - more * MS)
    return not peer.is_closed


def fault_burst(more: int) -> bool:
    peer = server(fault_burst=3)
    peer.feed(b"".join(wire(Cancel(stream=i)) for i in range(3 + more)), 100.0)
    return not peer.is_closed


def faults_per_s(more: int) -> bool:
    peer = server(fault_burst=4, faults_per_s=4.0)
    peer.feed(wire(Cancel(stream=1)) * 4, 100.0)
    peer.feed(wire(Cancel(stream=1)) * (4 + more), 101.0)
    return not peer.is_closed


def frame_grace_s(more: int) -> bool:
    peer = server(frame_grace_s=2.0, frame_bytes_per_s=2**40)
    peer.feed(wire(request(1))[:-1], 100.0)
    peer.on_timer(102.0 + more * MS)
    return not peer.is_closed


def frame_bytes_per_s(more: int) -> bool:
    peer = server(frame_grace_s=0.0, frame_bytes_per_s=16)
    peer.feed(wire(request(1))[:4], 100.0)  # a header is 16 bytes
    peer.on_timer(101.0 + more * MS)
    return not peer.is_closed


async def _transport(limits: Limits, unsent_bytes: int) -> AioTransport:
    """Return a transport with so many bytes that its peer does not take."""
    ours, theirs = socket.socketpair()
    connection = open_end(Role.SERVER, limits)
    loop = asyncio.get_running_loop()
    connection.feed(wire(request(1)), loop.time())
    _, transport = await loop.create_connection(
        lambda: AioTransport(connection, Recorder()), sock=ours
    )
    raw = transport._transport
    assert raw is not None
    raw.write(bytes(unsent_bytes))
    raw.write(bytes(unsent_bytes - raw.get_write_buffer_size()))  # what the kernel took
    assert transport.unsent_bytes == unsent_bytes
    loop.call_soon(theirs.close)
    return transport


def send_high_water_bytes(more: int) -> bool:
    limit = 1024 * 1024

    async def test() -> bool:
        transport = await _transport(Limits(send_high_water_bytes=limit), limit + more)
        return not transport.is_paused

    return asyncio.run(test())


def send_pause_bytes(more: int) -> bool:
    limit = 1024 * 1024

    async def test() -> bool:
        answer = wire(Result(stream=1))
        transport = await _transport(Limits(send_pause_bytes=limit), limit - len(answer) + more)
        transport.send(Result(stream=1))
        transport.flush()
        assert transport._transport is not None
        return transport._transport.is_reading()

    return asyncio.run(test())


def send_hard_bytes(more: int) -> bool:
    limit = 1024 * 1024

    async def test() -> bool:
        answer = wire(Result(stream=1))
        transport = await _transport(Limits(send_hard_bytes=limit), limit - len(answer) + more)
        transport.send(Result(stream=1))
        transport.flush()
        return not transport.connection.is_closed

    return asyncio.run(test())


CASES: dict[str, Callable[[int], bool]] = {
    case.__name__: case
    for case in (
        preauth_out_bytes, meta_depth, tensor_dims, streams, handshake_s, ping_after_s,
        dead_after_s, ping_burst, ping_interval_s, fault_burst, faults_per_s, frame_grace_s,
        frame_bytes_per_s, send_high_water_bytes, send_pause_bytes,
        send_hard_bytes,
    )
}  # fmt: skip


def test_every_limit_has_a_case() -> None:
    cases = [*CASES, *IN_VECTORS, *IN_OTHER_TESTS]
    assert sorted(cases) == sorted(f.name for f in fields(Limits))


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("limit", CASES)
def test_a_limit_is_kept_exactly(limit: str, more: int) -> None:
    assert CASES[limit](more) == (more <= 0)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_what_the_server_refuses_counts_as_what_the_peer_does(more: int) -> None:
    peer = open_end(Role.SERVER, replace(CLIENT_LINK, fault_burst=3))
    peer.feed(b"".join(wire(request(i)) for i in range(1, 10)))
    for stream in range(1, 3 + more + 1):
        peer.send(Failure(stream=stream, code=int(ErrorCode.FORBIDDEN), message=""))
    assert peer.is_closed == (more > 0)
