from __future__ import annotations

import numpy as np
import pytest
from tensorwire.errors import BadParams
from tensorwire.loadtest.lengths import LogNormal, Uniform, parse_lengths


def test_a_fixed_length_is_always_that_length() -> None:
    assert set(parse_lengths("64").draw(np.random.default_rng(0), 100).tolist()) == {64}


def test_uniform_lengths_reach_both_ends() -> None:
    assert set(parse_lengths("3-5").draw(np.random.default_rng(0), 200).tolist()) == {3, 4, 5}


def test_log_normal_lengths_have_their_median_and_spread_and_stay_below_their_maximum() -> None:
    drawn = LogNormal(median=200, sigma=0.5, most=800).draw(np.random.default_rng(0), 20_000)
    assert np.median(drawn) == pytest.approx(200, rel=0.02)
    assert np.log(drawn[drawn < 800]).std() == pytest.approx(0.5, rel=0.05)
    assert drawn.max() == 800
    assert drawn.min() >= 1


def test_what_the_words_mean() -> None:
    assert parse_lengths("16-256") == Uniform(low=16, high=256)
    assert parse_lengths("lognormal:median=64") == LogNormal(median=64, sigma=1, most=1024)
    assert parse_lengths("lognormal:median=64,sigma=0.8,max=99").most == 99  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    ["", "0", "9-3", "-4", "a", "lognormal:", "lognormal:sigma=1", "lognormal:median=9,max=3"],
)
def test_what_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(BadParams):
        parse_lengths(text)
