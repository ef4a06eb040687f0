from __future__ import annotations

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from tensorwire.loadtest.histograms import (
    PERCENTILES,
    Histogram,
    merged,
    percentile_intervals,
)


def histogram(values: list[float]) -> Histogram:
    made = Histogram()
    made.record(values)
    return made


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 99.9, 100])
def test_a_percentile_is_that_of_the_values_to_three_digits(percent: float) -> None:
    values = np.random.default_rng(0).lognormal(-4, 1.5, 20_011)
    exact = float(np.percentile(values, percent, method="inverted_cdf"))
    found = histogram(values.tolist()).percentile_s(percent)
    assert found == pytest.approx(exact, rel=1e-3, abs=1e-6)


def test_it_counts_what_the_library_counts_value_by_value() -> None:
    values = np.random.default_rng(1).lognormal(-4, 3, 2000).tolist()
    one_by_one = HdrHistogram(1, 3_600_000_000, 3)
    for value in values:
        one_by_one.record_value(min(round(value * 1e6), 3_600_000_000))
    made = histogram(values)
    assert made.counts().tolist() == list(one_by_one.counts)
    assert made.encode() == one_by_one.encode().decode()
    assert made.mean_s == pytest.approx(one_by_one.get_mean_value() / 1e6, rel=1e-3)
    assert made.max_s == pytest.approx(one_by_one.get_max_value() / 1e6, rel=1e-3)


def test_histograms_survive_encoding_and_can_be_added() -> None:
    first, second = histogram([0.001, 0.5]), histogram([2.0, 0.0])
    both = merged([Histogram(first.encode()), Histogram(second.encode())])
    assert both.count == 4
    assert both.max_s == pytest.approx(2.0, rel=1e-3)
    assert (both.counts() == histogram([0.001, 0.5, 2.0, 0.0]).counts()).all()


def test_nothing_has_no_percentile() -> None:
    assert histogram([]).percentile_s(50) is None
    assert histogram([]).cumulative() == []


def test_what_is_longer_than_an_hour_counts_as_an_hour() -> None:
    assert histogram([9999.0]).max_s == pytest.approx(3600, rel=1e-3)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(40):
        windows = [histogram(random.exponential(1.0, 300).tolist()) for _ in range(10)]
        ((low, high),) = [i for i in percentile_intervals(windows, (50,)) if i]
        covered += low <= np.log(2) <= high
    assert covered >= 33  # of 38 expected: ten windows are few


def test_what_is_rarer_than_a_run_is_long_has_no_interval() -> None:
    for num_values, known in ((60, (50, 90)), (3600, (50, 90, 99)), (3700, (50, 90, 99, 99.9))):
        windows = [histogram([0.001 * i for i in range(num_values // 10)]) for _ in range(10)]
        intervals = dict(zip(PERCENTILES, percentile_intervals(windows), strict=True))
        assert tuple(percent for percent, interval in intervals.items() if interval) == known


def test_one_window_says_nothing_of_how_another_run_would_differ() -> None:
    assert percentile_intervals([histogram([1.0])], (50, 99)) == [None, None]
