"""Large messages between two ends of a connection: in place, within bounds, and stopped halfway."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorwire_protocol.bodies import (
    BODY_BYTES,
    FEATURE_BODY,
    WINDOW_BYTES,
    FreshMemory,
    Reservation,
)
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.errors import Busy, ErrorCode, Executed, TooLarge
from tensorwire_protocol.frames import PREFACE, Flag, build_body, build_segmented_frame
from tensorwire_protocol.limits import CLIENT_LINK, Limits
from tensorwire_protocol.messages import (
    Cancel,
    Credit,
    Data,
    Failure,
    Hello,
    Kind,
    Message,
    Ping,
    Pong,
    Request,
    Result,
    Submit,
    Welcome,
)
from tensorwire_protocol.roles import Role
from tensorwire_protocol.tensors import aligned_buffer

from .samples import KEY, cut, plain, request, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MIB = 1024 * 1024
BODY = (FEATURE_BODY,)


class Waiting:
    """Memory that is not there yet."""

    def __init__(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> None:
        self.segments: list[memoryview] | None = None
        self.is_cancelled = False
        self.lengths, self._on_ready = lengths, on_ready

    def cancel(self) -> None:
        self.is_cancelled = True

    def come(self) -> None:
        self.segments = [aligned_buffer(length) for length in self.lengths]
        self._on_ready()


class FakeMemory:
    """Memory that comes when the test says so, or never."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.waiting: list[Waiting] = []
        self.refusal = refusal

    def reserve(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> Reservation:
        if self.refusal is not None:
            raise self.refusal
        self.waiting.append(Waiting(lengths, on_ready))
        return self.waiting[-1]


def ends(
    up: Role = Role.CLIENT, down: Role = Role.SERVER, *, limits: Limits | None = None, **named: Any
) -> tuple[Connection, Connection]:
    """Return two ends that have greeted each other."""
    opener = Connection(up, features=BODY)
    answerer = Connection(down, features=BODY, limits=limits, **named)
    exchange(opener, answerer)
    return opener, answerer


def exchange(one: Connection, two: Connection) -> tuple[list[Message], list[Message]]:
    """Move bytes until nobody has anything to say; return what each heard."""
    heard: tuple[list[Message], list[Message]] = ([], [])
    while True:
        moved = False
        for sender, receiver, messages in ((one, two, heard[1]), (two, one, heard[0])):
            data = b"".join(sender.take_output())
            messages += receiver.feed(data)
            moved = moved or bool(data)
        if not moved:
            return heard


def large(stream: int = 1, **changes: Any) -> Request:
    arrays = {"x": np.arange(3 * MIB // 8, dtype=np.int64), "y": np.arange(1000.0)}
    return request(stream, op="infer", inputs=arrays, **changes)


def head_of(message: Request | Result, *segments: Any) -> bytes:
    """Return the head of a body with these segments, and no tensor in its meta."""
    (frame,) = cut(wire(message))
    views = [memoryview(bytes(n) if isinstance(n, int) else n) for n in segments]
    return build_body(build_segmented_frame(frame.kind, frame.stream, bytes(frame.meta), views))[0]


def data(stream: int, payload: bytes, *, segment: int = 0, last: bool = False) -> bytes:
    return wire(Data(stream=stream, segment=segment, payload=payload, last=last))


def num_incoming(connection: Connection) -> int:
    assert connection._transfers is not None
    return connection._transfers.num_incoming


def failure_of(messages: list[Message]) -> Failure:
    (failure,) = messages
    assert isinstance(failure, Failure)
    return failure


# -- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("up", "down"), [(Role.CLIENT, Role.SERVER), (Role.DISPATCHER, Role.WORKER)]
)
def test_a_large_message_arrives_whole_both_ways(up: Role, down: Role) -> None:
    one, two = ends(up, down)
    asked = large()
    if up is Role.DISPATCHER:
        asked_there: Message = Submit(
            stream=1, op="infer", key=KEY, attempt=1, inputs=asked.inputs, so_far=[]
        )
    else:
        asked_there = asked
    one.send(asked_there)
    _, (got,) = exchange(one, two)
    assert plain(got) == plain(asked_there)
    answer = Result(stream=1, outputs=asked.inputs)
    two.send(answer)
    (came,), _ = exchange(one, two)
    assert plain(came) == plain(answer)
    assert (one.num_streams, two.num_streams) == (0, 0)


def test_arrays_lie_aligned_where_their_bytes_arrived() -> None:
    placed: list[memoryview] = []

    class Memory(FreshMemory):
        def reserve(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> Reservation:
            reservation = super().reserve(lengths, on_ready)
            placed.extend(reservation.segments or ())
            return reservation

    client, server = ends(bodies=Memory())
    client.send(large())
    _, (got,) = exchange(client, server)
    assert isinstance(got, Request)
    for array, place in zip(got.inputs.values(), placed, strict=True):
        assert np.shares_memory(array, np.frombuffer(place, np.uint8))
        assert array.ctypes.data % 64 == 0


def test_all_but_the_first_read_lands_in_place() -> None:
    client, server = ends()
    client.send(large())
    stream = memoryview(b"".join(client.take_output()))
    assert len(stream) > WINDOW_BYTES
    in_place = 0
    while len(stream):
        buffer = server.get_buffer()
        part = min(len(buffer), len(stream))
        if len(buffer) > 16 and len(buffer) != 256 * 1024:
            in_place += part
        buffer[:part] = stream[:part]
        server.received(part, 0.0)
        stream = stream[part:]
    # What came in one read with the head was copied: at most a scratch buffer of it.
    assert in_place >= WINDOW_BYTES - 256 * 1024


@pytest.mark.parametrize("size", [BODY_BYTES - 4096, BODY_BYTES + 4096])
def test_only_what_is_large_is_a_body(size: int) -> None:
    client, _ = ends()
    client.send(request(1, op="infer", inputs={"x": np.zeros(size, np.uint8)}))
    head = b"".join(client.take_output())[:16]
    assert bool(head[5] & Flag.BODY) == (size > BODY_BYTES)


def test_without_the_feature_a_large_message_is_refused_at_the_sender() -> None:
    client, server = Connection(Role.CLIENT, features=BODY), Connection(Role.SERVER)
    exchange(client, server)
    assert not client.can_send_bodies
    with pytest.raises(TooLarge):
        client.send(large())
    assert client.num_streams == 0


def test_a_message_above_the_peers_limit_is_refused_at_the_sender() -> None:
    client, _ = ends(limits=replace(CLIENT_LINK, message_bytes=3 * MIB + 7999))
    with pytest.raises(TooLarge, match=r"3153728 bytes; the peer accepts 3153727"):
        client.send(large())
    ends(limits=replace(CLIENT_LINK, message_bytes=3 * MIB + 8000))[0].send(large())


def test_small_frames_pass_between_the_frames_of_a_body() -> None:
    client, server = ends()
    client.send(large())
    exchange(client, server)
    server.send(Result(stream=1, outputs=large().inputs))
    first = b"".join(server.take_output(1))
    server.feed(wire(Ping(payload=b"12345678")))
    rest = b"".join(server.take_output())
    assert rest.startswith(wire(Pong(payload=b"12345678")))
    assert [m.KIND for m in client.feed(first + rest)] == [Kind.RES]


# -- credit ---------------------------------------------------------------------------------------


def test_a_client_sends_one_window_and_then_what_it_is_allowed() -> None:
    memory = FakeMemory()
    client, server = ends(bodies=memory)
    client.send(large())
    sent = b"".join(client.take_output())
    assert WINDOW_BYTES < len(sent) < WINDOW_BYTES + 500
    server.feed(sent)
    assert server.take_output() == []
    assert not client.has_bulk
    told: list[bool] = []
    server.on_output = lambda: told.append(True)
    memory.waiting[0].come()
    assert told
    _, (got,) = exchange(client, server)
    assert plain(got) == plain(large())


def test_more_than_the_credit_costs_the_connection() -> None:
    _, server = ends(bodies=FakeMemory())
    server.feed(head_of(request(1), 2 * MIB) + data(1, bytes(MIB)))
    server.feed(data(1, b"x")[:16])
    assert server.error is not None
    assert server.error.code == ErrorCode.FLOOD


def test_a_small_body_waits_for_no_memory() -> None:
    memory = FakeMemory()
    _, server = ends(bodies=memory)
    (got,) = server.feed(head_of(request(1), b"abc") + data(1, b"abc", last=True))
    assert plain(got) == plain(request(1))
    assert memory.waiting[0].is_cancelled


def test_credit_beyond_two_to_the_32_goes_in_several_frames() -> None:
    memory = FakeMemory()
    limits = replace(CLIENT_LINK, message_bytes=2**40)
    client, server = ends(limits=limits, bodies=memory)
    num_bytes = 2 * 2**32 + WINDOW_BYTES
    server.feed(_head_announcing(num_bytes))
    memory.waiting[0].lengths = (WINDOW_BYTES,)
    memory.waiting[0].come()
    credits = cut(b"".join(server.take_output()))
    assert [frame.kind for frame in credits] == [Kind.CREDIT] * 3
    assert not client.is_closed


def _head_announcing(num_bytes: int) -> bytes:
    head = head_of(request(1), b"")
    return head[:16] + num_bytes.to_bytes(8, "little") + head[24:]


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "code"), [(99, None), (100, None), (101, ErrorCode.TOO_LARGE)])
def test_a_body_is_refused_on_its_announced_size(size: int, code: ErrorCode | None) -> None:
    memory = FakeMemory()
    _, server = ends(limits=replace(CLIENT_LINK, message_bytes=100), bodies=memory)
    server.feed(head_of(request(1), size))
    assert len(memory.waiting) == (code is None)
    answers = [frame.aux for frame in cut(b"".join(server.take_output()))]
    assert answers == ([] if code is None else [code])


REFUSED = {
    "a meta that is none": (
        build_body(build_segmented_frame(Kind.REQ, 1, b"\x90", [memoryview(bytes(70))]))[0],
        ErrorCode.BAD_META,
    ),
    "a meta above the limit": (
        head_of(request(1, params={"x": "x" * 20_000}), 70),
        ErrorCode.TOO_LARGE,
    ),
}


@pytest.mark.parametrize(("head", "code"), REFUSED.values(), ids=REFUSED)
def test_what_comes_of_a_refused_body_is_thrown_away(head: bytes, code: ErrorCode) -> None:
    client, server = ends()
    client.next_stream()
    server.feed(head)
    (failure,) = cut(b"".join(server.take_output()))
    assert (failure.kind, failure.aux, failure.stream) == (Kind.ERR, code, 1)
    assert server.feed(data(1, bytes(5000)) + data(1, b"", last=True)) == []
    (got,) = server.feed(wire(request(2)))
    assert plain(got) == plain(request(2))
    assert server.error is None


def test_memory_that_is_short_refuses_one_request_alone() -> None:
    client, server = ends(bodies=FakeMemory(Busy("no memory")))
    client.send(large())
    (heard,), got = exchange(client, server)
    assert isinstance(heard, Failure)
    assert (heard.code, got, num_incoming(server)) == (ErrorCode.BUSY, [], 0)
    assert (client.num_streams, client.has_bulk, client.error, server.error) == (
        0,
        False,
        None,
        None,
    )
    client.send(request(2))
    _, (second,) = exchange(client, server)
    assert plain(second) == plain(request(2))


def test_a_body_whose_memory_comes_late_can_still_be_refused() -> None:
    memory = FakeMemory()
    _, server = ends(bodies=memory)
    head = build_body(build_segmented_frame(Kind.REQ, 1, b"\x90", [memoryview(bytes(2 * MIB))]))[0]
    server.feed(head)
    memory.waiting[0].come()
    (failure,) = cut(b"".join(server.take_output()))
    assert failure.aux == ErrorCode.BAD_META
    assert memory.waiting[0].is_cancelled


# -- stopped halfway ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "code"),
    [("cancelled", ErrorCode.CANCELLED), ("deadline", ErrorCode.DEADLINE)],
)
def test_a_cancelled_upload_ends_at_once_and_gives_its_memory_back(
    reason: str, code: ErrorCode
) -> None:
    memory = FakeMemory()
    client, server = ends(bodies=memory)
    client.send(large())
    exchange(client, server)
    client.send(Cancel(stream=1, reason=reason))
    heard, got = exchange(client, server)
    failure = failure_of(heard)
    assert (failure.code, failure.executed, got) == (code, Executed.NO, [])
    assert num_incoming(server) == 0  # its end has come
    assert memory.waiting[0].is_cancelled
    client.send(request(2))
    _, (second,) = exchange(client, server)
    assert plain(second) == plain(request(2))


