"""What a run says in the end: one JSON object, from which table, report and comparison are made."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tensorwire.loadtest.histograms import PERCENTILES, merged, percentile_intervals
from tensorwire.loadtest.machine import describe_machine, describe_versions, find_commit
from tensorwire.loadtest.selfwatch import judge
from tensorwire.loadtest.verifying import FAULTS
from tensorwire.loadtest.workloads import GROUPS, LOAD

if TYPE_CHECKING:
    from tensorwire.loadtest.histograms import Histogram
    from tensorwire.loadtest.measures import Group
    from tensorwire.loadtest.session import Run
    from tensorwire.loadtest.slo import Bound

FORMAT = 1


def percentile_name(percent: float) -> str:
    """Return `p99.9` for 99.9."""
    return f"p{percent:g}"


def summarize(run: Run) -> dict[str, Any]:
    """Return everything worth keeping of a run, as JSON carries it."""
    groups = run.measures.groups
    reasons = judge(
        run.own,
        merged([group.whole("lag") for group in groups.values()]),
        sum(group.counts["unsent"] for group in groups.values()),
    )
    return {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "valid": not reasons,
        "reasons": reasons,
        "plan": run.plan.to_json(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": find_commit(),
        "groups": {
            name: summarize_group(groups[name], run.span.measured_s)
            for name in GROUPS
            if name in groups
        },
        "slo": _judge_slo(run),
        "tally": dict(run.tally),
        "marks": [mark.to_json() for mark in run.marks],
        "own": [
            {
                "cpu": round(own.cpu, 4),
                "cpu_most": round(own.cpu_most, 4),
                "waiting": round(own.waiting, 4),
                "loop_lag_p99_ms": _ms(own.loop_lag.percentile_s(99)),
                "loop_lag_max_ms": _ms(own.loop_lag.max_s),
            }
            for own in run.own
        ],
    }


def summarize_group(group: Group, measured_s: float) -> dict[str, Any]:
    """Return the counts, rates, and distributions of one group of requests."""
    counts = group.counts
    rates = {
        "requests_per_s": counts["ok_in_time"] / measured_s,
        "goodput_per_s": counts["good_in_time"] / measured_s,
        "tokens_in_per_s": counts["tokens_in_in_time"] / measured_s,
        "tokens_out_per_s": counts["tokens_out_in_time"] / measured_s,
    }
    return {
        "counts": {name: counts[name] for name in sorted(counts)},
        "errors": dict(group.errors),
        "faults": {name: counts[name] for name in (*FAULTS, "wrong_streams", "without_end")},
        "rates": {name: round(rate, 4) for name, rate in rates.items()},
        "metrics": {
            metric: _summarize_metric([windows[w] for w in sorted(windows)])
            for metric, windows in group.windows.items()
        },
        "seconds": {
            name: {str(second): count for second, count in sorted(seconds.items())}
            for name, seconds in group.seconds.items()
        },
    }


def _summarize_metric(windows: list[Histogram]) -> dict[str, Any]:
    whole = merged(windows)
    intervals = percentile_intervals(windows)
    return {
        "count": whole.count,
        "mean_ms": _ms(whole.mean_s),
        "max_ms": _ms(whole.max_s),
        "percentiles_ms": {
            percentile_name(percent): _ms(whole.percentile_s(percent)) for percent in PERCENTILES
        },
        "intervals_ms": {
            percentile_name(percent): interval and [_ms(end) for end in interval]
            for percent, interval in zip(PERCENTILES, intervals, strict=True)
        },
        "hdr": whole.encode(),
    }


def _judge_slo(run: Run) -> dict[str, Any] | None:
    slo = run.plan.parsed_slo()
    if not run.plan.slo:
        return None
    group = run.measures.groups[LOAD]
    planned = group.counts["planned"]
    errors = (group.counts["failed"] + group.counts["unsent"]) / planned if planned else 1.0
    found: dict[Bound, float | None] = {
        bound: group.whole(bound.metric).percentile_s(bound.percent) for bound in slo.bounds
    }
    broken = slo.broken(found, errors)
    return {"text": run.plan.slo, "met": not broken, "broken": broken}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 4)
