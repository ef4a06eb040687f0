"""What one client's connection carries, and when."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from protocol.samples import cut, wire
from tensorwire_protocol.connection import Connection
from tensorwire_protocol.errors import ErrorCode, InternalError
from tensorwire_protocol.frames import PREFACE
from tensorwire_protocol.limits import CLIENT_LINK, Limits
from tensorwire_protocol.messages import (
    Cancel,
    End,
    Event,
    EventBatch,
    Failure,
    Finish,
    Hello,
    Message,
    Request,
    Welcome,
)
from tensorwire_protocol.roles import Role

from .fake_worker import FakeWorker, echo, words
from .house import INPUTS, events_of, house, new_key
from .loops import pass_time

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from tensorwire_server.gateway.session import Session

    from .conftest import Run

# A gateway that merges as soon as the socket is full.
NARROW = Limits(send_high_water_bytes=1024)


def request(stream: int, op: str = "generate") -> Request:
    return Request(stream=stream, op=op, key=new_key(), model="m", inputs=INPUTS[op])


class BareClient:
    """A client that reads only when it is told to."""

    def __init__(self, session: Session, sock: socket.socket) -> None:
        self.session = session
        self.messages: list[Message] = []
        self._sock = sock
        self._connection = Connection(Role.CLIENT)

    def greet(
        self,
        *requests: Request,
        limits: Mapping[str, int] | None = None,
        features: tuple[str, ...] = (),
    ) -> None:
        """Say HELLO and what limits are kept, which this client itself does not."""
        self._connection.take_output()
        for message in requests:
            self._connection.send(message)
        self.send_bytes(PREFACE + wire(Hello(limits=limits or {}, features=features)))
        self.send_bytes(b"".join(self._connection.take_output()))

    def send_bytes(self, data: bytes) -> None:
        self._sock.sendall(data)

    def read(self) -> bool:
        """Read what is there; say if there was anything."""
        try:
            data = self._sock.recv(2**20)
        except BlockingIOError:
            return False
        self.messages += self._connection.feed(data)
        return bool(data)

    async def read_all(self) -> None:
        """Read until nothing more comes."""
        while self.read():
            await pass_time()

    def close(self) -> None:
        self._sock.close()

    @property
    def frames(self) -> list[Event | EventBatch]:
        return [m for m in self.messages if isinstance(m, Event | EventBatch)]

    def tokens(self, stream: int) -> list[int]:
        return [
            t for event in events_of(self.frames) if event.stream == stream for t in event.tokens
        ]

    def text(self, stream: int) -> str:
        return "".join(event.text for event in events_of(self.frames) if event.stream == stream)


@contextlib.asynccontextmanager
async def stalled(num_streams: int = 1) -> Any:
    """Yield a house, its worker and a client that does not read, so that its session is paused."""
    async with house(limits=NARROW) as opened:
        worker = await opened.add_worker()
        client = BareClient(*await opened.connect_socket())
        client.greet(*(request(stream) for stream in range(1, num_streams + 1)))
        await worker.until(lambda w: len(w.submits) == num_streams)
        filler = 0
        while not client.session.transport.is_paused:
            worker.step({1: [1]}, text="x" * 512)
            await pass_time()
            filler += 1
            assert filler < 5000
        try:
            yield opened, worker, client
        finally:
            client.close()


# -- one frame each turn ---------------------------------------------------------------------------


def test_the_tokens_of_one_step_leave_as_one_frame(run: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            streams = [client.ask() for _ in range(3)]
            await worker.until(lambda w: len(w.submits) == 3)
            worker.step({1: [10], 2: [20], 3: [30]})
            await client.until(lambda c: c.tokens(3))
            (frame,) = client.frames
            assert isinstance(frame, EventBatch)
            assert frame.counts is None
            assert list(frame.streams) == streams
            assert list(frame.tokens) == [10, 20, 30]
            assert list(frame.texts) == ["10 ", "20 ", "30 "]
            await end_all(worker, [1, 2, 3])
            await asyncio.gather(*(client.ended(stream) for stream in streams))

    run(test)


def test_the_tokens_of_one_stream_leave_as_a_plain_event(run: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            stream = client.ask()
            await worker.until(lambda w: w.submits)
            worker.step({1: [10, 11]})
            worker.step({1: [12]})
            await client.until(lambda c: len(c.tokens(stream)) == 3)
            (frame,) = client.frames
            assert isinstance(frame, Event)
            assert (frame.index, list(frame.tokens), frame.text) == (0, [10, 11, 12], "10 11 12 ")
            await end_all(worker, [1])
            await client.ended(stream)

    run(test)


def test_streams_with_different_numbers_of_tokens_carry_their_counts(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            streams = [client.ask() for _ in range(2)]
            await worker.until(lambda w: len(w.submits) == 2)
            worker.step({1: [1, 2], 2: [3]})
            await pass_time()
            (frame,) = client.frames
            assert isinstance(frame, EventBatch)
            assert frame.counts == [2, 1]
            assert [client.tokens(stream) for stream in streams] == [[1, 2], [3]]
            await end_all(worker, [1, 2])
            await pass_time()

    run_fast(test)


def test_each_client_gets_a_frame_with_its_own_streams_only(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker = await opened.add_worker()
            clients = [await opened.connect() for _ in range(2)]
            for client in clients:
                client.ask()
                await pass_time()
            worker.step({1: [1], 2: [2]})
            await pass_time()
            assert [client.tokens(1) for client in clients] == [[1], [2]]
            assert [len(client.frames) for client in clients] == [1, 1]
            await end_all(worker, [1, 2])
            await pass_time()

    run_fast(test)


def test_an_end_comes_after_its_tokens_and_with_those_of_its_turn(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            first, second = client.ask(), client.ask()
            await worker.until(lambda w: len(w.submits) == 2)
            worker.step({1: [1], 2: [2]})
            worker.end(1)
            worker.step({2: [3]})
            worker.end(2)
            await pass_time()
            kinds = [type(m) for m in client.messages]
            assert kinds == [EventBatch, End, Event, End]
            assert [client.tokens(s) for s in (first, second)] == [[1], [2, 3]]

    run_fast(test)


def test_a_failure_comes_after_the_tokens_that_were_made(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            stream = client.ask()
            await pass_time()
            worker.step({1: [1, 2]})
            worker.fail(1, InternalError("by script"))
            failure = await client.failed(stream)
            assert failure.code == ErrorCode.INTERNAL
            assert client.tokens(stream) == [1, 2]
            assert [type(m) for m in client.messages] == [Event, Failure]

    run_fast(test)


async def end_all(worker: FakeWorker, streams: Sequence[int]) -> None:
    for stream in streams:
        worker.end(stream)


# -- a client that does not read -------------------------------------------------------------------


def test_while_a_client_does_not_read_its_tokens_are_merged_into_few_frames(run_fast: Run) -> None:
    async def test() -> None:
        async with stalled() as (_, worker, client):
            before = len(worker.tokens[1])
            for token in range(100):
                worker.step({1: [token]})
                await pass_time()
            made, text = list(worker.tokens[1]), words(range(100))
            await client.read_all()
            assert client.tokens(1) == made
            assert client.text(1).endswith(text)
            assert len(client.frames) <= before + 1
            worker.end(1)
            await pass_time()

    run_fast(test)


def test_a_huge_merged_delta_is_cut_into_frames_that_every_client_accepts(run_fast: Run) -> None:
    async def test() -> None:
        async with stalled(num_streams=3) as (_, worker, client):
            for _ in range(10):
                worker.step({1: list(range(500)), 2: list(range(700))}, text="é" * 9000)
                worker.step({3: []}, text="ü" * 9000)
                await pass_time()
            made = {stream: list(tokens) for stream, tokens in worker.tokens.items()}
            await client.read_all()
            assert {stream: client.tokens(stream) for stream in made} == made
            assert client.text(1).lstrip("x") == client.text(2) == "é" * 90_000
            assert client.text(3) == "ü" * 90_000
            for frame in client.frames:
                assert len(frame.tokens) <= CLIENT_LINK.container_items
                (parsed,) = cut(wire(frame))
                assert len(parsed.meta) <= CLIENT_LINK.server_meta_bytes
            await end_all(worker, [1, 2, 3])
            await pass_time()

    run_fast(test)


def test_the_end_of_a_stream_does_not_wait_for_a_client_that_does_not_read(run_fast: Run) -> None:
    async def test() -> None:
        async with stalled(num_streams=2) as (opened, worker, client):
            worker.step({1: [5], 2: [6]})
            await pass_time()
            worker.end(1)
            await pass_time()
            opened.check_books(num_live=1)
            worker.step({2: [7]})
            await pass_time()
            await client.read_all()
            assert client.tokens(1)[-1] == 5
            assert client.tokens(2) == [6, 7]
            # The other stream's tokens went on being merged.
            assert sum(event.stream == 2 for event in events_of(client.frames)) == 1
            (end,) = [m for m in client.messages if isinstance(m, End)]
            assert end.count == len(client.tokens(1))
            worker.end(2)
            await pass_time()

    run_fast(test)


def test_an_end_says_how_long_its_tokens_were_held_back(run_fast: Run) -> None:
    async def test() -> None:
        async with stalled(num_streams=2) as (_, worker, client):
            worker.step({1: [5], 2: [6]})
            await pass_time(3.0)
            await client.read_all()
            worker.step({1: [7]})
            worker.end(1)
            await pass_time(4.0)
            worker.end(2)
            await pass_time()
            client.read()
            ends = {m.stream: m for m in client.messages if isinstance(m, End)}
            for stream in (1, 2):
                assert ends[stream].timings["write_stall_ms"] == pytest.approx(3000, abs=100)

    run_fast(test)


def test_tokens_that_are_stopped_in_the_turn_that_fills_the_socket_count_as_held(
    run_fast: Run,
) -> None:
    async def test() -> None:
        async with stalled() as (_, worker, client):
            # The stall begins here: the session is paused and everything before has left it.
            worker.step({1: [5]})
            await pass_time(2.0)
            worker.step({1: [6]})
            await pass_time(1.0)
            await client.read_all()
            worker.end(1)
            await pass_time()
            client.read()
            (end,) = [m for m in client.messages if isinstance(m, End)]
            assert end.timings["write_stall_ms"] == pytest.approx(3000, abs=100)

    run_fast(test)


def test_tokens_of_the_turn_that_fills_the_socket_stay_in_order(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            stream = client.ask()
            await pass_time()
            (session,) = opened.gateway.sessions
            (live,) = opened.gateway._live
            live.on_tokens(0, [5], "a")
            session.transport.pause_writing()
            live.on_tokens(1, [6], "b")
            assert session._deltas[stream].num_bytes == 18
            session.transport.resume_writing()
            worker.tokens[1] += [5, 6]
            worker.end(1)
            await client.ended(stream)
            assert (client.tokens(stream), client.text(stream)) == ([5, 6], "ab")

    run_fast(test)


def test_a_client_that_reads_at_once_is_not_called_slow(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, client = await opened.add_worker(), await opened.connect()
            stream = client.ask()
            await pass_time()
            worker.step({1: [5]})
            await pass_time(3.0)
            worker.end(1)
            end = await client.ended(stream)
            assert end.timings["write_stall_ms"] == 0

    run_fast(test)


def test_a_client_that_leaves_while_its_tokens_wait_takes_them_along(run_fast: Run) -> None:
    async def test() -> None:
        async with stalled() as (opened, worker, client):
            worker.step({1: [5]})
            await pass_time()
            client.close()
            worker.step({1: [6]})
            await pass_time()
            assert not opened.gateway.sessions
            await worker.until(lambda w: w.cancels)
            worker.end(1, Finish.CANCELLED)
            await pass_time()
            opened.check_books(num_live=0)

    run_fast(test)


# -- limits of the client --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [
        {"container_items": 1},
        {"container_items": 10},
        {"server_meta_bytes": 4096},
        {"frame_bytes": 4096},
    ],
    ids=lambda limits: " ".join(f"{name}={value}" for name, value in limits.items()),
)
def test_frames_keep_to_the_limits_that_the_client_has_announced(
    run_fast: Run, limits: dict[str, int]
) -> None:
    async def test() -> None:
        async with house() as opened:
            worker = await opened.add_worker()
            client = BareClient(*await opened.connect_socket())
            streams = range(1, 41)
            client.greet(*map(request, streams), limits=limits)
            await pass_time()
            made = {stream: [2**31 - 1] * (stream % 3) for stream in streams}
            made[2] = [2**31 - 1] * 1000
            worker.step(made, text="𝄞" * 50)
            await pass_time()
            await client.read_all()
            await end_all(worker, streams)
            await pass_time()
            await client.read_all()
            assert len([m for m in client.messages if isinstance(m, End)]) == 40
            assert {stream: client.tokens(stream) for stream in streams} == made
            assert all(client.text(stream) == "𝄞" * 50 for stream in streams)
            for frame in client.frames:
                assert len(frame.tokens) <= limits.get("container_items", 4096)
                if isinstance(frame, EventBatch):
                    assert len(frame.streams) <= limits.get("container_items", 4096)
                (parsed,) = cut(wire(frame))
                assert len(parsed.meta) <= limits.get("server_meta_bytes", 4096)
            client.close()
            await pass_time()

    run_fast(test)


def test_a_client_that_accepts_no_token_at_all_hurts_only_itself(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker, other = await opened.add_worker(), await opened.connect()
            stream = other.ask()
            await pass_time()
            odd = BareClient(*await opened.connect_socket())
            odd.greet(request(1), limits={"container_items": 0})
            await pass_time()
            worker.step({1: [1], 2: [2]})
            worker.end(2)
            await pass_time()
            odd.read()
            failure = odd.messages[-1]
            assert isinstance(failure, Failure)
            assert (failure.stream, failure.code) == (0, ErrorCode.OUTPUT_TOO_LARGE)
            worker.end(1)
            await other.ended(stream)
            assert not worker.is_lost
            odd.close()

    run_fast(test)


def test_an_answer_that_the_client_would_not_accept_fails_alone(run: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            await opened.add_worker(on_submit=echo)
            client = await opened.connect(Limits(frame_bytes=8192))
            small, large = (np.zeros(n, dtype=np.uint8) for n in (100, 10_000))
            failure = await client.failed(client.ask("infer", inputs={"x": large}))
            assert failure.code == ErrorCode.OUTPUT_TOO_LARGE
            answer = await client.answered(client.ask("infer", inputs={"x": small}))
            assert np.array_equal(answer.outputs["x"], small)

    run(test)


# -- the greeting ----------------------------------------------------------------------------------


def test_requests_right_behind_the_greeting_are_answered_after_welcome(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            await opened.add_worker(on_submit=echo)
            client = BareClient(*await opened.connect_socket())
            client.greet(request(1, "embed"), request(2, "tokenize"))
            await pass_time()
            client.read()
            welcome, *answers = client.messages
            assert isinstance(welcome, Welcome)
            assert len(welcome.session) == 16
            assert [m.KIND.name for m in answers] == ["RES", "RES"]
            client.close()
            await pass_time()

    run_fast(test)


def test_every_session_has_an_id_of_its_own(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            ids = set()
            for _ in itertools.repeat(None, 5):
                client = BareClient(*await opened.connect_socket())
                client.greet()
                await pass_time()
                client.read()
                (welcome,) = client.messages
                assert isinstance(welcome, Welcome)
                ids.add(welcome.session)
                client.close()
            await pass_time()
            assert len(ids) == 5

    run_fast(test)


def test_a_violation_ends_the_session_and_stops_its_requests(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker = await opened.add_worker()
            client = BareClient(*await opened.connect_socket())
            client.greet(request(2))
            await pass_time()
            client.send_bytes(wire(request(1)))
            await pass_time()
            client.read()
            failure = client.messages[-1]
            assert isinstance(failure, Failure)
            assert (failure.stream, failure.code) == (0, ErrorCode.SEQUENCE)
            assert not opened.gateway.sessions
            assert [cancel.stream for cancel in worker.cancels] == [1]
            worker.end(1, Finish.CANCELLED)
            client.close()
            await pass_time()

    run_fast(test)


def test_requests_that_a_violation_follows_in_the_same_read_are_not_begun(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            worker = await opened.add_worker()
            client = BareClient(*await opened.connect_socket())
            client.greet(request(1))
            await pass_time()
            # What stops a request that runs is heard all the same.
            client.send_bytes(wire(Cancel(stream=1)) + wire(request(3)) + wire(request(2)))
            await pass_time()
            client.read()
            failure = client.messages[-1]
            assert isinstance(failure, Failure)
            assert (failure.stream, failure.code) == (0, ErrorCode.SEQUENCE)
            assert [submit.stream for submit in worker.submits] == [1]
            assert [cancel.stream for cancel in worker.cancels] == [1]
            worker.end(1, Finish.CANCELLED)
            client.close()
            await pass_time()

    run_fast(test)


def test_who_says_nothing_is_sent_away_after_the_handshake_s_patience(run_fast: Run) -> None:
    async def test() -> None:
        async with house() as opened:
            client = BareClient(*await opened.connect_socket())
            await pass_time(4.5)
            assert opened.gateway.sessions
            await pass_time(2.0)
            assert not opened.gateway.sessions
            client.read()
            (failure,) = client.messages
            assert isinstance(failure, Failure)
            assert failure.code == ErrorCode.HANDSHAKE_TIMEOUT
            client.close()

    run_fast(test)
