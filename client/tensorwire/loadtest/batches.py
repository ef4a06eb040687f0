"""Counts requests that have ended, many at a time: arrays cost a tenth of what each alone would.

Letters: R requests of the batch, P pieces of their streams (what one event brought), one after the
other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from tensorwire.loadtest.outcomes import CANCELLED, OK
from tensorwire.loadtest.verifying import FAULTS, NO_FAULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tensorwire.loadtest.measures import Group, Span
    from tensorwire.loadtest.outcomes import Outcome
    from tensorwire.loadtest.slo import Slo
    from tensorwire.loadtest.verifying import Faults

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]


@dataclass(slots=True)
class _Pieces:
    """The pieces of all streams of a batch."""

    at_P: Floats  # when each came, seconds after the start
    tokens_P: Ints
    owner_P: Ints  # whose it is: the index of its request

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], start: float) -> _Pieces:
        sizes = [len(outcome.times) for outcome in outcomes]
        total = sum(sizes)
        times = chain.from_iterable([outcome.times for outcome in outcomes])
        counts = chain.from_iterable([outcome.counts for outcome in outcomes])
        return cls(
            np.fromiter(times, np.float64, total) - start,
            np.fromiter(counts, np.int64, total),
            np.repeat(np.arange(len(sizes)), sizes),
        )


def count_batch(group: Group, outcomes: Sequence[Outcome], span: Span, slo: Slo) -> None:
    """Count requests of one group."""
    planned_R = np.array([outcome.planned_s for outcome in outcomes])
    ended_R = np.array([outcome.ended_at for outcome in outcomes]) - span.start
    tokens_in_R = np.array([outcome.tokens_in for outcome in outcomes])
    statuses = [outcome.status for outcome in outcomes]
    ok_R = np.array([status == OK for status in statuses])
    pieces = _Pieces.of(outcomes, span.start)

    _count_seconds(group, planned_R, ended_R, statuses, pieces)
    good_R = np.array(list(map(slo.is_good, outcomes))) if slo.bounds else ok_R
    _count_in_time(group, span, ended_R, ok_R, good_R, tokens_in_R, pieces)
    measured_R = span.are_measured(planned_R)
    _count_requests(group, outcomes, good_R, measured_R, tokens_in_R, pieces)
    # A wrong answer is one whenever it came: the warm-up is not spared.
    group.counts["without_end"] += sum([not outcome.has_end for outcome in outcomes])
    for outcome in outcomes:
        if outcome.faults is not NO_FAULTS:
            count_faults(group, outcome.faults)

    # How late the tool was counts for every request; latencies are of those that succeeded.
    window_R = np.where(measured_R, span.windows(planned_R), -1)
    sent_R = np.array([outcome.sent_at for outcome in outcomes]) - span.start
    _record(group, "lag", sent_R - planned_R, window_R)
    if not (measured_R & ok_R).any():
        return
    window_R = np.where(ok_R, window_R, -1)
    _record(group, "e2e", ended_R - planned_R, window_R)
    if len(pieces.at_P):
        _measure_streams(group, pieces, planned_R, window_R)
    _measure_server(group, outcomes, window_R)


def _count_seconds(
    group: Group, planned_R: Floats, ended_R: Floats, statuses: Sequence[str], pieces: _Pieces
) -> None:
    failed_R = np.array([status not in (OK, CANCELLED) for status in statuses])
    for name, moments, weights in (
        ("planned", planned_R, None),
        ("ended", ended_R, None),
        ("failed", ended_R[failed_R], None),
        ("tokens", pieces.at_P, pieces.tokens_P),
    ):
        if len(moments):
            counts = np.bincount(np.maximum(moments, 0).astype(np.int64), weights)
            seconds = np.flatnonzero(counts)
            found = zip(seconds.tolist(), counts[seconds].astype(np.int64).tolist(), strict=True)
            group.seconds[name].update(dict(found))


def _count_in_time(
    group: Group,
    span: Span,
    ended_R: Floats,
    ok_R: Bools,
    good_R: Bools,
    tokens_in_R: Ints,
    pieces: _Pieces,
) -> None:
    in_time_R = span.are_measured(ended_R)
    counts = group.counts
    counts["ended_in_time"] += int(in_time_R.sum())
    counts["ok_in_time"] += int((in_time_R & ok_R).sum())
    counts["good_in_time"] += int((in_time_R & good_R).sum())
    counts["tokens_in_in_time"] += int(tokens_in_R[in_time_R].sum())
    counts["tokens_out_in_time"] += int(pieces.tokens_P[span.are_measured(pieces.at_P)].sum())


def _count_requests(
    group: Group,
    outcomes: Sequence[Outcome],
    good_R: Bools,
    measured_R: Bools,
    tokens_in_R: Ints,
    pieces: _Pieces,
) -> None:
    measured = [outcomes[i] for i in np.flatnonzero(measured_R).tolist()]
    by_status = Counter([outcome.status for outcome in measured])
    num_ok, num_cancelled = by_status.pop(OK, 0), by_status.pop(CANCELLED, 0)
    group.errors.update(by_status)
    group.counts.update(
        warmup=len(outcomes) - len(measured),
        planned=len(measured),
        ok=num_ok,
        good=int((measured_R & good_R).sum()),
        cancelled=num_cancelled,
        failed=sum(by_status.values()),
        tokens_in=int(tokens_in_R[measured_R].sum()),
        tokens_out=int(pieces.tokens_P[measured_R[pieces.owner_P]].sum()),
    )


def count_faults(group: Group, faults: Faults) -> None:
    """Count what is wrong with one stream."""
    if faults.total:
        group.counts["wrong_streams"] += 1
        for name in FAULTS:
            group.counts[name] += getattr(faults, name)


def _measure_streams(group: Group, pieces: _Pieces, planned_R: Floats, window_R: Ints) -> None:
    owner_P = pieces.owner_P
    window_P = window_R[owner_P]
    follows_P = np.append(False, owner_P[1:] == owner_P[:-1])
    first_P = ~follows_P
    _record(group, "ttft", (pieces.at_P - planned_R[owner_P])[first_P], window_P[first_P])
    gaps_P = np.diff(pieces.at_P, prepend=0.0)
    _record(group, "itl", gaps_P[follows_P], window_P[follows_P])
    # Between tokens that come together there is no time.
    together = np.repeat(window_P, np.maximum(pieces.tokens_P - 1, 0))
    _record(group, "itl", np.zeros(len(together)), together)


def _measure_server(group: Group, outcomes: Sequence[Outcome], window_R: Ints) -> None:
    told = [(outcome.server_ms, i) for i, outcome in enumerate(outcomes) if outcome.server_ms]
    for name in {name: None for server_ms, _ in told for name in server_ms}:
        found = [(server_ms[name], i) for server_ms, i in told if name in server_ms]
        values = np.array([value for value, _ in found]) / 1000
        _record(
            group, f"server.{name.removesuffix('_ms')}", values, window_R[[i for _, i in found]]
        )


def _record(group: Group, metric: str, seconds: Floats, windows: Ints) -> None:
    """Give each duration to its window; -1: to none."""
    for window in np.unique(windows).tolist():
        if window >= 0:
            group.record(metric, window, seconds[windows == window])
