"""How many more events each stream may get, where its client counts them. Pure."""

from __future__ import annotations

MOST = 2**32 - 1  # what the amounts of one stream add up to at most


class CreditBook:
    """Streams that are not in it may get as many as there are."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left: dict[int, int] = {}

    def __contains__(self, stream: int) -> bool:
        return stream in self._left

    def __len__(self) -> int:
        return len(self._left)

    def open(self, stream: int, amount: int | None) -> None:
        """Begin to count a stream's events; None: do not."""
        if amount is not None:
            self._left[stream] = amount

    def add(self, stream: int, amount: int) -> None:
        """Allow more events; without effect on a stream that is not counted."""
        left = self._left.get(stream)
        if left is not None:
            self._left[stream] = min(left + amount, MOST)

    def spend(self, stream: int) -> bool:
        """Take one event's worth; False if there is none."""
        left = self._left.get(stream)
        if left is None:
            return True
        if left == 0:
            return False
        self._left[stream] = left - 1
        return True

    def close(self, stream: int) -> None:
        """Forget a stream that has ended."""
        self._left.pop(stream, None)

    def clear(self) -> None:
        """Forget all of them."""
        self._left.clear()