def test_an_answer_that_is_given_up_is_thrown_away() -> None:
    client, server = ends()
    client.send(request(1))
    exchange(client, server)
    server.send(Result(stream=1, outputs=large().inputs))
    client.feed(b"".join(server.take_output(1)))
    client.send(Cancel(stream=1))
    assert client.get_buffer() is not None
    heard, _ = exchange(client, server)
    assert (heard, client.num_streams, client.error, server.error) == ([], 0, None, None)


def test_an_answer_to_an_attempt_that_was_given_up_is_thrown_away() -> None:
    dispatcher, worker = ends(Role.DISPATCHER, Role.WORKER)
    dispatcher.send(Submit(stream=1, op="infer", key=KEY, attempt=1))
    exchange(dispatcher, worker)
    dispatcher.streams.end(1)
    worker.send(Result(stream=1, outputs=large().inputs))
    assert exchange(dispatcher, worker) == ([], [])
    assert dispatcher.error is None


def test_a_deadline_that_passes_halfway_refuses_the_request() -> None:
    client, server = ends()
    server.on_timer(0.0)
    client.send(large(deadline_ms=1500))
    server.feed(b"".join(client.take_output(1)), 10.0)
    server.take_output()
    server.on_timer(11.0)
    assert server.take_output() == []
    server.on_timer(11.5)
    (failure,) = cut(b"".join(server.take_output()))
    assert failure.aux == ErrorCode.DEADLINE


