"""Dynamic batching of items that are answered once: by count, by tokens and by age."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from tensorwire_server.scheduling.continuous import WaitingFull

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[T]):
    item: T
    cost_tokens: int
    arrived_at: float


class MicroBatcher(Generic[T]):
    """A bounded queue that is due when a batch is full, or when its oldest item is.

    Args:
        max_items: items of one batch.
        max_tokens: the sum of `cost_tokens` in one batch; one item alone may cost more.
        max_wait_s: the longest an item is held back in the hope of company.
        max_waiting: items queued at most.
    """

    def __init__(
        self, *, max_items: int, max_tokens: int, max_wait_s: float, max_waiting: int
    ) -> None:
        if max_items < 1 or max_tokens < 1 or max_waiting < 1 or max_wait_s < 0:
            raise ValueError(
                f"bounds out of range: {max_items=} {max_tokens=} {max_wait_s=} {max_waiting=}"
            )
        self._max_items = max_items
        self._max_tokens = max_tokens
        self._max_wait_s = max_wait_s
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting[T]] = deque()
        self._waiting_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: T, cost_tokens: int, now: float) -> None:
        """Queue an item that arrived at `now` (monotonic s).

        Raises:
            WaitingFull: the queue is at its bound.
        """
        if len(self._waiting) >= self._max_waiting:
            raise WaitingFull(queued=len(self._waiting), limit=self._max_waiting)
        self._waiting.append(_Waiting(item, cost_tokens, now))
        self._waiting_tokens += cost_tokens

    def take(self, now: float) -> list[T]:
        """Return the batch due at `now`, oldest first, or an empty list."""
        due = self.next_due()
        return self._pop_batch() if due is not None and due <= now else []

    def next_due(self) -> float | None:
        """Return from when on `take` gives a batch; None while nothing waits.

        A time that has passed already, if the batch is full.
        """
        if not self._waiting:
            return None
        full = len(self._waiting) >= self._max_items or self._waiting_tokens >= self._max_tokens
        return self._waiting[0].arrived_at + (0.0 if full else self._max_wait_s)

    def remove(self, matches: Callable[[T], bool]) -> list[T]:
        """Take items out of the queue without running them; returns them."""
        gone: list[T] = []
        for _ in range(len(self._waiting)):  # once around: the rest keeps its order
            waiting = self._waiting.popleft()
            if matches(waiting.item):
                self._waiting_tokens -= waiting.cost_tokens
                gone.append(waiting.item)
            else:
                self._waiting.append(waiting)
        return gone

    def check_invariants(self) -> None:
        """Fail if the books disagree."""
        assert len(self._waiting) <= self._max_waiting
        assert self._waiting_tokens == sum(waiting.cost_tokens for waiting in self._waiting)

    def _pop_batch(self) -> list[T]:
        batch: list[T] = []
        tokens = 0
        while self._waiting and len(batch) < self._max_items:
            tokens += self._waiting[0].cost_tokens
            if batch and tokens > self._max_tokens:
                break
            waiting = self._waiting.popleft()
            self._waiting_tokens -= waiting.cost_tokens
            batch.append(waiting.item)
        return batch
