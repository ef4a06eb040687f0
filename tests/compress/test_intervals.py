"""Estimates, their intervals, and whether these hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tensorwire_server.compress.intervals import MIN_UNITS, Bootstrap, Estimate, perplexity_of


def test_an_estimate_is_the_ratio_of_the_sums_not_the_mean_of_ratios() -> None:
    estimate = Bootstrap(2, seed=0).estimate([1.0, 30.0], [1, 9])
    assert estimate == Estimate(value=3.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    runs, held = 300, 0
    for run in range(runs):
        # Windows of different lengths, and difficult texts among easy ones.
        sizes = rng.integers(50, 150, 32)
        sums = sizes * rng.gamma(4.0, 0.5, 32)
        estimate = Bootstrap(32, seed=run).estimate(sums, sizes, become=perplexity_of)
        held += estimate.may_be(math.exp(2.0))
    # 95 % is the promise; percentile intervals of 32 skewed units keep a little less. Seeded.
    assert 0.90 <= held / runs <= 0.98


def test_an_interval_is_as_wide_as_the_spread_of_the_units() -> None:
    units = np.tile([0.0, 1.0], 200)
    estimate = Bootstrap(400, seed=0).estimate(units)
    assert estimate.low is not None
    assert estimate.high is not None
    # Of a mean of 400 coins: 1.96 * 0.5 / 20 to either side; 2000 resamples are good to a tenth.
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.025, rel=0.1)


def test_too_few_units_have_no_interval() -> None:
    ones = [1.0] * MIN_UNITS
    assert Bootstrap(MIN_UNITS, seed=0).estimate(ones) == Estimate(value=1.0, low=1.0, high=1.0)
    few = Bootstrap(MIN_UNITS - 1, seed=0).estimate(ones[1:])
    assert few == Estimate(value=1.0)
    assert not few.is_bounded
    assert few.may_be(1000.0)


def test_what_is_paired_does_not_spread() -> None:
    losses = np.random.default_rng(1).gamma(4.0, 0.5, 20)
    bootstrap = Bootstrap(20, seed=0)
    ratio = bootstrap.estimate(losses + 0.1 - losses, become=perplexity_of)
    assert ratio.value == pytest.approx(math.exp(0.1))
    assert ratio.low == pytest.approx(ratio.value)
    assert ratio.high == pytest.approx(ratio.value)
    assert not ratio.may_be(1.0)


def test_a_falling_function_keeps_low_below_high() -> None:
    estimate = Bootstrap(20, seed=0).estimate(range(20), become=lambda mean: -mean)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.value < estimate.high


def test_the_same_seed_gives_the_same_interval() -> None:
    def interval(seed: int) -> Estimate:
        return Bootstrap(20, seed=seed).estimate(range(20))

    assert interval(1) == interval(1) != interval(2)


def test_a_hopeless_model_has_a_huge_perplexity() -> None:
    assert perplexity_of(2.0) == pytest.approx(math.exp(2.0))
    assert 1e300 < perplexity_of(1e6) < math.inf