def test_what_is_left_of_the_deadline_counts_from_the_head() -> None:
    client, server = ends()
    client.send(large(deadline_ms=1500))
    server.feed(b"".join(client.take_output(1)), 10.0)
    client.feed(b"".join(server.take_output()))
    (got,) = server.feed(b"".join(client.take_output()), 10.4)
    assert isinstance(got, Request)
    assert got.deadline_ms == 1100


def test_a_body_that_comes_too_slowly_costs_the_connection() -> None:
    client, server = ends()
    client.send(large())
    server.feed(b"".join(client.take_output(1)), 0.0)
    client.feed(b"".join(server.take_output()))
    server.on_timer(1.0)
    limit_s = 1.0 + 10.0 + (3 * MIB + 8000) / 65536
    server.feed(wire(Ping()), limit_s - 1)
    server.on_timer(limit_s - 0.1)
    assert server.error is None
    server.on_timer(limit_s)
    assert server.error is not None
    assert server.error.code == ErrorCode.FLOOD


def test_the_time_of_a_body_begins_anew_after_a_pause_in_which_nothing_was_read() -> None:
    client, server = ends()
    client.send(large())
    server.feed(b"".join(client.take_output(1)), 0.0)
    client.feed(b"".join(server.take_output()))
    server.on_timer(1.0)
    for now in (55.0, 110.0):  # each but a little less than all of its time
        server.forgive_silence(now)
        server.on_timer(now)
        assert server.error is None
    server.feed(wire(Ping()), 150.0)
    server.on_timer(110.0 + 10.0 + (3 * MIB + 8000) / 65536)
    assert server.error is not None


