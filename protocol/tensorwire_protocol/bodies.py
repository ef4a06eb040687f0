"""Bodies: messages too large for one frame, whose segments follow their head as DATA frames.

    head with BODY ──admitted──▶ RECEIVING ──DATA with END──▶ the message
                        │            │ CANCEL, too slow
                        │ refused    ▼
                        └───────▶ DISCARDED ──DATA with END──▶ forgotten

Memory is asked for with the sizes of the head, before any of it is spent. Where there is none at
present, what the peer sends without credit waits in a window of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tensorwire_protocol.errors import Flood, SequenceError
from tensorwire_protocol.tensors import aligned_buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tensorwire_protocol.frames import Frame
    from tensorwire_protocol.messages import Message

# Bodies in DATA frames, and byte credit for those that a client sends.
FEATURE_BODY = "body"
# On a worker link within one machine: segments stay where they are, in shared memory.
FEATURE_SHM = "shm"
SHARED_BYTES = 64 * 1024  # a message this large is shared; below, a copy is cheaper
# A larger message leaves as a body where it can: it lands in place, a frame is copied there.
BODY_BYTES = 256 * 1024
WINDOW_BYTES = 1024 * 1024  # of a body that may come without credit


class Reservation(Protocol):
    """Memory for one body."""

    @property
    def segments(self) -> list[memoryview] | None:
        """Where each segment goes, aligned to 64; None while there is no memory."""

    def cancel(self) -> None:
        """Nobody waits for the memory any more; what was given is given back by its last user."""


class Memory(Protocol):
    """Where bodies land.

    Only a side that meters what comes, a server, may make a body wait: no other can say so.
    """

    def reserve(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> Reservation:
        """Return memory for segments of these lengths; `on_ready` is called if it comes later.

        Raises:
            TooLarge: it can never be had.
            Busy: too many wait for memory already.
        """


class Sharing(Protocol):
    """Memory that two processes of one machine have in common.

    Attributes:
        on_returns: to be called with the loans whose memory is not used here any more.
    """

    on_returns: Callable[[list[int]], None]

    def lend(self, segments: Sequence[memoryview]) -> dict[str, Any] | None:
        """Return what SHM says of where segments lie; None: they cannot be shared."""

    def take_back(self, loans: Sequence[Any]) -> None:
        """Let go of loans that the peer is done with."""

    def borrow(self, places: Mapping[str, Any], lengths: Sequence[int]) -> list[memoryview]:
        """Return the segments that SHM speaks of.

        Raises:
            BadFraming: they cannot lie there.
        """

    def close(self) -> None:
        """The peer is gone."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A reservation that never waits."""

    segments: list[memoryview]

    def cancel(self) -> None:
        """Nothing: memory goes with its last user."""


class FreshMemory:
    """New memory for each segment."""

    def reserve(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> Reservation:
        """Return memory at once."""
        return Placed([aligned_buffer(length) for length in lengths])


class IncomingBody:
    """One message whose segments arrive; the sink of its DATA frames.

    Args:
        lengths: of its segments.
        allowed: how many bytes may come before more is allowed; None: all.
        now: monotonic seconds.
    """

    def __init__(
        self, stream: int, lengths: Sequence[int], now: float, *, allowed: int | None
    ) -> None:
        self.stream = stream
        self.lengths = lengths
        self.began_at = now
        self.num_bytes = sum(lengths)
        self.message: Message | None = None  # decoded; its arrays fill up
        self.head: Frame | None = None  # not decoded yet, for want of memory
        self.is_discarded = False
        self.reservation: Reservation | None = None
        self.held_bytes = 0  # of memory that is counted elsewhere
        self.due_at: float | None = None  # when all of it must be here
        self._allowed = allowed
        self._late_bytes = 0  # of a discarded body, that may have been on their way
        self._announced = 0  # bytes of DATA frames whose headers have come
        self._places: Sequence[memoryview] | None = None
        self._segment = self._at = 0
        self._skip_full()

    def place(self, places: Sequence[memoryview]) -> None:
        """Say where the segments go; what came before is copied there."""
        old, self._places = self._places, places
        for before, now in zip(old or (), places, strict=False):
            now[: len(before)] = before

    def allow(self, num_bytes: int) -> None:
        """Let so many bytes more come."""
        if self._allowed is not None:
            self._allowed += num_bytes

    def discard(self) -> None:
        """Give the memory back; what still comes is thrown away."""
        if not self.is_discarded:
            rest = self.num_bytes if self._allowed is None else min(self._allowed, self.num_bytes)
            self._late_bytes = rest - self._announced
        self.is_discarded = True
        if self.reservation is not None:
            self.reservation.cancel()
        self.reservation = self._places = self.message = self.head = None

    # -- DATA ---------------------------------------------------------------------------------

    def is_waste(self, num_bytes: int) -> bool:
        """Say if a DATA frame of a discarded body is more than its sender could owe it."""
        self._late_bytes -= num_bytes
        return self._late_bytes < 0 or not num_bytes

    def announce(self, segment: int, num_bytes: int, *, is_last: bool) -> None:
        """Take note of a DATA frame that begins.

        Raises:
            SequenceError, Flood: it is not due.
        """
        if self.is_discarded:
            return
        left = self.num_bytes - self._announced - num_bytes
        if segment != self._segment or num_bytes > self.lengths[segment] - self._at:
            raise SequenceError(
                f"DATA of {num_bytes} bytes for segment {segment} of stream {self.stream}; due are"
                f" {self.lengths[self._segment] - self._at} bytes of segment {self._segment}"
            )
        if is_last != (left == 0) or (num_bytes == 0 and not is_last):
            raise SequenceError(f"the body of stream {self.stream} ended with {left} bytes missing")
        self._announced += num_bytes
        if self._allowed is not None and self._announced > self._allowed:
            raise Flood(f"the body of stream {self.stream} has {self._allowed} bytes of credit")

    def room(self, num_bytes: int) -> memoryview | None:
        """Return where the next bytes go."""
        if self._places is None:
            return None
        return self._places[self._segment][self._at : self._at + num_bytes]

    def took(self, num_bytes: int) -> None:
        """Go on behind so many bytes."""
        if not self.is_discarded:
            self._at += num_bytes
            self._skip_full()

    def _skip_full(self) -> None:
        lengths = self.lengths
        while self._segment + 1 < len(lengths) and self._at == lengths[self._segment]:
            self._segment, self._at = self._segment + 1, 0


def early_places(lengths: Sequence[int]) -> list[memoryview]:
    """Return memory for the part of a body that may come without credit."""
    left = WINDOW_BYTES
    places = []
    for length in lengths:
        places.append(aligned_buffer(min(length, left)))
        left -= len(places[-1])
    return places
