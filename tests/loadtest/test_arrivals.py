from __future__ import annotations

import itertools

import numpy as np
import pytest
from tensorwire.errors import BadParams
from tensorwire.loadtest.arrivals import Closed, Ramp, Steady, parse_arrivals


def gaps(arrivals: Steady, seed: int = 1, duration_s: float = 1000.0) -> np.ndarray:
    return np.diff(list(arrivals.offsets(seed, duration_s)))


def test_a_constant_rate_is_a_metronome_that_never_drifts() -> None:
    offsets = list(Steady(rate_per_s=3, cv=0).offsets(0, 1000.0))
    assert len(offsets) == 3000
    assert offsets[2999] == 2999 / 3


@pytest.mark.parametrize("cv", [1.0, 4.0, 0.5])
def test_gaps_have_the_mean_and_the_spread_that_were_asked_for(cv: float) -> None:
    found = gaps(Steady(rate_per_s=100, cv=cv), duration_s=2000.0)
    assert found.mean() == pytest.approx(0.01, rel=0.03)  # 200,000 gaps: the error is below 1 %
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.05)


def test_one_seed_gives_the_same_times_and_another_gives_others() -> None:
    steady = Steady(rate_per_s=50, cv=1)
    assert list(steady.offsets(7, 20.0)) == list(steady.offsets(7, 20.0))
    assert list(steady.offsets(7, 20.0)) != list(steady.offsets(8, 20.0))


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    steady = Steady(rate_per_s=50, cv=1)
    short = list(steady.offsets(7, 20.0))
    assert list(itertools.islice(steady.offsets(7, 99.0), len(short))) == short


@pytest.mark.parametrize(("low", "high"), [(0, 200), (10, 190), (190, 10), (100, 100), (200, 0)])
def test_a_ramp_has_its_rate_at_both_ends(low: float, high: float) -> None:
    offsets = np.array(list(Ramp(from_per_s=low, to_per_s=high).offsets(3, 200.0)))
    counts = np.histogram(offsets, bins=10, range=(0, 200))[0] / 20
    middles = low + (high - low) * (np.arange(10) + 0.5) / 10
    # A count n of Poisson arrivals errs by its root.
    assert np.all(np.abs(counts - middles) < 4 * np.sqrt(middles / 20) + 0.1)
    assert np.all(np.diff(offsets) > 0)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("closed:16", Closed(users=16)),
        ("constant:2.5", Steady(rate_per_s=2.5, cv=0)),
        ("poisson:100", Steady(rate_per_s=100, cv=1)),
        ("bursts:100", Steady(rate_per_s=100, cv=4)),
        ("bursts:100,cv=2", Steady(rate_per_s=100, cv=2)),
        ("ramp:10-200", Ramp(from_per_s=10, to_per_s=200)),
    ],
)
def test_what_a_word_on_the_command_line_means(text: str, meant: object) -> None:
    assert parse_arrivals(text) == meant


@pytest.mark.parametrize(
    "text",
    ["", "poisson", "poisson:", "poisson:0", "poisson:-1", "poisson:nan", "poisson:inf", "often:3",
     "closed:0", "ramp:0-0", "ramp:5", "bursts:10,cv", "bursts:10,shape=2"],
)  # fmt: skip
def test_what_means_nothing_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(BadParams) as caught:
        parse_arrivals(text)
    assert "\n" not in caught.value.message
