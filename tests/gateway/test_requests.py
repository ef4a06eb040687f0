"""The life of one request, event by event: the table of requests.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tensorwire_protocol.errors import Busy, ErrorCode, Executed, WorkerLost
from tensorwire_protocol.messages import (
    Ack,
    EncodedTerminal,
    End,
    Event,
    Failure,
    Finish,
    Request,
    Result,
)
from tensorwire_protocol.tensors import ids_checksum
from tensorwire_server.gateway.journal import Journal
from tensorwire_server.gateway.requests import LiveRequest, Phase

from .forwarding import packed_result, read_terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_protocol.errors import TensorwireError
    from tensorwire_protocol.messages import Message, Submit
    from tensorwire_server.routing.replica import AttemptOwner

WAITING, RUNNING, STOPPING, CLOSED = Phase
WORKER_STREAM = 40


class FakeReplica:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.submits: list[Submit] = []
        self.cancels: list[tuple[int, str]] = []
        self.abandoned: list[int] = []
        self.refusal: Exception | None = None

    def submit(self, number: int, owner: AttemptOwner) -> int:
        if self.refusal is not None:
            raise self.refusal
        self.submits.append(owner.build_submit(WORKER_STREAM))
        return WORKER_STREAM

    def cancel(self, stream: int, reason: str) -> None:
        self.cancels.append((stream, reason))

    def abandon(self, stream: int) -> None:
        self.abandoned.append(stream)


class Books:
    """The reader and the keeper of one request."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.sent: list[Message] = []
        self.outcomes: list[str] = []
        self.notes: list[str] = []
        self.num_stopping = 0
        self.time = 100.0
        self.stalled_s = 0.0

    def now(self) -> float:
        return self.time

    def on_stopping(self, live: LiveRequest) -> None:
        self.num_stopping += 1

    def on_detached(self, live: LiveRequest) -> None:
        self.notes.append("detached")

    def on_kept(self, live: LiveRequest, num_bytes: int) -> None:
        self.notes.append("kept")

    def on_deserted(self, live: LiveRequest) -> None:
        self.notes.append("deserted")

    def on_attached(self, live: LiveRequest) -> None:
        self.notes.append("attached")

    def on_closed(
        self, live: LiveRequest, terminal: EncodedTerminal, outcome: str, *, may_be_kept: bool
    ) -> None:
        assert live.is_closed
        self.outcomes.append(outcome)
        self.journal.close(live.entry)

    def send_ack(self, ack: Ack) -> None:
        self.sent.append(ack)

    def send_tokens(self, stream: int, first_index: int, tokens: Sequence[int], text: str) -> None:
        self.sent.append(Event(stream=stream, index=first_index, tokens=tokens, text=text))

    def settle(self, stream: int) -> float:
        return self.stalled_s

    def send_terminal(self, message: EncodedTerminal | Failure) -> None:
        self.sent.append(read_terminal(message))

    def dismiss(self, stream: int, error: TensorwireError) -> None:
        self.sent.append(Failure.of(stream, error))


class Life:
    """One request with its books and its replica, brought to a phase."""

    def __init__(self, phase: Phase = WAITING, **request: Any) -> None:
        self.books, self.replica = Books(), FakeReplica()
        fields = {"op": "generate", "key": bytes(16), "model": "m"} | request
        self.live = LiveRequest(
            self.books.journal.open(Request(stream=5, **fields)),
            model="m",
            name=bytes(16),
            tenant="",
            reader=self.books,
            keeper=self.books,
            arrived_at=self.books.time,
        )
        if phase is not WAITING:
            self.live.dispatch(self.replica)
            self.live.on_ack([7, 8])
            self.live.on_tokens(0, [1], "one ")
        if phase in (STOPPING, CLOSED):
            self.live.stop(Finish.CANCELLED)
        if phase is CLOSED:
            self.live.give_up()
        assert self.live.phase is phase
        self.books.sent.clear()
        self.replica.cancels.clear()

    def end(self, *tokens: int, finish: Finish = Finish.STOP) -> None:
        checksum = ids_checksum(tokens)
        self.live.on_end(End(stream=40, finish=finish, count=len(tokens), checksum=checksum))

    @property
    def sent(self) -> list[str]:
        """Return the frames in words: the kind, and what it says."""
        return [in_words(message) for message in self.books.sent]


