from __future__ import annotations

import json

import numpy as np
import pytest
from tensorwire.loadtest.measures import NUM_WINDOWS, Measures, Span
from tensorwire.loadtest.outcomes import CANCELLED, Outcome
from tensorwire.loadtest.slo import parse_slo
from tensorwire.loadtest.verifying import Faults
from tensorwire.loadtest.workloads import Ask

SPAN = Span(start=100.0, warmup_s=5.0, measured_s=20.0)


def outcome(planned: float, *, took: float = 1.0, late: float = 0.0, **fields: object) -> Outcome:
    made = Outcome(Ask(index=0, task="generate", model="m"), SPAN.start, planned)
    made.sent_at = made.planned_at + late
    made.ended_at = made.planned_at + took
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_latency_counts_from_the_planned_send() -> None:
    measures = Measures(SPAN)
    made = outcome(6.0, took=1.0, late=0.7)
    made.times, made.counts = [106.9, 106.95, 107.0], [1, 1, 2]
    measures.take(made)
    group = measures.groups["load"]
    assert group.whole("ttft").percentile_s(50) == pytest.approx(0.9, rel=1e-3)
    assert group.whole("e2e").percentile_s(50) == pytest.approx(1.0, rel=1e-3)
    assert group.whole("lag").percentile_s(50) == pytest.approx(0.7, rel=1e-3)


def test_how_late_a_request_was_sent_counts_whatever_came_of_it() -> None:
    measures = Measures(SPAN)
    for status in ("BUSY", "DEADLINE", CANCELLED, "ok"):
        measures.take(outcome(6.0, late=0.5, status=status))
    measures.take(outcome(1.0, late=0.5))  # in the warm-up
    assert measures.groups["load"].whole("lag").count == 4


def test_every_gap_counts_and_tokens_that_come_together_have_none_between_them() -> None:
    measures = Measures(SPAN)
    made = outcome(6.0, times=[106.1, 106.2, 106.4], counts=[2, 1, 3])
    measures.take(made)
    itl = measures.groups["load"].whole("itl")
    assert itl.count == 5  # of six tokens
    assert itl.percentile_s(60) == 0
    assert itl.percentile_s(80) == pytest.approx(0.1, rel=1e-3)
    assert itl.max_s == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("planned", [0.0, 4.99, 25.0, 30.0])
def test_what_is_planned_outside_the_measured_time_is_only_counted_as_such(planned: float) -> None:
    measures = Measures(SPAN)
    measures.take(outcome(planned))
    group = measures.groups["load"]
    assert (group.counts["warmup"], group.counts["planned"]) == (1, 0)
    assert group.whole("e2e").count == 0


def test_each_window_takes_its_part() -> None:
    measures = Measures(SPAN)
    for i in range(40):
        measures.take(outcome(5.0 + i * 0.5))
    windows = measures.groups["load"].windows["e2e"]
    assert {window: histogram.count for window, histogram in windows.items()} == dict.fromkeys(
        range(NUM_WINDOWS), 4
    )


def test_failures_cancels_and_faults_are_counted_apart() -> None:
    measures = Measures(SPAN, parse_slo("e2e_p99=1500ms"))
    for made in (
        outcome(6.0),
        outcome(6.0, took=2.0),
        outcome(6.0, status=CANCELLED),
        outcome(6.0, status="BUSY"),
        outcome(6.0, status="CONNECTION_LOST", has_end=False),
        outcome(6.0, faults=Faults(lost=2, swapped=1)),
    ):
        measures.take(made)
    group = measures.groups["load"]
    expected = {
        "planned": 6, "ok": 3, "good": 2, "cancelled": 1, "failed": 2, "without_end": 1,
        "wrong_streams": 1, "lost": 2, "swapped": 1, "repeated": 0, "foreign": 0,
    }  # fmt: skip
    assert {name: group.counts[name] for name in expected} == expected
    assert group.errors == {"BUSY": 1, "CONNECTION_LOST": 1}


def test_a_wrong_answer_counts_in_the_warm_up_too() -> None:
    measures = Measures(SPAN)
    measures.take(outcome(1.0, faults=Faults(lost=1), has_end=False))
    counts = measures.groups["load"].counts
    assert (counts["wrong_streams"], counts["lost"], counts["without_end"]) == (1, 1, 1)
    assert counts["planned"] == 0


def test_many_are_counted_as_one_by_one_would_be() -> None:
    random = np.random.default_rng(0)
    at_once, alone = Measures(SPAN), [Measures(SPAN) for _ in range(300)]
    for i, one in enumerate(alone):
        times = np.sort(random.uniform(100, 128, random.integers(0, 5)))
        made = outcome(random.uniform(0, 26), took=random.exponential(2.0), late=0.01 * (i % 3))
        made.times, made.counts = times.tolist(), random.integers(1, 4, len(times)).tolist()
        made.status, made.tokens_in = ("ok", "ok", CANCELLED, "BUSY")[i % 4], i
        made.server_ms = {"total_ms": float(i)} if i % 2 else {}
        at_once.take(made)
        one.take(made)
    added = Measures(SPAN)
    for one in alone:
        added.add(one)
    whole, sum_of_parts = at_once.groups["load"], added.groups["load"]
    assert +whole.counts == +sum_of_parts.counts
    assert whole.errors == sum_of_parts.errors
    assert whole.seconds == sum_of_parts.seconds
    assert whole.windows.keys() == sum_of_parts.windows.keys() > {"ttft", "itl", "server.total"}
    for metric in whole.windows:
        assert (whole.whole(metric).counts() == sum_of_parts.whole(metric).counts()).all()


def test_throughput_counts_what_ended_in_the_measured_time() -> None:
    measures = Measures(SPAN)
    measures.take(outcome(4.5, took=1.0))  # planned in the warm-up, ended after it
    measures.take(outcome(24.5, took=1.0))  # planned in time, ended too late
    counts = measures.groups["load"].counts
    assert (counts["ok_in_time"], counts["good_in_time"]) == (1, 1)


def test_goodput_is_a_part_of_the_throughput() -> None:
    measures = Measures(SPAN, parse_slo("e2e_p99=1500ms"))
    for made in (outcome(4.0, took=1.2), outcome(4.5, took=1.0), outcome(5.0, took=2.0)):
        measures.take(made)
    counts = measures.groups["load"].counts
    assert (counts["ok_in_time"], counts["good_in_time"]) == (3, 2)


def test_what_processes_measured_adds_up_through_json() -> None:
    parts = [Measures(SPAN), Measures(SPAN)]
    whole = Measures(SPAN)
    for i in range(100):
        made = outcome(5.0 + i * 0.1, took=0.01 * i + 0.01, times=[106.0, 106.1], counts=[1, 1])
        parts[i % 2].take(made)
        whole.take(made)
    added = Measures(SPAN)
    for part in parts:
        added.add(Measures.from_json(SPAN, json.loads(json.dumps(part.to_json()))))
    mine, theirs = added.groups["load"], whole.groups["load"]
    assert mine.counts == theirs.counts
    assert mine.seconds == theirs.seconds
    for metric in ("e2e", "ttft", "itl"):
        assert (mine.whole(metric).counts() == theirs.whole(metric).counts()).all()


def test_requests_that_were_due_and_not_sent_are_counted() -> None:
    measures = Measures(SPAN)
    measures.take_unsent("load", 6.0)
    measures.take_unsent("load", 1.0)
    assert measures.groups["load"].counts == {"planned": 1, "unsent": 1}