def test_memory_is_awaited_for_half_a_minute() -> None:
    memory = FakeMemory()
    client, server = ends(bodies=memory)
    client.send(large())
    server.feed(b"".join(client.take_output()), 5.0)
    server.feed(wire(Ping()), 34.0)
    server.take_output()
    server.on_timer(34.9)
    assert server.take_output() == []
    server.on_timer(35.0)
    (failure,) = cut(b"".join(server.take_output()))
    assert failure.aux == ErrorCode.BUSY
    assert memory.waiting[0].is_cancelled


def test_a_peer_that_takes_nothing_of_a_large_answer_is_cut() -> None:
    client, server = ends()
    client.send(request(1))
    exchange(client, server)
    server.send(Result(stream=1, outputs=large().inputs))
    server.take_output(1)
    server.on_timer(1.0)
    server.on_timer(2.0)
    server.take_output(1)
    server.on_timer(31.9)
    server.on_timer(32.0)
    assert server.error is None
    server.feed(wire(Ping()), 60.0)
    server.on_timer(62.0)
    assert server.error is not None
    assert server.error.code == ErrorCode.SLOW_CONSUMER


def test_the_end_of_a_connection_gives_all_memory_back() -> None:
    memory = FakeMemory()
    client, server = ends(bodies=memory)
    client.send(large())
    exchange(client, server)
    server.close()
    client.close()
    assert memory.waiting[0].is_cancelled
    assert not client.has_bulk


# -- out of order ---------------------------------------------------------------------------------

