"""When which request is out of time: a heap that forgets the finished ones."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Container

_push: Final = heapq.heappush  # a name that compiled code need not look up
_SLACK: Final = 64


class Deadlines:
    """Deadlines of open requests by id.

    Nearly all requests finish long before their time, so finishing costs nothing here: `open_ids`
    is asked when an entry surfaces, and when the heap has outgrown the living.
    """

    def __init__(self, open_ids: Container[int]) -> None:
        self._open_ids = open_ids
        self._heap: list[tuple[float, int]] = []
        self._compact_at = _SLACK

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, at: float, request_id: int) -> bool:
        """Note a deadline (monotonic s); says whether it is the earliest."""
        _push(self._heap, (at, request_id))
        if len(self._heap) > self._compact_at:
            self._heap = [entry for entry in self._heap if entry[1] in self._open_ids]
            heapq.heapify(self._heap)
            self._compact_at = 2 * len(self._heap) + _SLACK
        return bool(self._heap) and self._heap[0][1] == request_id

    def take_due(self, now: float) -> list[int]:
        """Return the open requests whose time is over."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            _, request_id = heapq.heappop(self._heap)
            if request_id in self._open_ids:
                due.append(request_id)
        return due

    def next_due(self) -> float | None:
        """Return the earliest deadline of an open request."""
        while self._heap and self._heap[0][1] not in self._open_ids:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
