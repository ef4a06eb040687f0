"""The client half of every side: jobs come on stdin, are done in a closed loop, figures go out.

Imports nothing but the standard library and uvloop: the peers' environment runs it too.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import uvloop

Call = Callable[[], Awaitable[int]]  # one request; returns the units it brought

_WARM_S = 0.1
now = time.perf_counter


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one side does for a while."""

    kind: str  # "text", "array" or "tensor" echoed; "tokens" streamed; "blocking" text
    connections: int = 1
    depth: int = 1  # requests in flight on each connection
    size_bytes: int = 64  # of what is echoed
    tokens: int = 0  # of one stream
    seconds: float = 0.3  # no request begins later
    watch: dict[str, list[int]] = field(default_factory=dict)  # processes by role, for CPU time


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What came of a job."""

    units: int  # requests, or tokens
    seconds: float
    p50_us: float  # of a request
    p99_us: float
    cpu_us: dict[str, float]  # for each unit, by role


class Window:
    """The measured time: counts units, and the CPU of the processes watched."""

    def __init__(self, job: Job, seconds: float) -> None:
        self._watch = {"client": [os.getpid()], **job.watch}
        self._cpu_s = self._read()
        self._units = 0
        self._latencies_s: list[float] = []
        self._began = now()
        self.ends_at = self._began + seconds

    def add(self, units: int, latency_s: float) -> None:
        """Note a finished request."""
        self._units += units
        self._latencies_s.append(latency_s)

    def figures(self) -> Figures:
        """Return what was measured until now."""
        seconds = now() - self._began
        spent = {role: after - self._cpu_s[role] for role, after in self._read().items()}
        latencies = sorted(self._latencies_s)
        return Figures(
            units=self._units,
            seconds=seconds,
            p50_us=latencies[len(latencies) // 2] * 1e6,
            p99_us=latencies[len(latencies) * 99 // 100] * 1e6,
            cpu_us={role: cpu_s / self._units * 1e6 for role, cpu_s in spent.items()},
        )

    def _read(self) -> dict[str, float]:
        return {role: sum(map(cpu_s, pids)) for role, pids in self._watch.items()}


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that the living threads of a process have used."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        total_ns += int(task.read_text().split()[0])
    return total_ns / 1e9


async def measure(connect: Callable[[Job], AbstractAsyncContextManager[Call]], job: Job) -> Figures:
    """Keep `depth` requests in flight on each of the connections."""
    async with AsyncExitStack() as stack:
        calls = [await stack.enter_async_context(connect(job)) for _ in range(job.connections)]
        await _keep_busy(calls, job.depth, Window(job, _WARM_S))
        window = Window(job, job.seconds)
        await _keep_busy(calls, job.depth, window)
        return window.figures()


async def _keep_busy(calls: list[Call], depth: int, window: Window) -> None:
    async def repeat(call: Call) -> None:
        began = now()
        while began < window.ends_at:
            units = await call()
            ended = now()
            window.add(units, ended - began)
            began = ended

    await asyncio.gather(*[repeat(call) for call in calls for _ in range(depth)])


def measure_blocking(call: Callable[[], object], job: Job) -> Figures:
    """Do one request after the other on this thread."""
    for seconds in (_WARM_S, job.seconds):
        window = Window(job, seconds)
        began = now()
        while began < window.ends_at:
            call()
            ended = now()
            window.add(1, ended - began)
            began = ended
    return window.figures()


def do_jobs(do: Callable[[Job], Figures]) -> None:
    """Do jobs until stdin ends."""
    for line in sys.stdin:
        print(json.dumps(asdict(do(Job(**json.loads(line))))), flush=True)


def new_runner() -> asyncio.Runner:
    """Return a fresh event loop of the kind that all sides use."""
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)