def in_words(message: Message) -> str:
    assert isinstance(message, Ack | Event | End | Result | Failure)
    assert message.stream == 5
    if isinstance(message, End):
        return f"END {message.finish.value}"
    if isinstance(message, Failure):
        return f"ERR {ErrorCode(message.code).name}"
    return message.KIND.name


EVENTS: dict[str, Callable[[Life], None]] = {
    "dispatch": lambda life: life.live.dispatch(life.replica),
    "ack": lambda life: life.live.on_ack([7, 8]),
    "tokens": lambda life: life.live.on_tokens(1, [2], "two "),
    "gap": lambda life: life.live.on_tokens(2, [3], "three "),
    "repeat": lambda life: life.live.on_tokens(0, [1], "one "),
    "end": lambda life: life.end(1),
    "end confirms": lambda life: life.end(1, finish=Finish.CANCELLED),
    "end miscounts": lambda life: life.end(1, 2),
    "end of other tokens": lambda life: life.end(2),
    "result": lambda life: life.live.on_result(packed_result(stream=40)),
    "failure": lambda life: life.live.on_failure(Busy("full")),
    "replica lost": lambda life: life.live.on_replica_lost(),
    "cancel": lambda life: life.live.stop(Finish.CANCELLED),
    "deadline": lambda life: life.live.on_deadline(),
    "reader lost": lambda life: life.live.lose_reader(),
    "give up": lambda life: life.live.give_up(),
    "fail": lambda life: life.live.fail(Busy("failed by the gateway")),
    "cut": lambda life: life.live.cut(Busy("cut by the gateway")),
}
# What each event makes of each phase: the next phase, and the frame that the client gets.
FROM_THE_WORKER = {
    "ack": (None, "ACK"),
    "tokens": (None, "EVT"),
    "gap": (CLOSED, "ERR INTERNAL"),
    "repeat": (CLOSED, "ERR INTERNAL"),
    "end": (CLOSED, "END stop"),
    "end confirms": (CLOSED, "END cancelled"),
    "end miscounts": (CLOSED, "ERR INTERNAL"),
    "end of other tokens": (CLOSED, "ERR INTERNAL"),
    "result": (CLOSED, "RES"),
    "failure": (CLOSED, "ERR BUSY"),
    "fail": (CLOSED, "ERR BUSY"),
    "cut": (CLOSED, "ERR BUSY"),
}
TABLE: dict[Phase, dict[str, tuple[Phase | None, str | None]]] = {
    WAITING: {
        "dispatch": (RUNNING, None),
        "cancel": (CLOSED, "END cancelled"),
        "deadline": (CLOSED, "END deadline"),
        "reader lost": (CLOSED, None),
        "give up": (None, None),
        "fail": (CLOSED, "ERR BUSY"),
        "cut": (CLOSED, "ERR BUSY"),
    },
    RUNNING: FROM_THE_WORKER
    | {
        "replica lost": (CLOSED, "ERR WORKER_LOST"),
        "cancel": (STOPPING, None),
        "deadline": (STOPPING, None),
        "reader lost": (STOPPING, None),
        "give up": (None, None),
    },
    STOPPING: FROM_THE_WORKER
    | {
        "replica lost": (CLOSED, "END cancelled"),
        "cancel": (None, None),
        "deadline": (None, None),
        "reader lost": (None, None),
        "give up": (CLOSED, "END cancelled"),
    },
    CLOSED: {event: (None, None) for event in EVENTS if event != "dispatch"},
}


@pytest.mark.parametrize(
    ("phase", "event"), [(phase, event) for phase in TABLE for event in TABLE[phase]]
)
def test_each_event_does_in_each_phase_what_the_table_says(phase: Phase, event: str) -> None:
    next_phase, frame = TABLE[phase][event]
    life = Life(phase)
    EVENTS[event](life)
    assert life.live.phase is (next_phase or phase)
    assert life.sent == ([] if frame is None else [frame])
    is_closed = life.live.phase is CLOSED
    assert len(life.books.outcomes) == is_closed
    assert len(life.books.journal) == (not is_closed)


@pytest.mark.parametrize("phase", [RUNNING, STOPPING])
@pytest.mark.parametrize("event", [e for e in FROM_THE_WORKER if TABLE[RUNNING][e][0] is CLOSED])
def test_without_a_reader_nothing_is_sent_and_the_books_are_closed(
    phase: Phase, event: str
) -> None:
    life = Life(phase)
    life.live.lose_reader()
    EVENTS[event](life)
    assert life.live.is_closed
    assert life.sent == []
    assert len(life.books.outcomes) == 1


