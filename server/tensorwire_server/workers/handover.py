"""From a thread to the asyncio side: what gathers while that side is busy arrives together."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

T = TypeVar("T")


class Handover(Generic[T]):
    """Wakes the loop once for all values that wait for it.

    Args:
        take: gets them on the loop, in order; never none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, take: Callable[[list[T]], None]) -> None:
        self._loop = loop
        self._take = take
        self._waiting: deque[T] = deque()
        self._is_due = False

    def put(self, value: T) -> None:
        """Hand over a value; called on the thread."""
        self._waiting.append(value)
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before looking: whoever puts something behind the last one taken calls again.
        self._is_due = False
        values = []
        while self._waiting:
            values.append(self._waiting.popleft())
        if values:
            self._take(values)
