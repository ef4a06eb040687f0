from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from tensorwire_server.gateway.alarm import STEPS_PER_S, Alarm
from tensorwire_server.gateway.deadlines import Deadlines

from .loops import FakeClockLoop, pass_time, run_on

if TYPE_CHECKING:
    from .conftest import Run

STEP_S = 1 / STEPS_PER_S


class Morning:
    """Deadlines, their alarm, and when it told them; `num_wakes` is how often it looked."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.deadlines = Deadlines()
        self.told: list[tuple[float, float]] = []  # deadline, and when it was told
        self.num_wakes = 0
        self.changed = asyncio.Event()
        self.alarm = Alarm(self.deadlines, self.loop, self.read_clock)

    def read_clock(self) -> float:
        self.num_wakes += 1
        return self.loop.time()

    def add(self, deadline: float) -> int:
        number = self.deadlines.add(deadline, Sleeper(self, deadline))
        self.alarm.set(deadline)
        self.num_wakes = 0  # setting it reads the clock as well
        return number


class Sleeper:
    def __init__(self, morning: Morning, deadline: float) -> None:
        self.morning, self.deadline = morning, deadline

    def on_deadline(self) -> None:
        self.morning.told.append((self.deadline, self.morning.loop.time()))
        self.morning.changed.set()


@given(delays_s=st.lists(st.floats(0, 3), min_size=1, max_size=30), pauses_s=st.floats(0, 0.1))
def test_each_deadline_is_told_after_it_has_passed_and_less_than_a_step_later(
    delays_s: list[float], pauses_s: float
) -> None:
    async def test() -> None:
        morning = Morning()
        for delay_s in delays_s:
            morning.add(morning.loop.time() + delay_s)
            await pass_time(pauses_s)
        await pass_time(4)
        assert len(morning.told) == len(delays_s)
        assert all(deadline <= at < deadline + STEP_S for deadline, at in morning.told)

    run_on(FakeClockLoop, test)


def test_all_deadlines_of_a_step_share_one_wake_up(run_fast: Run) -> None:
    async def test() -> None:
        morning = Morning()
        step = morning.loop.time() + 10 * STEP_S
        for i in range(10):
            morning.add(step + i * STEP_S / 10 + STEP_S / 20)
        await pass_time(1)
        assert {at for _, at in morning.told} == {step + STEP_S}
        assert morning.num_wakes == 1

    run_fast(test)


def test_an_earlier_deadline_that_comes_later_is_told_first(run_fast: Run) -> None:
    async def test() -> None:
        morning = Morning()
        now = morning.loop.time()
        for delay_s in (3, 1, 2):
            morning.add(now + delay_s)
        await pass_time(4)
        assert morning.told == [(now + s, now + s) for s in (1, 2, 3)]
        assert all(before < after for before, after in pairwise(at for _, at in morning.told))

    run_fast(test)


def test_while_no_deadline_is_left_nothing_wakes_the_loop(run_fast: Run) -> None:
    async def test() -> None:
        morning = Morning()
        for number in [morning.add(morning.loop.time() + i) for i in (3, 1, 2)]:
            morning.deadlines.forget(number)
        await pass_time(1.1)
        assert morning.num_wakes == 1  # it was set for the earliest, and finds that none is left
        await pass_time(3600)
        assert morning.num_wakes == 1

    run_fast(test)


def test_an_error_of_one_does_not_keep_the_alarm_from_ringing_for_the_others() -> None:
    async def test() -> None:
        errors: list[object] = []
        morning = Morning()
        morning.loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
        broken = ZeroDivisionError("an item is broken")

        class Broken:
            def on_deadline(self) -> None:
                raise broken

        now = morning.loop.time()
        morning.deadlines.add(now + 1, Broken())
        for delay_s in (1, 2):
            morning.add(now + delay_s)
        await pass_time(3)
        assert errors == [broken]
        assert [deadline for deadline, _ in morning.told] == [now + 1, now + 2]

    run_on(FakeClockLoop, test)


def test_on_a_real_clock_no_deadline_is_told_too_early(run: Run) -> None:
    async def test() -> None:
        morning = Morning()
        async with asyncio.timeout(5):
            for _ in range(3):
                morning.changed.clear()
                morning.add(morning.loop.time() + 0.001)
                await morning.changed.wait()
        assert all(deadline <= at for deadline, at in morning.told)

    run(test)
