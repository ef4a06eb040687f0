"""Tokens on their way to one client: what leaves at once as columns, what waits merged. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tensorwire_protocol.messages import Event, EventBatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensorwire_protocol.limits import Limits

# A frame of events stays far below what a client accepts (4,096 elements, 256 KiB of meta),
# however much was merged while it did not read.
_FRAME_TOKENS = 2048
_FRAME_CHARS = 16_384
_BYTES_EACH = 24  # of meta, more than any token or character with its share of the columns takes
_TOKEN_BYTES = 8  # of memory, beside what the journal keeps anyway; on the wire at most 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRoom:
    """How much goes into one frame of events."""

    tokens: int  # each event counts as one more
    chars: int

    @classmethod
    def of(cls, peer: Limits) -> FrameRoom:
        """Return what a client accepts, and no more than is good for it."""
        room = min(peer.server_meta_bytes, peer.frame_bytes) // _BYTES_EACH
        return cls(
            tokens=max(1, min(_FRAME_TOKENS, peer.container_items, room)),
            chars=max(1, min(_FRAME_CHARS, room)),
        )


class Delta:
    """Tokens of one stream that wait until its client takes them."""

    __slots__ = ("_first_index", "_texts", "_tokens", "num_bytes", "waits_since")

    def __init__(self, first_index: int, waits_since: float = 0.0) -> None:
        self.num_bytes = 0  # about what it takes in memory
        self.waits_since = waits_since  # monotonic s
        self._first_index = first_index
        self._tokens: list[int] = []
        self._texts: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._tokens or self._texts)

    def add(self, tokens: Sequence[int], text: str) -> int:
        """Take what follows; return by how many bytes it grew."""
        self._tokens += tokens
        num_bytes = _TOKEN_BYTES * len(tokens)
        if text:
            self._texts.append(text)
            num_bytes += len(text.encode())
        self.num_bytes += num_bytes
        return num_bytes

    def take(self, room: FrameRoom) -> tuple[int, list[int], str]:
        """Take out as much from the front as goes into a frame: index, tokens and text."""
        first_index, num_tokens = self._first_index, max(1, room.tokens - 1)
        tokens, self._tokens = self._tokens[:num_tokens], self._tokens[num_tokens:]
        text = "".join(self._texts)
        text, rest = text[: room.chars], text[room.chars :]
        self._texts = [rest] if rest else []
        self._first_index += len(tokens)
        self.num_bytes -= _TOKEN_BYTES * len(tokens) + len(text.encode())
        return first_index, tokens, text


@dataclass(slots=True)
class Columns:
    """Events of some streams, in the order in which they came."""

    streams: list[int] = field(default_factory=list)
    first_indexes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    num_chars: int = 0

    def add(self, stream: int, first_index: int, tokens: Sequence[int], text: str) -> None:
        """Add one event."""
        self.streams.append(stream)
        self.first_indexes.append(first_index)
        self.counts.append(len(tokens))
        self.tokens += tokens
        self.texts.append(text)
        self.num_chars += len(text)

    def each(self) -> Iterator[tuple[int, int, list[int], str]]:
        """Return the events one by one, as `add` took them."""
        at = 0
        for stream, first_index, count, text in zip(
            self.streams, self.first_indexes, self.counts, self.texts, strict=True
        ):
            yield stream, first_index, self.tokens[at : at + count], text
            at += count

    def fits(self, room: FrameRoom) -> bool:
        """Say if all of it goes into one frame."""
        return len(self.streams) + len(self.tokens) <= room.tokens and self.num_chars <= room.chars

    def message(self) -> Event | EventBatch:
        """Return the frame with all of it."""
        if len(self.streams) == 1:
            return Event(
                stream=self.streams[0],
                index=self.first_indexes[0],
                tokens=self.tokens,
                text=self.texts[0],
            )
        return EventBatch(
            streams=self.streams,
            first_indexes=self.first_indexes,
            counts=None if set(self.counts) == {1} else self.counts,
            tokens=self.tokens,
            texts=self.texts,
        )


def frames_of(columns: Columns, room: FrameRoom) -> Iterator[Event | EventBatch]:
    """Return the frames that bring some events, at most one event of a stream in each."""
    if columns.fits(room) and len(set(columns.streams)) == len(columns.streams):
        yield columns.message()
        return
    frame = Columns()
    for stream, first_index, tokens, text in _merged(columns, room):
        if frame.streams and not _has_room(frame, room, len(tokens), len(text)):
            yield frame.message()
            frame = Columns()
        frame.add(stream, first_index, tokens, text)
    if frame.streams:
        yield frame.message()


def _has_room(frame: Columns, room: FrameRoom, num_tokens: int, num_chars: int) -> bool:
    return (
        len(frame.streams) + len(frame.tokens) + 1 + num_tokens <= room.tokens
        and frame.num_chars + num_chars <= room.chars
    )


def _merged(columns: Columns, room: FrameRoom) -> Iterator[tuple[int, int, list[int], str]]:
    """Return each stream's events as one, or as many as do not fit one frame."""
    deltas: dict[int, Delta] = {}
    for stream, first_index, tokens, text in columns.each():
        if stream not in deltas:
            deltas[stream] = Delta(first_index)
        deltas[stream].add(tokens, text)
    for stream, delta in deltas.items():
        while delta:
            yield stream, *delta.take(room)
