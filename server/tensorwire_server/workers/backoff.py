"""How long to wait before a dead worker is started again, decided purely."""

from __future__ import annotations

from collections import deque

_FIRST_S = 0.1
_LONGEST_S = 10.0
_HEALTHY_AFTER_S = 30.0
_WINDOW_S = 60.0
_DEATHS_IN_WINDOW = 5
_BREAKER_S = 30.0


class RestartPolicy:
    """Doubles the wait from death to death, forgives after health, opens a breaker for a series."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque()
        self._doublings = 0
        self.is_breaker_open = False  # after the latest death

    def after_death(self, now: float, *, lived_s: float) -> float:
        """Return the wait (s) after a death at `now` (monotonic s)."""
        self._deaths.append(now)
        while now - self._deaths[0] > _WINDOW_S:
            self._deaths.popleft()
        self.is_breaker_open = len(self._deaths) > _DEATHS_IN_WINDOW
        if lived_s >= _HEALTHY_AFTER_S:
            self._doublings = 0
        wait_s = min(_FIRST_S * 2.0**self._doublings, _LONGEST_S)
        self._doublings = min(self._doublings + 1, 16)
        return _BREAKER_S if self.is_breaker_open else wait_s