HEAD = head_of(request(1), 3, 2)
OUT_OF_ORDER = {
    "no body": data(1, b"abc"),
    "another stream": HEAD + data(2, b"abc"),
    "another segment": HEAD + data(1, b"ab", segment=1),
    "across two segments": HEAD + data(1, b"abcd"),
    "an end too early": HEAD + data(1, b"abc", last=True),
    "no end": HEAD + data(1, b"abc") + data(1, b"ab", segment=1),
    "after the end": HEAD
    + data(1, b"abc")
    + data(1, b"ab", segment=1, last=True)
    + data(1, b"", segment=1, last=True),
    "nothing": HEAD + data(1, b""),
}


@pytest.mark.parametrize("sent", OUT_OF_ORDER.values(), ids=OUT_OF_ORDER)
def test_data_out_of_order_costs_the_connection(sent: bytes) -> None:
    for piece in (len(sent), 1):
        _, server = ends()
        for at in range(0, len(sent), piece):
            server.feed(sent[at : at + piece])
        assert server.error is not None
        assert server.error.code == ErrorCode.SEQUENCE


def test_a_body_without_segments_costs_the_connection() -> None:
    _, server = ends()
    (frame,) = cut(wire(request(1)))
    server.feed(build_body([wire(request(1))])[0])
    assert server.error is not None
    assert server.error.code == ErrorCode.FRAMING
    assert frame.aux == 0


def test_bodies_that_begin_and_never_end_are_bounded() -> None:
    _, server = ends(limits=replace(CLIENT_LINK, message_bytes=0, streams=3))
    for stream in range(1, 4):
        server.feed(head_of(request(stream), 9))
    assert server.error is None
    server.feed(head_of(request(4), 9))
    assert server.error is not None
    assert server.error.code == ErrorCode.FLOOD


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.CREDIT])
def test_without_the_feature_its_kinds_are_unknown(kind: Kind) -> None:
    server = Connection(Role.SERVER)
    server.feed(PREFACE + wire(Hello(features=BODY)))
    server.feed(data(1, b"x") if kind == Kind.DATA else wire(Credit(stream=1, amount=1)))
    assert server.error is not None
    assert server.error.code == ErrorCode.UNKNOWN_KIND


def test_an_answer_with_a_body_needs_the_feature() -> None:
    client = Connection(Role.CLIENT)
    client.feed(wire(Welcome()))
    client.send(request(1))
    client.feed(head_of(Result(stream=1), 9))
    assert client.error is not None
    assert client.error.code == ErrorCode.FRAMING


@pytest.mark.parametrize("peer_bytes", [4096, 4097, 2 * MIB])
def test_data_frames_are_no_larger_than_the_peer_takes(peer_bytes: int) -> None:
    client, server = ends(limits=Limits(frame_bytes=peer_bytes))
    client.send(request(1, op="infer", inputs={"x": np.ones(1_040_000, np.uint8)}))
    sizes = [
        len(frame.segments[0]) for frame in cut(b"".join(client.take_output())) if frame.segments
    ]
    assert max(sizes) == min(peer_bytes, 1_040_000)
    assert sum(sizes) == 1_040_000
    assert server.error is None


def stopped_body(num_faults: int) -> Connection:
    """Return a server whose client has given up a body of 2 MiB before its first byte."""
    server = ends(limits=Limits(fault_burst=num_faults, faults_per_s=1.0))[1]
    server.feed(head_of(request(1), 2 * MIB) + wire(Cancel(stream=1)))
    output = b"".join(server.take_output())
    assert [frame.kind for frame in cut(output)] == [Kind.CREDIT, Kind.ERR]
    return server


def late(num_bytes: int, *, last: bool = False) -> bytes:
    return wire(Data(stream=1, segment=0, payload=bytes(num_bytes), last=last))


@pytest.mark.parametrize("num_bytes", [1, 0])
@pytest.mark.parametrize(("num_late", "is_flood"), [(3, False), (4, False), (5, True)])
def test_data_that_nobody_can_have_asked_for_is_a_flood_at_last(
    num_late: int, is_flood: bool, num_bytes: int
) -> None:
    server = stopped_body(5)  # one of which is the CANCEL
    server.feed(late(MIB) * 2)  # was allowed, and may have been on its way
    assert not server.is_closed
    server.feed(late(num_bytes) * num_late)
    assert server.is_closed == is_flood
    assert server.error is None or server.error.code == ErrorCode.FLOOD
    if not is_flood:
        server.feed(late(0, last=True))
        assert server.feed(wire(request(2)))
        assert not server.is_closed


def test_the_end_of_a_body_that_was_given_up_is_no_fault() -> None:
    server = stopped_body(1)
    server.feed(late(0, last=True))
    assert not server.is_closed
