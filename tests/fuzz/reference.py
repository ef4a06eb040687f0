"""The life of streams as section 10 of the specification has it, in the fewest words.

A `Book` is kept for one end of a connection from what its application sends and hears, and knows
nothing of the code under test: where the two disagree, one of them is wrong.
"""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

from tensorwire_protocol.messages import (
    Ack,
    End,
    Event,
    EventBatch,
    Failure,
    Request,
    Result,
    Resume,
    Step,
    Submit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensorwire_protocol.messages import Message


class Book:
    """The streams of one end: where each stands, and how it ended."""

    def __init__(self) -> None:
        self.last = 0
        self.next_index: dict[int, int] = {}  # of the open streams
        self.ends: dict[int, Message] = {}

    def note(self, message: Message) -> None:
        """Take what was sent or heard; a breach of the rules is an AssertionError."""
        match message:
            case Request():
                self._begin(message.stream, 0)
            case Resume():
                self._begin(message.stream, message.next_index)
            case Submit():
                self._begin(message.stream, len(message.so_far))
            case Event() | EventBatch() | Step():
                for stream, index, tokens in events_of(message):
                    assert self.next_index[stream] == index, f"a gap or a repeat on {stream}"
                    self.next_index[stream] = index + len(tokens)
            case Ack():
                assert message.stream in self.next_index
            case End():
                assert message.count == self.next_index[message.stream]
                self._finish(message.stream, message)
            case Result():
                self._finish(message.stream, message)
            case Failure():
                assert message.stream, f"the connection failed: {message.message}"
                self._finish(message.stream, message)

    def _begin(self, stream: int, next_index: int) -> None:
        # Not above all before: a body is complete later than its stream begins.
        used = self.next_index.keys() | self.ends.keys()
        assert stream not in used, "a stream's number was used twice"
        self.last = max(self.last, stream)
        self.next_index[stream] = next_index

    def _finish(self, stream: int, message: Message) -> None:
        assert stream not in self.ends, f"stream {stream} ended twice"
        del self.next_index[stream]
        self.ends[stream] = message


def events_of(message: Event | EventBatch | Step) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Return the events in a message, one after the other: stream, index, tokens."""
    if isinstance(message, Event):
        yield message.stream, message.index, message.tokens
        return
    at = 0
    counts = repeat(1) if message.counts is None else message.counts
    for stream, index, count in zip(message.streams, message.first_indexes, counts, strict=False):
        yield stream, index, message.tokens[at : at + count]
        at += count
    assert at == len(message.tokens)
