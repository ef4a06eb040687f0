"""Deadlines of many requests on one timer."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final, Protocol

_push: Final = heappush
_REBUILD_ABOVE: Final = 64  # numbers in the heap; a short heap costs nothing


class Expiring(Protocol):
    """What can have a deadline."""

    def on_deadline(self) -> None:
        """The deadline has passed."""


class Deadlines:
    """A heap of deadlines. Pure: `now` is an argument, the driver calls `expire` in time.

    What was forgotten leaves its number in the heap until its deadline: taking it out would cost
    more than passing over it, but a heap mostly of such numbers is rebuilt.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._items: dict[int, Expiring] = {}  # by their numbers in the heap
        self._last = 0  # number given

    def __len__(self) -> int:
        return len(self._items)

    def add(self, deadline: float, item: Expiring) -> int:
        """Call `item.on_deadline` at the first `expire` from `deadline` on; return its number."""
        self._last = number = self._last + 1
        self._items[number] = item
        _push(self._heap, (deadline, number))
        return number

    def forget(self, number: int) -> None:
        """Let go of an item; does nothing if its deadline has passed."""
        self._items.pop(number, None)
        if len(self._heap) > max(_REBUILD_ABOVE, 2 * len(self._items)):
            self._heap = [entry for entry in self._heap if entry[1] in self._items]
            heapify(self._heap)

    def expire(self, now: float) -> None:
        """Tell everything whose deadline has passed, the earliest first."""
        while self._heap and self._heap[0][0] <= now:
            item = self._items.pop(heappop(self._heap)[1], None)
            if item is not None:
                item.on_deadline()

    def next_due(self) -> float | None:
        """Return the earliest deadline that `expire` has to be called at; None: there is none."""
        while self._heap and self._heap[0][1] not in self._items:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def check_invariants(self) -> None:
        """Every item has its number in the heap, and the heap is at most twice as long."""
        assert self._items.keys() <= {number for _, number in self._heap}
        assert len(self._heap) <= max(_REBUILD_ABOVE, 2 * len(self._items)) + 1
