"""The open streams of one connection, and at which token each of them stands."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

from tensorwire_protocol.errors import SequenceError

if TYPE_CHECKING:
    from tensorwire_protocol.messages import EventBatch


class OpenStreams:
    """Stream ids only rise; each open stream has the index of its next token."""

    def __init__(self) -> None:
        self.last = 0  # highest id opened so far
        self._next_index: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._next_index)

    def __contains__(self, stream: object) -> bool:
        return stream in self._next_index

    def ids(self) -> list[int]:
        """Return the streams that have begun and not ended."""
        return list(self._next_index)

    def open(self, stream: int, next_index: int = 0) -> int:
        """Begin a stream, or go on with one at `next_index`; return how many are open now.

        Raises:
            SequenceError: its id is not above all earlier ones.
        """
        if stream <= self.last:
            raise SequenceError(f"stream {stream} was opened after stream {self.last}")
        self.last = stream
        self._next_index[stream] = next_index
        return len(self._next_index)

    def pass_by(self, stream: int) -> None:
        """Count a stream as opened that is not let in.

        Raises:
            SequenceError: its id is not above all earlier ones.
        """
        if stream <= self.last:
            raise SequenceError(f"stream {stream} was opened after stream {self.last}")
        self.last = stream

    def advance(self, stream: int, index: int, num_tokens: int) -> None:
        """Take note of tokens that begin at `index`.

        Raises:
            SequenceError: there is a gap, a repeat, or no such stream.
        """
        expected = self._next_index.get(stream)
        if expected is None:
            raise SequenceError(f"an event for stream {stream}, which is not open")
        if index != expected:
            raise SequenceError(f"stream {stream} went on at token {index}, not {expected}")
        self._next_index[stream] = index + num_tokens

    def advance_all(self, batch: EventBatch) -> None:
        """Take note of all events of a batch; raises as `advance`."""
        next_index = self._next_index
        counts = batch.counts or repeat(1)
        for stream, index, count in zip(batch.streams, batch.first_indexes, counts, strict=False):
            if next_index.get(stream) != index:
                self.advance(stream, index, count)  # which says what is wrong
            next_index[stream] = index + count

    def end(self, stream: int) -> int | None:
        """Close a stream; return how many tokens it had, None if it was not open."""
        return self._next_index.pop(stream, None)