@pytest.mark.parametrize("event", ["cancel", "deadline", "reader lost"])
def test_the_worker_is_told_to_stop_once_and_a_grace_begins(event: str) -> None:
    life = Life(RUNNING)
    for _ in range(2):
        EVENTS[event](life)
    reason = "deadline" if event == "deadline" else "cancelled"
    assert life.replica.cancels == [(WORKER_STREAM, reason)]
    assert life.books.num_stopping == 1


def test_the_first_reason_to_stop_is_the_one_that_counts() -> None:
    life = Life(RUNNING)
    life.live.on_deadline()
    life.live.stop(Finish.CANCELLED)
    life.live.give_up()
    assert life.sent == ["END deadline"]
    assert life.books.outcomes == ["deadline"]


def test_an_end_of_ours_carries_exactly_what_the_client_got() -> None:
    life = Life(RUNNING)
    life.live.on_tokens(1, [2, 3], "two three ")
    life.live.stop(Finish.CANCELLED)
    life.live.give_up()
    end = life.books.sent[-1]
    assert isinstance(end, End)
    assert (end.count, end.checksum) == (3, ids_checksum([1, 2, 3]))
    assert end.usage == {"prompt_tokens": 2, "completion_tokens": 3}
    assert life.replica.abandoned == [WORKER_STREAM]


def test_a_result_that_wins_the_race_against_a_cancel_is_passed_on() -> None:
    life = Life(STOPPING)
    life.live.on_result(packed_result(stream=40, outputs={"x": 1}, usage={"u": 2}, extra={"e": 3}))
    (result,) = life.books.sent
    assert isinstance(result, Result)
    assert (result.outputs, result.usage, result.extra) == ({"x": 1}, {"u": 2}, {"e": 3})


def test_terminals_carry_the_times_of_worker_and_gateway() -> None:
    life = Life(RUNNING)
    life.books.time += 1.5
    life.books.stalled_s = 0.25
    timings = {"queued_ms": 3.0}
    life.live.on_result(packed_result(stream=40, timings=timings))
    (result,) = life.books.sent
    assert isinstance(result, Result)
    assert result.timings == {"queued_ms": 3.0, "gateway_ms": 1500.0, "write_stall_ms": 250.0}


def test_a_worker_gets_the_request_without_what_only_concerns_the_gateway() -> None:
    life = Life(
        inputs={"prompt": "p"}, params={"wait": True, "seed": 1}, deadline_ms=5000, priority=3
    )
    life.books.time += 2.0
    life.live.dispatch(life.replica)
    (submit,) = life.replica.submits
    assert submit.params == {"seed": 1}
    assert submit.inputs == {"prompt": "p"}
    assert (submit.attempt, submit.priority, submit.deadline_ms) == (1, 3, 3000)


def test_a_deadline_that_has_passed_reaches_the_worker_as_one_millisecond() -> None:
    life = Life(deadline_ms=10)
    life.books.time += 1.0
    life.live.dispatch(life.replica)
    assert life.replica.submits[0].deadline_ms == 1


def test_a_worker_that_cannot_be_given_the_request_fails_it() -> None:
    life = Life()
    life.replica.refusal = WorkerLost("gone", executed=Executed.NO)
    life.live.dispatch(life.replica)
    assert life.sent == ["ERR WORKER_LOST"]
    assert life.live.is_closed


def test_the_client_is_told_the_length_of_its_prompt_if_it_has_one() -> None:
    life = Life(RUNNING)
    life.live.on_ack([4, 5, 6])
    life.live.on_ack(None)
    acks = [message for message in life.books.sent if isinstance(message, Ack)]
    assert [ack.prompt_tokens for ack in acks] == [3, None]
    assert all(ack.prompt_ids is None for ack in acks)


def test_a_lost_worker_is_blamed_with_the_facts() -> None:
    life = Life(RUNNING)
    life.live.on_replica_lost()
    (failure,) = life.books.sent
    assert isinstance(failure, Failure)
    assert failure.retryable
    assert failure.executed is Executed.MAYBE
    assert failure.detail == {"attempt": 1, "tokens": 1}


def test_a_worker_that_leaves_a_gap_is_told_to_stop_and_not_heard_again() -> None:
    life = Life(RUNNING)
    EVENTS["gap"](life)
    assert life.replica.cancels == [(WORKER_STREAM, "cancelled")]
    assert life.replica.abandoned == [WORKER_STREAM]
