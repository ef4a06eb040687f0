"""Durations in HDR histograms: from 1 microsecond to an hour, to three digits."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from hdrh.histogram import HdrHistogram

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 3_600_000_000, 3
_EXACT_BITS = 11  # below 2**11 us each microsecond has a bucket of its own: that is three digits
_RESAMPLES = 400
_TAIL = 0.025  # what a confidence of 95 % leaves on each side


class Histogram:
    """Counts of durations; those of several processes and windows can be added.

    The buckets and the encoding are the library's. The counts are an array of ours, because the
    library takes one value a call: for each token of a run that costs more than its arrival.
    """

    def __init__(self, encoded: str | None = None) -> None:
        self._counts = np.zeros(_num_buckets(), np.int64)
        if encoded:
            hdr: Any = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
            hdr.decode_and_add(encoded)
            self._counts += np.asarray(hdr.counts, np.int64)

    def record(self, seconds: Sequence[float] | NDArray[np.float64]) -> None:
        """Count durations; what is below 0 counts as 0."""
        if not len(seconds):
            return
        us = np.clip(np.rint(np.asarray(seconds) * 1e6), 0, _HIGHEST_US).astype(np.int64)
        shift = np.maximum(np.frexp(us)[1] - _EXACT_BITS, 0)
        buckets = (shift << (_EXACT_BITS - 1)) + (us >> shift)
        self._counts += np.bincount(buckets, minlength=len(self._counts))

    def add(self, other: Histogram) -> None:
        """Count what another one has counted."""
        self._counts += other._counts

    def encode(self) -> str:
        """Return it in the format that all HDR histogram tools read (V2, base64)."""
        hdr: Any = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
        used = np.flatnonzero(self._counts)
        for bucket, count in zip(used.tolist(), self._counts[used].tolist(), strict=True):
            hdr.record_value(hdr.get_value_from_index(bucket), count)
        encoded = hdr.encode()
        return encoded.decode() if isinstance(encoded, bytes) else str(encoded)

    @property
    def count(self) -> int:
        """How many durations were counted."""
        return int(self._counts.sum())

    @property
    def mean_s(self) -> float:
        """The mean, or 0 of nothing."""
        return float(self._counts @ _bucket_s()) / self.count if self.count else 0.0

    @property
    def max_s(self) -> float:
        """The longest, or 0 of nothing."""
        used = np.flatnonzero(self._counts)
        return float(_bucket_s()[used[-1]]) if len(used) else 0.0

    def percentile_s(self, percent: float) -> float | None:
        """Return the duration that so many percent do not exceed; None of nothing."""
        found = _percentiles(self.counts()[None, :], (percent,))[0, 0]
        return None if np.isnan(found) else float(found)

    def counts(self) -> NDArray[np.float64]:
        """Return the count of each bucket, (buckets,)."""
        return self._counts.astype(np.float64)

    def cumulative(self) -> list[tuple[float, float]]:
        """Return (seconds, share of all that took at most so long) where the share rises."""
        counts = self.counts()
        at = np.flatnonzero(counts)
        if not len(at):
            return []
        shares = np.cumsum(counts[at]) / counts.sum()
        return list(zip(_bucket_s()[at].tolist(), shares.tolist(), strict=True))


def merged(histograms: Sequence[Histogram]) -> Histogram:
    """Return one histogram of all."""
    whole = Histogram()
    for histogram in histograms:
        whole.add(histogram)
    return whole


def percentile_intervals(
    windows: Sequence[Histogram], percents: Sequence[float] = PERCENTILES
) -> list[tuple[float, float] | None]:
    """Return where each percentile lies with 95 % confidence, told from repeated windows.

    The windows are drawn again with replacement, many times. What comes close together in a run
    is alike, so single requests say too little of how much another run would differ. None: there
    were too few windows, or too few values to have met what is as rare.
    """
    rows = np.array([window.counts() for window in windows if window.count])
    if len(rows) < 2:
        return [None] * len(percents)
    random = np.random.default_rng(0)
    picks = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), _RESAMPLES)
    used = np.flatnonzero(rows.any(axis=0))
    found = _percentiles(picks @ rows[:, used], percents, used)
    low, high = np.percentile(found, (100 * _TAIL, 100 * (1 - _TAIL)), axis=0)
    return [
        interval if rows.sum() >= fewest_values(percent) else None
        for percent, interval in zip(
            percents, zip(low.tolist(), high.tolist(), strict=True), strict=True
        )
    ]


def fewest_values(percent: float) -> int:
    """Return of how many values the largest lies beyond the percentile, in 97.5 % of all runs.

    Of fewer, an interval's upper end would be a guess: 368 for p99, 3688 for p99.9.
    """
    return math.ceil(math.log(_TAIL) / math.log(percent / 100))


def _percentiles(
    counts: NDArray[np.float64], percents: Sequence[float], used: NDArray[np.intp] | None = None
) -> NDArray[np.float64]:
    """Return (rows, percents) in seconds; NaN where a row is empty."""
    bucket_s = _bucket_s() if used is None else _bucket_s()[used]
    sums = np.cumsum(counts, axis=1)
    totals = sums[:, -1:]
    found = np.full((len(counts), len(percents)), np.nan)
    for i, percent in enumerate(percents):
        rank = np.maximum(np.ceil(totals * percent / 100 - 1e-9), 1)
        at = (sums >= rank).argmax(axis=1)
        found[:, i] = np.where(totals[:, 0] > 0, bucket_s[at], np.nan)
    return found


@cache
def _num_buckets() -> int:
    return int(HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS).counts_len)


@cache
def _bucket_s() -> NDArray[np.float64]:
    """Return the middle of each bucket, in seconds."""
    hdr: Any = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
    lows = np.array([hdr.get_value_from_index(i) for i in range(hdr.counts_len)], np.float64)
    widths = np.diff(lows, append=lows[-1] + 1)
    return (lows + (widths - 1) / 2) / 1e6
