"""Bodies as section 15.3 of the specification has them: messages in pieces, and put together again.

Like `reference.py` this knows nothing of the code under test but the layout of a header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import BadFraming, TooLarge
from tensorwire_protocol.frames import HEADER, HEADER_BYTES, SEGMENT_KINDS, Flag
from tensorwire_protocol.messages import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

END, BODY = int(Flag.END), int(Flag.BODY)
MOST_BYTES = 2 * 1024 * 1024  # that one body may have here
WINDOW_BYTES = 1024 * 1024  # that come without credit
_ALIGNMENT = 64
_PIECES = [1, 7, 64, 700, 5000, 2**20]
_OPENINGS = frozenset({Kind.REQ, Kind.SUBMIT})


class BrokenBody(Exception):
    """What was sent is no body."""


@dataclass(slots=True)
class _Body:
    """What has come of one."""

    head: bytes  # header, table and meta
    lengths: tuple[int, ...]
    parts: list[bytearray] = field(default_factory=list)

    def due(self) -> int:
        """Return the index of the segment that is due."""
        for i, length in enumerate(self.lengths):
            if len(self.parts[i]) < length:
                return i
        return len(self.lengths) - 1


class Reassembly:
    """Puts what one side has said together: each message one frame, however it left."""

    def __init__(self) -> None:
        self._bodies: dict[int, _Body] = {}
        self._shared = 0  # the stream whose segments were said to lie in shared memory

    def take(self, frame: bytes) -> bytes | None:
        """Return the message that a frame is or completes; None if there is none (yet).

        Raises:
            BrokenBody: it is not due.
        """
        _, kind, flags, aux, stream, _ = HEADER.unpack_from(frame)
        if kind == Kind.SHM and stream:
            self._shared = stream
        if kind == Kind.DATA:
            return self._take_data(stream, aux, frame[HEADER_BYTES:], is_last=bool(flags & END))
        if not flags & BODY:
            return frame
        if stream in self._bodies:
            raise BrokenBody(f"two bodies on stream {stream}")
        lengths = struct.unpack_from(f"<{aux}Q", frame, HEADER_BYTES)
        if not lengths:
            raise BrokenBody("a body without segments")
        if self._shared:
            return self._take_shared(frame, stream, lengths)
        self._bodies[stream] = _Body(frame, lengths, [bytearray() for _ in lengths])
        return None

    def _take_shared(self, head: bytes, stream: int, lengths: Sequence[int]) -> bytes:
        shared, self._shared = self._shared, 0
        if shared != stream:
            raise BrokenBody(f"SHM for stream {shared} came before the body of {stream}")
        return _joined(head, [bytes(length) for length in lengths])

    def _take_data(self, stream: int, segment: int, data: bytes, *, is_last: bool) -> bytes | None:
        body = self._bodies.get(stream)
        if body is None:
            raise BrokenBody(f"DATA on stream {stream}, where none is due")
        part = body.parts[segment] if segment == body.due() else None
        if part is None or len(part) + len(data) > body.lengths[segment]:
            raise BrokenBody(f"DATA for segment {segment}; due is {body.due()}")
        part += data
        is_whole = [len(part) for part in body.parts] == list(body.lengths)
        if is_last:
            del self._bodies[stream]
            if not is_whole and (data or body.head[4] not in _OPENINGS):
                raise BrokenBody(f"the body of stream {stream} ended before its last byte")
        elif is_whole or not data:
            raise BrokenBody(f"the body of stream {stream} goes on for nothing")
        return _joined(body.head, body.parts) if is_last and is_whole else None


def _joined(head: bytes, segments: Sequence[bytes | bytearray]) -> bytes:
    frame = bytearray(head)
    for segment in segments:
        frame += bytes(-len(frame) % _ALIGNMENT) + segment
    _, kind, flags, aux, stream, meta_bytes = HEADER.unpack_from(head)
    body_bytes = len(frame) - HEADER_BYTES
    HEADER.pack_into(frame, 0, body_bytes, kind, flags & ~BODY, aux, stream, meta_bytes)
    return bytes(frame)


def in_pieces(frame: bytes, rng: Random) -> list[bytes]:
    """Return a message that is one frame as its head and DATA; any other frame as it is."""
    if len(frame) < HEADER_BYTES:
        return [frame]  # the preface
    _, kind, flags, aux, stream, meta_bytes = HEADER.unpack_from(frame)
    if kind not in SEGMENT_KINDS or not aux or flags:
        return [frame]
    at = HEADER_BYTES + 8 * aux + meta_bytes
    if at > len(frame):
        return [frame]  # a broken one
    lengths = struct.unpack_from(f"<{aux}Q", frame, HEADER_BYTES)
    if at + sum(lengths) > len(frame):
        return [frame]
    header = HEADER.pack(at - HEADER_BYTES, kind, BODY, aux, stream, meta_bytes)
    pieces, left = [header + frame[HEADER_BYTES:at]], sum(lengths)
    size = rng.choice(_PIECES) if left < 50_000 else _PIECES[-1]
    for segment, length in enumerate(lengths):
        at += -at % _ALIGNMENT
        for start in range(at, at + length, max(size, length // 20)):
            data = frame[start : min(start + max(size, length // 20), at + length)]
            left -= len(data)
            pieces.append(data_frame(stream, segment, data, END if not left else 0))
        at += length
    return pieces if sum(lengths) else [*pieces, data_frame(stream, aux - 1, b"", END)]


def data_frame(stream: int, segment: int, data: bytes, flags: int = 0) -> bytes:
    return HEADER.pack(len(data), Kind.DATA, flags, segment, stream, 0) + data


class Places:
    """Where the bodies of one connection land.

    Args:
        may_wait: every other one has to wait for its memory: where the sender needs credit.

    Attributes:
        num_bytes: what was given or may be taken meanwhile, so that a test can allow for it.
    """

    def __init__(self, *, may_wait: bool) -> None:
        self.num_bytes = 0
        self._may_wait = may_wait
        self._num_asked = 0
        self._waiting: list[_Place] = []

    def reserve(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> _Place:
        """Return memory for segments, at once or later."""
        if sum(lengths) > MOST_BYTES:
            raise TooLarge(f"more than {MOST_BYTES} bytes")
        self._num_asked += 1
        self.num_bytes += sum(lengths) + WINDOW_BYTES
        place = _Place(lengths, on_ready)
        if self._num_asked % 2 or not self._may_wait:
            place.come()
        else:
            self._waiting.append(place)
        return place

    def come(self) -> bool:
        """Give memory to all who wait; say if anybody did."""
        waiting, self._waiting = [p for p in self._waiting if not p.is_cancelled], []
        for place in waiting:
            place.come()
            place.on_ready()
        return bool(waiting)


class SharedZeros:
    """Memory that both ends of a worker link see, full of zeros; a `Sharing`."""

    _MEMORY = memoryview(bytes(MOST_BYTES))

    def __init__(self) -> None:
        self.on_returns: Callable[[list[int]], None] = lambda _: None
        self._num_loans = 0
        self._borrowed: list[int] = []

    def lend(self, segments: Sequence[memoryview]) -> dict[str, Any] | None:
        """Return where segments lie; what is odd finds no room."""
        self._num_loans += 1
        num_bytes = sum(map(len, segments))
        if num_bytes % 2 or num_bytes > MOST_BYTES:
            return None
        offsets = list(accumulate((len(s) for s in segments[:-1]), initial=0))
        owners = [self._num_loans // 2 % 2] * len(segments)
        return {"loan": self._num_loans, "owners": owners, "offsets": offsets}

    def borrow(self, places: Mapping[str, Any], lengths: Sequence[int]) -> list[memoryview]:
        """Return the segments."""
        loan, owners, offsets = (places.get(name) for name in ("loan", "owners", "offsets"))
        views = []
        if type(loan) is not int or type(owners) is not list or type(offsets) is not list:
            raise BadFraming("SHM does not say where segments lie")
        if not len(owners) == len(offsets) == len(lengths):
            raise BadFraming("SHM does not say where each segment lies")
        for owner, offset, length in zip(owners, offsets, lengths, strict=True):
            if owner not in (0, 1) or type(offset) is not int or offset < 0:
                raise BadFraming("SHM speaks of no memory")
            if offset + length > MOST_BYTES:
                raise BadFraming("SHM speaks of memory that was not given out")
            views.append(self._MEMORY[offset : offset + length])
        self._borrowed.append(loan)
        return views

    def give_back(self) -> None:
        """Return all that was borrowed, if anything was."""
        if self._borrowed:
            returned, self._borrowed = self._borrowed, []
            self.on_returns(returned)

    def take_back(self, loans: Sequence[Any]) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        """The peer is gone."""
        self.on_returns = lambda _: None


class _Place:
    """Memory for one body."""

    def __init__(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> None:
        self.segments: list[memoryview] | None = None
        self.is_cancelled = False
        self.lengths, self.on_ready = lengths, on_ready

    def come(self) -> None:
        self.segments = [memoryview(bytearray(length)) for length in self.lengths]

    def cancel(self) -> None:
        self.is_cancelled = True
