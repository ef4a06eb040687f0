"""An event loop whose clock jumps to the next timer, and a queue with one server to ask on it."""

from __future__ import annotations

import asyncio
from decimal import Decimal, getcontext
from math import factorial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing waits: when nobody has anything to do, it is later."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run_virtually(main: Coroutine[Any, Any, Any]) -> Any:
    """Run `main` on a virtual loop that begins at 0."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class OneServer:
    """Serves one at a time, in order, each for the same time: the D and the 1 of M/D/1."""

    def __init__(self, service_s: float) -> None:
        self._service_s = service_s
        self._free_at = 0.0

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._free_at = max(self._free_at, loop.time()) + self._service_s
        await asyncio.sleep(self._free_at - loop.time())


def md1_percentile(load: float, percent: float) -> float:
    """Return a percentile of the time in an M/D/1 system, in units of the service time.

    Erlang's formula for the distribution of the wait; its terms alternate and grow, so it is
    evaluated in numbers of 60 digits.
    """
    getcontext().prec = 60
    rate, share = Decimal(str(load)), Decimal(str(percent)) / 100
    low, high = Decimal(0), Decimal(60)
    if _waits_at_most(low, rate) >= share:
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _waits_at_most(middle, rate) < share else (low, middle)
    return float(high) + 1


def _waits_at_most(wait: Decimal, rate: Decimal) -> Decimal:
    total = (rate * wait).exp()
    for k in range(1, int(wait) + 1):
        x = rate * (k - wait)
        total += x**k / factorial(k) * (-x).exp()
    return (1 - rate) * total
