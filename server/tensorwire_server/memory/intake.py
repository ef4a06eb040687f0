"""Where large requests land: in one slab, within its size; who finds no room waits in line."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from tensorwire_protocol.errors import Busy, TooLarge
from tensorwire_protocol.tensors import padding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire_server.memory.slab import Slab

MAX_WAITING = 64  # each holds up to a mebibyte that has come without being asked for
RETRY_AFTER_MS = 200
_IDLE_S = 30.0


class Place:
    """Memory for one request, as soon as there is some; a `Reservation`."""

    __slots__ = ("is_cancelled", "lengths", "num_bytes", "on_ready", "segments")

    def __init__(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> None:
        self.lengths = lengths
        self.num_bytes = sum(length + padding(length) for length in lengths)
        self.segments: list[memoryview] | None = None
        self.is_cancelled = False
        self.on_ready = on_ready

    def fill(self, block: memoryview) -> None:
        """Cut a block into segments, each aligned."""
        self.segments = []
        at = 0
        for length in self.lengths:
            self.segments.append(block[at : at + length])
            at += length + padding(length)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.is_cancelled = True
        self.segments = None


class IntakeMemory:
    """The `Memory` of all client connections of a gateway; runs on its event loop."""

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        self._waiting: deque[Place] = deque()
        self._loop = asyncio.get_running_loop()
        self._serve_is_due = False
        self._idle_since: float | None = None
        slab.on_freed = self._on_freed

    @property
    def num_used_bytes(self) -> int:
        """Bytes that are given out."""
        return self._slab.num_used_bytes

    @property
    def num_waiting(self) -> int:
        """Requests that wait for memory."""
        return sum(not place.is_cancelled for place in self._waiting)

    def reserve(self, lengths: Sequence[int], on_ready: Callable[[], None]) -> Place:
        """Return memory, or a place in line.

        Raises:
            TooLarge: there can never be as much.
            Busy: the line is full.
        """
        place = Place(lengths, on_ready)
        if place.num_bytes > self._slab.size:
            raise TooLarge(
                f"the arrays need {place.num_bytes} bytes of memory; the server has"
                f" {self._slab.size} for all requests (bodies.memory_bytes)"
            )
        if not self._serve(place):
            if self.num_waiting >= MAX_WAITING:
                raise Busy(
                    f"{MAX_WAITING} large requests wait for memory; try again",
                    retry_after_ms=RETRY_AFTER_MS,
                )
            self._waiting.append(place)
        return place

    def _serve(self, place: Place) -> bool:
        # Whoever waits comes first: or a stream of small ones would keep a large one out for ever.
        if self._waiting and self._waiting[0] is not place:
            return False
        block = self._slab.allocate(place.num_bytes)
        if block is not None:
            place.fill(block)
        return block is not None

    def _on_freed(self) -> None:
        # From a finalizer, which may run anywhere.
        if self._waiting and not self._serve_is_due:
            self._serve_is_due = True
            self._loop.call_soon_threadsafe(self._serve_waiting)

    def _serve_waiting(self) -> None:
        self._serve_is_due = False
        while self._waiting:
            place = self._waiting[0]
            if not place.is_cancelled and not self._serve(place):
                return
            self._waiting.popleft()
            if not place.is_cancelled:
                place.on_ready()

    def on_timer(self, now: float) -> None:
        """Let time pass: memory that nobody has used for a while goes back to the kernel."""
        if self._slab.num_used_bytes:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= _IDLE_S:
            self._slab.trim()
