"""Is it the server that was measured, or the tool? Numbers about ourselves, and the verdict.

The tool's numbers stand only if it sent on time, had a core to itself, and its event loop ran. The
parent process draws and writes; what is watched here is a process that only sends and receives.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwire.loadtest.histograms import Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping

_TICK_S = 0.02
_CPU_WINDOW_S = 1.0
_SCHEDSTAT = Path("/proc/self/schedstat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the tool may do to the numbers before they say nothing of the server."""

    lag_p99_s: float = 0.010  # a request was sent so late
    loop_p99_s: float = 0.025  # the event loop came so late to what had arrived
    standstill_s: float = 0.250  # it once did nothing for so long
    cpu: float = 0.90  # of one core, in any second
    waiting: float = 0.20  # of the time the process could run, and another one had its core


@dataclass(slots=True, kw_only=True)
class Own:
    """What one process knows about itself, over the measured time."""

    loop_lag: Histogram = field(default_factory=Histogram)
    cpu: float = 0.0  # share of a core, on average
    cpu_most: float = 0.0  # in the worst second
    waiting: float = 0.0  # share of the time spent waiting for a core

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        shares = {"cpu": self.cpu, "cpu_most": self.cpu_most, "waiting": self.waiting}
        return shares | {"loop_lag": self.loop_lag.encode()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Own:
        """Return what `to_json` wrote."""
        return cls(
            loop_lag=Histogram(data["loop_lag"]),
            cpu=data["cpu"],
            cpu_most=data["cpu_most"],
            waiting=data["waiting"],
        )


def judge(own: list[Own], lag: Histogram, unsent: int, bounds: Bounds = Bounds()) -> list[str]:
    """Return why the numbers are not the server's; nothing if they are.

    Args:
        own: of each process.
        lag: from planned to sent, of all requests.
        unsent: requests that were due and were not sent.
        bounds: what is still accepted.
    """
    reasons: list[str] = []
    lag_s = lag.percentile_s(99)
    if lag_s is not None and lag_s > bounds.lag_p99_s:
        reasons.append(
            f"requests were sent late: p99 {_ms(lag_s)}, at most {_ms(bounds.lag_p99_s)}"
        )
    if unsent:
        reasons.append(f"{unsent} requests that were due were not sent: too many were open")
    loop_lag_s = max((process.loop_lag.percentile_s(99) or 0.0 for process in own), default=0.0)
    if loop_lag_s > bounds.loop_p99_s:
        reasons.append(
            f"the event loop was late: p99 {_ms(loop_lag_s)}, at most {_ms(bounds.loop_p99_s)}"
        )
    standstill_s = max((process.loop_lag.max_s for process in own), default=0.0)
    if standstill_s > bounds.standstill_s:
        reasons.append(
            f"the event loop stood still for {_ms(standstill_s)}, "
            f"at most {_ms(bounds.standstill_s)}"
        )
    cpu = max((process.cpu_most for process in own), default=0.0)
    if cpu > bounds.cpu:
        reasons.append(
            f"a process used {cpu:.0%} of its core, at most {bounds.cpu:.0%}: add --processes"
        )
    waiting = max((process.waiting for process in own), default=0.0)
    if waiting > bounds.waiting:
        reasons.append(
            f"others had its core {waiting:.0%} of the time, at most {bounds.waiting:.0%}"
        )
    return reasons


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.4g} ms"


async def watch(own: Own, *, start: float, end: float) -> None:
    """Fill in `own` from monotonic second `start` until `end`."""
    await asyncio.sleep(max(start - time.monotonic(), 0))
    began, cpu_began, waited_began = time.monotonic(), time.process_time(), _waited_s()
    window_began, window_cpu = began, cpu_began
    lags: list[float] = []
    now = began
    while now < end:
        due = now + _TICK_S
        await asyncio.sleep(_TICK_S)
        now = time.monotonic()
        lags.append(max(now - due, 0.0))
        if now - window_began >= _CPU_WINDOW_S:
            cpu = time.process_time()
            own.cpu_most = max(own.cpu_most, (cpu - window_cpu) / (now - window_began))
            window_began, window_cpu = now, cpu
    own.loop_lag.record(lags)
    own.cpu = (time.process_time() - cpu_began) / (now - began)
    own.cpu_most = max(own.cpu_most, own.cpu)
    own.waiting = (_waited_s() - waited_began) / (now - began)


def _waited_s() -> float:
    """Return how long this process could have run and did not; 0 where nobody counts that."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
