"""What clients that do not read may cost: one of them, and all of them together. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from tensorwire_protocol.limits import Limits

T = TypeVar("T")


class SharedBytes(Generic[T]):
    """Bytes that many hold together; above the limit, whoever holds most is given up first."""

    def __init__(self, limit_bytes: int) -> None:
        self.num_bytes = 0
        self._limit_bytes = limit_bytes
        self._held: dict[T, int] = {}

    def add(self, holder: T, num_bytes: int) -> None:
        """Take note that a holder has so many more, or (below 0) fewer."""
        self._held[holder] = self._held.get(holder, 0) + num_bytes
        self.num_bytes += num_bytes

    def forget(self, holder: T) -> None:
        """Take note that a holder has none any more."""
        self.num_bytes -= self._held.pop(holder, 0)

    def take_largest(self) -> T | None:
        """Forget the largest holder and return it, if there is more than the limit."""
        if self.num_bytes <= self._limit_bytes:
            return None
        largest = max(self._held, key=self._held.__getitem__)
        self.forget(largest)
        return largest

    def check_invariants(self) -> None:
        """The sum is that of the parts, and nobody holds less than nothing."""
        assert self.num_bytes == sum(self._held.values())
        assert min(self._held.values(), default=0) >= 0


class ReadWatch:
    """Notices that a client does not read: what waited is still not gone after a while.

    A slow client that goes on reading is not meant, however long the whole takes.
    """

    __slots__ = ("_mark_bytes", "_since")

    def __init__(self) -> None:
        self._since: float | None = None  # monotonic s; None: not too much waits
        self._mark_bytes = 0  # so many must be gone for patience to begin anew

    def is_stuck(self, limits: Limits, *, written: int, unsent: int, now: float) -> bool:
        """Say if the patience is over at `now`.

        Args:
            written: bytes that were ever handed to the socket's queue.
            unsent: how many of them are still in it.
        """
        if unsent <= limits.send_high_water_bytes:
            self._since = None
        elif self._since is None or written - unsent >= self._mark_bytes:
            self._since, self._mark_bytes = now, written
        return self._since is not None and now - self._since >= limits.send_stuck_s
