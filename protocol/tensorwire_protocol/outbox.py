"""What a connection has to say and the shell has not taken yet: three queues.

    urgent   PING, a server's CREDIT  first
    small    every other frame        next, in the order in which they came
    bulk     DATA of large bodies     last, in turns, and only as far as the socket takes it

PONG is a small frame: whoever asked may conclude that all before it was answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tensorwire_protocol.frames import DATA_BYTES, Flag, pack_header
from tensorwire_protocol.messages import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

_DATA: Final = int(Kind.DATA)
_END: Final = int(Flag.END)
_JOIN_BYTES: Final = 128 * 1024  # frames up to this size are joined into one write


class OutgoingBody:
    """The segments of one message, while they leave as DATA frames; not copied.

    Args:
        data_bytes: of one frame, at most.
        allowed: how many bytes may leave before the peer allows more; None: all.
    """

    __slots__ = ("_allowed", "_at", "_data_bytes", "_segment", "left_bytes", "segments", "stream")

    def __init__(
        self,
        stream: int,
        segments: Sequence[memoryview],
        data_bytes: int = DATA_BYTES,
        *,
        allowed: int | None = None,
    ) -> None:
        self.stream = stream
        self.left_bytes = sum(map(len, segments))
        self.segments = segments
        self._segment = self._at = 0
        self._data_bytes, self._allowed = data_bytes, allowed

    @property
    def may_leave(self) -> bool:
        """Say if the peer allows more bytes, or needs none to be complete."""
        return self._allowed is None or self._allowed > 0 or not self.left_bytes

    @property
    def segment(self) -> int:
        """The index of the segment that is due."""
        return self._segment

    def allow(self, num_bytes: int) -> None:
        """Let so many bytes more leave."""
        if self._allowed is not None:
            self._allowed += num_bytes

    def next_frame(self) -> list[bytes | memoryview]:
        """Return the next DATA frame: of one segment, the last one with END."""
        segments = self.segments
        while self._segment + 1 < len(segments) and self._at == len(segments[self._segment]):
            self._segment, self._at = self._segment + 1, 0
        room = self._data_bytes
        if self._allowed is not None:
            room = min(room, self._allowed)
        payload = segments[self._segment][self._at : self._at + room]
        self._at += len(payload)
        self.left_bytes -= len(payload)
        if self._allowed is not None:
            self._allowed -= len(payload)
        flags = 0 if self.left_bytes else _END
        return [data_header(self.stream, self._segment, len(payload), flags), payload]


def data_header(stream: int, segment: int, num_bytes: int, flags: int = 0) -> bytes:
    """Return the header of a DATA frame."""
    return pack_header(num_bytes, _DATA, flags, segment, stream, 0)


class Outbox:
    """Buffers in the order in which they leave."""

    def __init__(self) -> None:
        self.num_bytes = 0  # waiting for `take`, bulk aside
        self.num_bulk_frames = 0  # taken so far
        self._urgent: list[bytes | memoryview] = []
        self._small: list[bytes | memoryview] = []
        self._held: list[bytes | memoryview] = []
        self._held_bodies: list[OutgoingBody] = []
        self._bulk: list[OutgoingBody] = []  # may leave, whose turn it is first
        self._stopped: dict[int, OutgoingBody] = {}  # for want of credit

    @property
    def has_bulk(self) -> bool:
        """Say if a body could go on leaving now."""
        return bool(self._bulk)

    @property
    def has_bodies(self) -> bool:
        """Say if any body has not left yet."""
        return bool(self._bulk or self._stopped)

    def add(self, buffers: Sequence[bytes | memoryview], size: int) -> None:
        """Queue buffers of `size` bytes in all."""
        self._small += buffers
        self.num_bytes += size

    def add_urgent(self, frame: Sequence[bytes | memoryview]) -> None:
        """Queue a frame that overtakes all others."""
        self._urgent += frame
        self.num_bytes += sum(map(len, frame))

    def add_body(self, body: OutgoingBody) -> None:
        """Queue the segments whose head was queued as a small frame."""
        if body.may_leave:
            self._bulk.append(body)
        else:
            self._stopped[body.stream] = body

    def allow(self, stream: int, num_bytes: int) -> None:
        """Let so many bytes more of a stream's body leave, if it has one."""
        stopped = self._stopped.pop(stream, None)
        body = stopped or self._leaving(stream)
        if body is not None:
            body.allow(num_bytes)
        if stopped is not None:
            self._bulk.append(stopped)

    def drop_body(self, stream: int) -> OutgoingBody | None:
        """Forget what has not left of a stream's body, and return it; None if nothing was left."""
        stopped = self._stopped.pop(stream, None)
        leaving = self._leaving(stream)
        if leaving is not None:
            self._bulk.remove(leaving)
        return stopped or leaving

    def _leaving(self, stream: int) -> OutgoingBody | None:
        return next((body for body in self._bulk if body.stream == stream), None)

    def hold(self, buffers: Sequence[bytes | memoryview], body: OutgoingBody | None = None) -> None:
        """Keep buffers, and the body that follows them, until `release`: it is too early."""
        self._held += buffers
        if body is not None:
            self._held_bodies.append(body)

    def release(self) -> None:
        """Queue what was held; nothing overtakes what was queued before: the greeting."""
        self._urgent, self._small = self._urgent + self._small, []
        self.add(self._held, sum(map(len, self._held)))
        self._held = []
        for body in self._held_bodies:
            self.add_body(body)
        self._held_bodies = []

    def clear(self) -> None:
        """Forget what waits."""
        self._urgent, self._small, self.num_bytes = [], [], 0
        self.clear_bulk()

    def clear_bulk(self) -> None:
        """Forget all bodies: nobody would understand a part of one."""
        self._bulk.clear()
        self._stopped.clear()

    def take(self, budget: int | None = None) -> list[bytes | memoryview]:
        """Return what is to be written, in order, small frames joined.

        Nothing but bulk waits then: of that, frames are taken until `budget` bytes are spent (the
        last one may go beyond); None: all that the peer allows.
        """
        waiting = self._small
        if self._urgent:
            waiting = self._urgent + waiting
            self._urgent = []
        self._small, self.num_bytes = [], 0
        if self._bulk:
            self._take_bulk(waiting, budget)
        return waiting if len(waiting) <= 1 else _joined(waiting)

    def _take_bulk(self, waiting: list[bytes | memoryview], budget: int | None) -> None:
        while self._bulk and (budget is None or budget > 0):
            body = self._bulk.pop(0)
            frame = body.next_frame()
            waiting += frame
            self.num_bulk_frames += 1
            if budget is not None:
                budget -= len(frame[1])
            if body.left_bytes:
                self.add_body(body)


def _joined(buffers: list[bytes | memoryview]) -> list[bytes | memoryview]:
    joined: list[bytes | memoryview] = []
    run: list[bytes | memoryview] = []
    for buffer in buffers:
        if len(buffer) <= _JOIN_BYTES:
            run.append(buffer)
            continue
        if run:
            joined.append(b"".join(run))
            run = []
        joined.append(buffer)
    if run:
        joined.append(b"".join(run))
    return joined
