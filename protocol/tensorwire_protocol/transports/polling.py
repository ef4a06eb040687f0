"""Looking for input for a moment instead of sleeping at once: busy polling.

To put a process to sleep and wake it takes tens of microseconds, more than a small request needs in
it. So after output whose answer is near, a loop stays awake for a moment. Hypervisors do the same
before they let an idle processor go (halt polling), and as they do, it stops where it does not pay.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

# An answer so many windows after output is near: had both sides been awake, it would have come
# within one.
_NEAR_WINDOWS: Final = 3
_PATIENCE: Final = 8  # outputs in a row without a near answer, then polling stops
# Whoever else wants the processor gets it; Windows has no such call.
_give_way: Final = getattr(os, "sched_yield", lambda: None)


class BusyPoll:
    """Keeps one event loop awake; its transports share it.

    Args:
        window_s: how long after output; 0: never.
        is_free: says if this process has nothing better to do.
        now: seconds; a loop's own time may have a resolution of 1 ms.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        window_s: float,
        is_free: Callable[[], bool] = lambda: True,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.window_s = window_s
        self.now = now
        self.is_looking = False
        self._loop = loop
        self._is_free = is_free
        self._until = 0.0

    def look_until(self, moment: float) -> None:
        """Stay awake until then."""
        self._until = moment
        if not self.is_looking:
            self.is_looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        # What waits to be called makes the loop ask for input without sleeping.
        if self.now() < self._until and self._is_free():
            _give_way()
            self._loop.call_soon(self._look)
        else:
            self.is_looking = False


class AnswerWatch:
    """Decides for one connection if its loop stays awake: if answers come soon after output."""

    def __init__(self, poll: BusyPoll) -> None:
        self._poll = poll
        self._sent_at = 0.0
        self._is_answered = True
        self._num_late = 0  # outputs in a row without a near answer

    def note_output(self) -> None:
        """Output left: look for its answer, if the last ones had one."""
        now = self._poll.now()
        self._num_late = 0 if self._is_answered else self._num_late + 1
        self._is_answered = False
        self._sent_at = now
        if self._num_late < _PATIENCE:
            self._poll.look_until(now + self._poll.window_s)

    def note_input(self) -> None:
        """Input came, whatever it answers."""
        if self._poll.now() - self._sent_at < _NEAR_WINDOWS * self._poll.window_s:
            self._is_answered = True
