"""One process's share of a run: the driver, its target, and the watch over itself."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from tensorwire.loadtest.arrivals import Closed
from tensorwire.loadtest.driver import Share, drive_closed, drive_open
from tensorwire.loadtest.measures import Measures, Span
from tensorwire.loadtest.outcomes import Outcome
from tensorwire.loadtest.request_log import RequestLog
from tensorwire.loadtest.selfwatch import Own, watch
from tensorwire.loadtest.workloads import BYSTANDER, LOAD, Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire.loadtest.driver import Perform
    from tensorwire.loadtest.measures import Group
    from tensorwire.loadtest.plan import Plan
    from tensorwire.loadtest.targets import Target

UNFINISHED = "UNFINISHED"  # nothing came until the run was over, and long after
_DRAIN_EXTRA_S = 2.0  # beyond the timeout, after which the client itself gives up


class Runner:
    """Sends its share of a plan to a target, and measures."""

    def __init__(self, plan: Plan, target: Target, share: Share, start: float) -> None:
        self._plan = plan
        self._target = target
        self._share = share
        self.span = Span(start=start, warmup_s=plan.warmup_s, measured_s=plan.duration_s)
        self.measures = Measures(self.span, plan.parsed_slo())
        self.own = Own()
        self._num_open: Counter[str] = Counter()
        self._log = RequestLog(plan.log) if plan.log else None

    async def run(self) -> dict[str, Any]:
        """Wait for the start, send everything, and return what was measured, as JSON carries it."""
        # A collection stops the loop for as long as there are objects: what exists already stays.
        gc.collect()
        gc.freeze()
        span = self.span
        watching = asyncio.create_task(
            watch(self.own, start=span.start + span.warmup_s, end=span.start + span.total_s)
        )
        await asyncio.sleep(max(span.start - time.monotonic(), 0))
        drives = [self._drive_load()]
        if self._share.number == 0:
            drives.append(self._drive_bystander())
        unfinished = sum(await asyncio.gather(*drives))
        await watching
        rechecked = await self._target.recheck()
        for group, faults in rechecked:
            self.measures.take_faults(group, faults)
        if self._log is not None:
            self._log.close()
        return {
            "groups": self.measures.to_json(),
            "own": self.own.to_json(),
            "tally": dict(
                Counter(self._target.tally())
                + Counter(unfinished=unfinished, rechecked=len(rechecked))
            ),
        }

    async def _drive_load(self) -> int:
        plan, span = self._plan, self.span
        arrivals, drain_s = plan.parsed_arrivals(), plan.timeout_s + _DRAIN_EXTRA_S
        perform = self._perform(Workload(plan.workload()))
        if isinstance(arrivals, Closed):
            return await drive_closed(
                arrivals.users,
                perform,
                start=span.start,
                duration_s=span.total_s,
                clock=time.monotonic,
                share=self._share,
                drain_s=drain_s,
            )
        return await drive_open(
            arrivals.offsets(plan.seed, span.total_s),
            perform,
            start=span.start,
            clock=time.monotonic,
            sleep=asyncio.sleep,
            share=self._share,
            on_unsent=lambda planned_s: self.measures.take_unsent(LOAD, planned_s),
            drain_s=drain_s,
        )

    async def _drive_bystander(self) -> int:
        bystander = self._plan.bystander()
        if bystander is None:
            return 0
        arrivals, spec = bystander
        return await drive_open(
            arrivals.offsets(spec.seed, self.span.total_s),
            self._perform(Workload(spec)),
            start=self.span.start,
            clock=time.monotonic,
            sleep=asyncio.sleep,
            on_unsent=lambda planned_s: self.measures.take_unsent(BYSTANDER, planned_s),
            drain_s=self._plan.timeout_s + _DRAIN_EXTRA_S,
        )

    def _perform(self, workload: Workload) -> Perform:
        start = self.span.start

        async def perform(index: int, planned_s: float) -> None:
            outcome = Outcome(workload.ask(index), start, planned_s, time.monotonic())
            self._num_open[outcome.ask.group] += 1
            try:
                await self._target.perform(outcome)
            except asyncio.CancelledError:
                outcome.status, outcome.has_end = UNFINISHED, False
                raise
            finally:
                outcome.ended_at = outcome.ended_at or time.monotonic()
                self._take(outcome)

        return perform

    def _take(self, outcome: Outcome) -> None:
        self._num_open[outcome.ask.group] -= 1
        self.measures.take(outcome)
        if self._log is not None:
            self._log.take(outcome)

    async def report(self, say: Callable[[dict[str, Any]], None], every_s: float = 1.0) -> None:
        """Say every now and then how far it is; until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            groups = self.measures.groups.items()
            say({name: {**progress(group), "open": self._num_open[name]} for name, group in groups})


def progress(group: Group) -> dict[str, int]:
    """Return how much there was so far."""
    return {name: sum(counts.values()) for name, counts in group.seconds.items()}
