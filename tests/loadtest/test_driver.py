"""The driver, in virtual time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from tensorwire.loadtest.arrivals import Steady
from tensorwire.loadtest.driver import Share, drive_closed, drive_open
from tensorwire.loadtest.histograms import PERCENTILES
from tensorwire.loadtest.measures import Measures, Span
from tensorwire.loadtest.outcomes import Outcome
from tensorwire.loadtest.workloads import Ask

from .virtual_time import OneServer, md1_percentile, run_virtually

if TYPE_CHECKING:
    from collections.abc import Iterable

SERVICE_S = 0.02


async def measured(load: float) -> Measures:
    """Return what the driver and the measures make of an M/D/1 server."""
    loop = asyncio.get_running_loop()
    span = Span(start=0.0, warmup_s=20.0, measured_s=NUM_REQUESTS[load] * SERVICE_S / load)
    measures, server = Measures(span), OneServer(SERVICE_S)

    async def perform(index: int, planned_s: float) -> None:
        outcome = Outcome(Ask(index=index, task="infer", model="m"), 0.0, planned_s, loop.time())
        await server.serve()
        outcome.ended_at = loop.time()
        measures.take(outcome)

    offsets = Steady(rate_per_s=load / SERVICE_S, cv=1).offsets(1, span.total_s)
    await drive_open(offsets, perform, start=0.0, clock=loop.time, sleep=asyncio.sleep)
    return measures


# Requests wait in bursts, the more the higher the load: the p99.9 of so many is itself only known
# to about 2 %. The seed is the first that was tried; for any seed it would take ten times as many.
NUM_REQUESTS = {0.3: 100_000, 0.6: 300_000, 0.8: 300_000}


@pytest.mark.slow
@pytest.mark.parametrize("load", NUM_REQUESTS)
def test_every_percentile_of_a_simulated_m_d_1_server_is_what_theory_says(load: float) -> None:
    group = run_virtually(measured(load)).groups["load"]
    assert group.whole("e2e").count == pytest.approx(NUM_REQUESTS[load], rel=0.01)
    for percent in PERCENTILES:
        theory_s = md1_percentile(load, percent) * SERVICE_S
        assert group.whole("e2e").percentile_s(percent) == pytest.approx(theory_s, rel=0.02), (
            percent
        )
    assert group.whole("lag").max_s == 0


def run_open(offsets: Iterable[float], service_s: float, **options: Any) -> list[tuple[int, float]]:
    """Return index and time of each send."""
    sent: list[tuple[int, float]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def perform(index: int, planned_s: float) -> None:
            sent.append((index, loop.time()))
            await asyncio.sleep(service_s)

        await drive_open(
            offsets, perform, start=0.0, clock=loop.time, sleep=asyncio.sleep, **options
        )

    run_virtually(main())
    return sent


def test_the_open_loop_never_waits_for_an_answer() -> None:
    assert run_open([1.0, 2.0, 3.0], 1e6, drain_s=1e7) == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_what_is_late_is_sent_at_once() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        sent: list[float] = []

        async def perform(index: int, planned_s: float) -> None:
            sent.append(planned_s)

        async def oversleep(wait_s: float) -> None:
            await asyncio.sleep(wait_s + 10)

        await drive_open([1.0, 2.0, 3.0], perform, start=0, clock=loop.time, sleep=oversleep)
        assert loop.time() == 11
        return sent

    assert run_virtually(main()) == [1.0, 2.0, 3.0]  # the plan, not the clock


def test_the_processes_of_a_run_send_together_what_one_would() -> None:
    offsets = [0.5, 1.0, 1.5, 2.0, 2.5]
    shares = [run_open(offsets, 0.1, share=Share(number=i, of=2)) for i in range(2)]
    assert sorted(shares[0] + shares[1]) == run_open(offsets, 0.1)


def test_beyond_its_bound_nothing_is_sent_but_noted() -> None:
    unsent: list[float] = []
    sent = run_open([1.0, 2.0, 3.0], 10.0, max_open=2, on_unsent=unsent.append)
    assert [index for index, _ in sent] == [0, 1]
    assert unsent == [3.0]


def test_what_does_not_end_is_cancelled_and_counted() -> None:
    async def main() -> tuple[int, float]:
        loop = asyncio.get_running_loop()

        async def perform(index: int, planned_s: float) -> None:
            await asyncio.sleep(1e9 if index else 1)

        late = await drive_open(
            [1.0, 2.0], perform, start=0, clock=loop.time, sleep=asyncio.sleep, drain_s=30
        )
        return late, loop.time()

    assert run_virtually(main()) == (1, 32.0)


def test_a_closed_loop_has_as_many_open_as_users_and_ends_on_time() -> None:
    async def main() -> tuple[int, int, list[int]]:
        loop = asyncio.get_running_loop()
        open_now = most = 0
        indexes: list[int] = []

        async def perform(index: int, planned_s: float) -> None:
            nonlocal open_now, most
            assert planned_s == loop.time() < 10
            indexes.append(index)
            open_now += 1
            most = max(most, open_now)
            await asyncio.sleep(0.5)
            open_now -= 1

        late = await drive_closed(3, perform, start=0.0, duration_s=10.0, clock=loop.time)
        return late, most, indexes

    assert run_virtually(main()) == (0, 3, list(range(60)))


@pytest.mark.parametrize("is_open_loop", [True, False])
def test_a_fault_of_the_tool_ends_the_run_and_is_not_hidden(is_open_loop: bool) -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()

        async def perform(index: int, planned_s: float) -> None:
            await asyncio.sleep(1)
            if index == 2:
                raise MemoryError("of ours")

        drive = (
            drive_open(range(1, 999), perform, start=0, clock=loop.time, sleep=asyncio.sleep)
            if is_open_loop
            else drive_closed(1, perform, start=0.0, duration_s=999.0, clock=loop.time)
        )
        with pytest.raises(MemoryError, match="of ours"):
            await drive
        return loop.time()

    assert run_virtually(main()) < 10


@pytest.mark.parametrize("start", [0.0, 12.3, 1234.567, 98765.4321, 1.7e9 + 0.1])
def test_which_requests_are_measured_is_planned_whatever_the_clock_says_at_the_start(
    start: float,
) -> None:
    span = Span(start=start, warmup_s=0.2, measured_s=1.0)
    measures = Measures(span)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def perform(index: int, planned_s: float) -> None:
            outcome = Outcome(Ask(index=index, task="infer", model="m"), start, planned_s)
            outcome.sent_at = outcome.ended_at = start + loop.time()
            measures.take(outcome)

        await drive_open(
            Steady(rate_per_s=100, cv=0).offsets(0, span.total_s),
            perform,
            start=start,
            clock=lambda: start + loop.time(),
            sleep=asyncio.sleep,
        )

    run_virtually(main())
    group = measures.groups["load"]
    assert (group.counts["warmup"], group.counts["planned"]) == (20, 100)
    assert group.seconds["planned"] == {0: 100, 1: 20}
