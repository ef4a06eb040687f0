"""How often a peer may do what is cheap for it and dear for this side."""

from __future__ import annotations


class Allowance:
    """A token bucket: a burst at once, then so many a second. Pure: `now` comes in.

    Args:
        burst: how many at once, from full.
        per_s: how many come back each second.
    """

    __slots__ = ("_at", "_burst", "_left", "_per_s")

    def __init__(self, burst: float, per_s: float) -> None:
        self._burst, self._per_s = burst, per_s
        self._left = burst
        self._at = 0.0

    def spend(self, now: float) -> bool:
        """Take one at `now` (monotonic s); False if none is left."""
        self._left = min(self._left + (now - self._at) * self._per_s, self._burst)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
