"""A whole run: starts the processes that send, gives them one start, and adds up what they say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import TensorwireError

from tensorwire.loadtest.marks import MarkDone, run_marks
from tensorwire.loadtest.measures import Measures, Span
from tensorwire.loadtest.selfwatch import Own

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tensorwire.loadtest.marks import Mark
    from tensorwire.loadtest.plan import Plan

    Groups = dict[str, dict[str, int]]

_HEAD_START_S = 0.2  # for the start to reach every process before it is due
_LINE_BYTES = 1 << 28  # of one message of a process: all its histograms
_STOP_S = 5.0


class BenchFailed(TensorwireError):
    """No run came about: the server cannot be reached, or a process of ours ended."""


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that a run gave."""

    plan: Plan
    span: Span
    measures: Measures
    own: list[Own] = field(default_factory=list)
    tally: Counter[str] = field(default_factory=Counter)
    marks: list[MarkDone] = field(default_factory=list)


async def run_session(
    plan: Plan,
    marks: Sequence[Mark] = (),
    on_progress: Callable[[float, Groups], None] | None = None,
) -> Run:
    """Run a plan in processes of its own.

    Args:
        plan: what to do.
        marks: commands to run meanwhile.
        on_progress: takes the seconds since the start, and the counts so far of each group.

    Raises:
        BenchFailed: it did not come about.
    """
    async with contextlib.AsyncExitStack() as stack:
        children = [
            await stack.enter_async_context(_Child(plan, number))
            for number in range(plan.processes)
        ]
        await asyncio.gather(*(child.wait_ready() for child in children))
        start = time.monotonic() + _HEAD_START_S
        span = Span(start=start, warmup_s=plan.warmup_s, measured_s=plan.duration_s)
        run = Run(plan=plan, span=span, measures=Measures(span, plan.parsed_slo()))
        marking = asyncio.create_task(run_marks(marks, start, run.marks))
        try:
            board = _Board(start, on_progress)
            results = await asyncio.gather(*(child.run(start, board) for child in children))
        finally:
            marking.cancel()
            await asyncio.gather(marking, return_exceptions=True)
        for result in results:
            run.measures.add(Measures.from_json(span, result["groups"]))
            run.own.append(Own.from_json(result["own"]))
            run.tally.update(result["tally"])
        return run


class _Board:
    """The latest word of each process, added up."""

    def __init__(self, start: float, on_progress: Callable[[float, Groups], None] | None) -> None:
        self._start = start
        self._on_progress = on_progress
        self._latest: dict[int, Groups] = {}

    def put(self, number: int, groups: Groups) -> None:
        self._latest[number] = groups
        if self._on_progress is None:
            return
        whole: dict[str, Counter[str]] = {}
        for said in self._latest.values():
            for name, counts in said.items():
                whole.setdefault(name, Counter()).update(counts)
        added = {name: dict(counts) for name, counts in whole.items()}
        self._on_progress(time.monotonic() - self._start, added)


class _Child:
    """A process that sends."""

    def __init__(self, plan: Plan, number: int) -> None:
        self._plan = plan
        self._number = number
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> _Child:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tensorwire.loadtest.child",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_LINE_BYTES,
        )  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                self._process.terminate()
                async with asyncio.timeout(_STOP_S):
                    await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    async def wait_ready(self) -> None:
        self._tell({"plan": self._plan.to_json(), "number": self._number})
        await self._hear()

    async def run(self, start: float, board: _Board) -> dict[str, Any]:
        self._tell({"start": start})
        while (said := await self._hear())["is"] == "progress":
            board.put(self._number, said["groups"])
        await self._process.wait()
        return said

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            code = await self._process.wait()
            raise BenchFailed(f"a process of the load tester ended with exit code {code}")
        said: dict[str, Any] = json.loads(line)
        if said["is"] == "failed":
            raise BenchFailed(said["message"])
        return said
