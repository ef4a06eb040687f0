"""An event loop whose timers are exact to microseconds.

epoll waits whole milliseconds, rounded up: each send would be up to a millisecond late, and the
latency of a fast server would be the timer's. select() takes microseconds, and can wait for epoll's
own descriptor.
"""

from __future__ import annotations

import asyncio
import select
import selectors
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selectors import SelectorKey

if sys.platform == "linux":

    class _PreciseSelector(selectors.EpollSelector):
        def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
            if timeout is not None and timeout > 0:
                select.select([self.fileno()], [], [], timeout)
                timeout = 0
            return super().select(timeout)
else:  # kqueue waits exactly as it is
    _PreciseSelector = selectors.DefaultSelector


def new_precise_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop."""
    return asyncio.SelectorEventLoop(_PreciseSelector())
