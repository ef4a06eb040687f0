from __future__ import annotations

import pytest
from tensorwire.loadtest.histograms import Histogram
from tensorwire.loadtest.selfwatch import Own, judge


def durations(*values: float) -> Histogram:
    made = Histogram()
    made.record(values)
    return made


def test_a_tool_that_kept_up_is_not_accused() -> None:
    own = Own(loop_lag=durations(0.001, 0.02), cpu=0.5, cpu_most=0.8, waiting=0.05)
    assert judge([own], durations(0.001, 0.002), 0) == []


@pytest.mark.parametrize(
    ("own", "lag", "unsent", "reason"),
    [
        (Own(), 0.011, 0, "requests were sent late"),
        (Own(), 0.001, 3, "3 requests that were due were not sent"),
        (Own(loop_lag=durations(0.03)), 0.001, 0, "the event loop was late: p99 30.01 ms"),
        (Own(loop_lag=durations(*[0.001] * 199, 0.3)), 0.001, 0, "the event loop stood still"),
        (Own(cpu_most=0.95), 0.001, 0, "a process used 95% of its core"),
        (Own(waiting=0.4), 0.001, 0, "others had its core 40% of the time"),
    ],
)
def test_each_way_of_being_the_limit_is_named(
    own: Own, lag: float, unsent: int, reason: str
) -> None:
    healthy = Own()
    (said,) = judge([healthy, own], durations(lag), unsent)
    assert said.startswith(reason)


def test_what_a_process_knows_of_itself_survives_json() -> None:
    own = Own(loop_lag=durations(0.25), cpu=0.1, cpu_most=0.2, waiting=0.3)
    back = Own.from_json(own.to_json())
    assert (back.cpu, back.cpu_most, back.waiting) == (0.1, 0.2, 0.3)
    assert back.loop_lag.max_s == pytest.approx(0.25, rel=1e-3)
