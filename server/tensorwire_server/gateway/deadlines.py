"""Deadlines of many requests on one timer."""

from __future__ import annotations

import heapq
import itertools
from typing import Protocol


class Expiring(Protocol):
    """What can have a deadline."""

    @property
    def is_closed(self) -> bool: ...

    def on_deadline(self) -> None:
        """The deadline has passed."""


class Deadlines:
    """A heap of deadlines. Pure: `now` is an argument, the driver calls `expire` in time.

    What has ended stays in the heap until its deadline: taking it out would cost more than
    passing over it, but a heap mostly of ended requests is rebuilt.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Expiring]] = []
        self._order = itertools.count()
        self._num_closed = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_closed

    def add(self, deadline: float, item: Expiring) -> None:
        """Call `item.on_deadline` at the first `expire` not before `deadline`."""
        heapq.heappush(self._heap, (deadline, next(self._order), item))

    def forget_one(self) -> None:
        """Say that one item with a deadline has closed."""
        self._num_closed += 1
        if self._num_closed * 2 > len(self._heap) > 64:
            self._heap = [entry for entry in self._heap if not entry[2].is_closed]
            heapq.heapify(self._heap)
            self._num_closed = 0

    def expire(self, now: float) -> None:
        """Tell everything whose deadline has passed."""
        while self._heap and self._heap[0][0] <= now:
            item = heapq.heappop(self._heap)[2]
            if item.is_closed:
                self._num_closed = max(0, self._num_closed - 1)
            else:
                item.on_deadline()
