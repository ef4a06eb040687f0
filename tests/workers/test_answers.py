"""What becomes of outcomes that the asyncio side takes together."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from tensorwire_protocol.errors import NumericError
from tensorwire_protocol.messages import End, Failure, Finish, Message, Step
from tensorwire_server.scheduling.continuous import Emissions
from tensorwire_server.workers.answers import Answers
from tensorwire_server.workers.loop import Leave, StepOutcome
from tensorwire_server.workers.registry import Registry
from tensorwire_server.workers.streams import TextStream
from tensorwire_server.workers.text import StopMatcher

if TYPE_CHECKING:
    from tensorwire_server.workers.link import Link
    from tensorwire_server.workers.streams import Stream


class Letters:
    """Every token is a letter; "!" is a token that no detokenizer can read."""

    @staticmethod
    def push(token_id: int) -> str:
        if token_id == ord("!"):
            raise ValueError("unreadable")
        return chr(token_id)

    @staticmethod
    def flush() -> str:
        return ""


class FakeLink:
    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.streams: dict[int, Stream] = {}

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def on_stream_ended(self) -> None: ...


class FakeCompute:
    def __init__(self) -> None:
        self.num_taken = 0
        self.commands: list[Any] = []

    def outcome_taken(self) -> None:
        self.num_taken += 1

    def post(self, commands: list[Any]) -> None:
        self.commands += commands


class Desk:
    """Answers with open streams on one link."""

    def __init__(self, *stops: str) -> None:
        self.compute = FakeCompute()
        self.registry = Registry("m", max_requests=8)
        self.registry.compute = cast("Any", self.compute)
        self.answers = Answers(self.registry)
        self.links = [FakeLink(), FakeLink()]
        self._stops = stops

    def open(self, id: int, link: int = 0) -> TextStream:
        stream = TextStream(cast("Link", self.links[link]), 100 + id, 1, id, 0.0)
        stream.begin(Letters(), StopMatcher(self._stops) if self._stops else None)
        self.registry.add(stream, None)
        return stream

    def take(self, *outcomes: StepOutcome) -> None:
        self.answers.on_steps(outcomes)

    @property
    def steps(self) -> list[Step]:
        return [m for m in self.links[0].sent if isinstance(m, Step)]


def outcome(index: int, made: dict[int, str], **more: Any) -> StepOutcome:
    """A step that made a letter, the one at `index`, for some sequences."""
    finishes = more.pop("finishes", {})
    emissions = Emissions()
    emissions.sequence_ids += made
    emissions.indexes += [index] * len(made)
    emissions.token_ids += [ord(letter) for letter in made.values()]
    emissions.finishes |= finishes
    return StepOutcome(emissions=emissions, num_rows=len(made), **more)


def test_steps_that_are_taken_together_leave_in_one_frame() -> None:
    async def test() -> None:
        desk = Desk()
        desk.open(1)
        desk.open(2)
        desk.take(
            outcome(0, {1: "a"}),
            outcome(1, {1: "b", 2: "x"}),
            outcome(2, {1: "c"}, finishes={1: "length"}),
        )
        step, end = desk.links[0].sent
        assert isinstance(step, Step)
        assert (step.streams, step.first_indexes, step.counts) == ([101, 102], [0, 1], [3, 1])
        assert (step.tokens, step.texts) == ([*map(ord, "abcx")], ["abc", "x"])
        assert isinstance(end, End)
        assert (end.stream, end.finish, end.count) == (101, Finish.LENGTH, 3)
        assert desk.compute.num_taken == 3
        assert list(desk.registry.streams) == [2]
        assert end.timings["largest_batch"] == 2

    asyncio.run(test())


def test_steps_of_the_same_sequences_begin_where_the_first_of_them_did() -> None:
    async def test() -> None:
        desk = Desk()
        desk.open(1)
        desk.open(2)
        desk.take(outcome(5, {1: "a", 2: "x"}), outcome(6, {1: "b", 2: "y"}))
        (step,) = desk.steps
        assert (step.streams, step.first_indexes, step.counts) == ([101, 102], [5, 5], [2, 2])
        assert step.tokens == [*map(ord, "abxy")]

    asyncio.run(test())


def test_one_step_alone_needs_no_counts() -> None:
    async def test() -> None:
        desk = Desk()
        desk.open(1)
        desk.open(2)
        desk.take(outcome(0, {1: "a", 2: "x"}))
        (step,) = desk.steps
        assert (step.counts, step.texts) == (None, ["a", "x"])

    asyncio.run(test())


def test_each_link_gets_its_own_streams() -> None:
    async def test() -> None:
        desk = Desk()
        desk.open(1, link=0)
        desk.open(2, link=1)
        desk.take(outcome(0, {1: "a", 2: "x"}), outcome(1, {1: "b", 2: "y"}))
        texts = [[m.texts for m in link.sent if isinstance(m, Step)] for link in desk.links]
        assert texts == [[["ab"]], [["xy"]]]

    asyncio.run(test())


def test_what_was_made_behind_a_stop_string_is_dropped_and_the_scheduler_told() -> None:
    async def test() -> None:
        desk = Desk("bc")
        desk.open(1)
        desk.take(*[outcome(i, {1: letter}) for i, letter in enumerate("abcd")])
        step, end = desk.links[0].sent
        assert isinstance(step, Step)
        assert (step.counts, step.tokens, step.texts) == ([3], [*map(ord, "abc")], ["a"])
        assert isinstance(end, End)
        assert (end.finish, end.count) == (Finish.STOP, 3)
        assert desk.compute.commands == [Leave(1, is_whole=True)]
        desk.take(outcome(4, {1: "e"}))
        assert len(desk.links[0].sent) == 2

    asyncio.run(test())


def test_a_failure_comes_behind_the_tokens_of_the_steps_before_it() -> None:
    async def test() -> None:
        desk = Desk()
        desk.open(1)
        desk.open(2)
        desk.take(
            outcome(0, {1: "a", 2: "x"}),
            outcome(1, {2: "y"}, failed={1: NumericError("not finite")}),
            outcome(2, {2: "z"}, expired=[2]),
        )
        step, failure, end = desk.links[0].sent
        assert isinstance(step, Step)
        assert step.texts == ["a", "xyz"]
        assert isinstance(failure, Failure)
        assert failure.stream == 101
        assert isinstance(end, End)
        assert (end.stream, end.finish, end.count) == (102, Finish.DEADLINE, 3)

    asyncio.run(test())


def test_a_token_that_cannot_be_read_fails_its_stream_alone() -> None:
    async def test() -> None:
        desk = Desk()
        desk.open(1)
        desk.open(2)
        desk.take(outcome(0, {1: "!", 2: "x"}), outcome(1, {1: "b", 2: "y"}))
        failure, step = desk.links[0].sent
        assert isinstance(failure, Failure)
        assert failure.stream == 101
        assert isinstance(step, Step)
        assert (step.streams, step.texts) == ([102], ["xy"])
        assert desk.compute.commands == [Leave(1)]

    asyncio.run(test())
