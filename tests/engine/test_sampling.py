from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_server.engine.sampling import choose_tokens, draw, philox, uniform
from tensorwire_server.scheduling.work import Sampling
from torch.utils._python_dispatch import TorchDispatchMode

from .references import NUM_DRAWS, chi_square_excess, distribution


def sampling(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> Sampling:
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)


GREEDY = sampling(temperature=0.0)


# Known answers from the Random123 distribution (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, 2**128 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0_A4093822,
            0x03707344_13198A2E_85A308D3_243F6A88,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    key: int, counter: int, words: tuple[int, int, int, int]
) -> None:
    assert philox(key, counter) == words


@given(st.integers(-(2**63), 2**64), st.integers(0, 2**31))
def test_noise_is_a_number_from_0_to_below_1_for_any_seed(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0
    assert uniform(seed, position) == uniform(seed, position)


def test_noise_is_spread_evenly_over_positions_and_seeds() -> None:
    draws = [uniform(seed, position) for seed in range(20) for position in range(200)]
    tenths = Counter(int(10 * draw) for draw in draws)
    # Chi-square with 9 degrees of freedom stays below 33.7 in 9,999 of 10,000 cases; the noise is
    # fixed, so this passes always or never.
    assert sum((tenths[i] - 400) ** 2 / 400 for i in range(10)) < 33.7
    assert abs(sum(a > b for a, b in pairwise(draws)) / 4000 - 0.5) < 0.03


def test_greedy_rows_take_the_largest_logit() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert choose_tokens(logits, [GREEDY, GREEDY], [0, 0]) == [1, 0]


def test_no_rows_give_no_tokens() -> None:
    assert choose_tokens(torch.empty(0, 5), [], []) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("how", [GREEDY, sampling(), sampling(top_k=2), sampling(top_p=0.5)])
def test_a_row_that_is_not_finite_has_no_token_and_disturbs_no_other(
    bad: float, how: Sampling
) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = choose_tokens(logits[[0, 2]], [how, how], [4, 5])
    logits[1, 7] = bad
    first, broken, last = choose_tokens(logits, [how] * 3, [4, 9, 5])
    assert broken is None
    assert [first, last] == expected


SETTINGS = [
    sampling(),
    sampling(temperature=0.5),
    sampling(top_k=5),
    sampling(top_p=0.7),
    sampling(temperature=1.5, top_k=10, top_p=0.8),
    sampling(top_k=1000),
    sampling(top_k=1),
    sampling(top_p=1e-6),
    sampling(min_p=0.1),
    sampling(temperature=2.0, min_p=0.05),
    sampling(top_p=0.9, min_p=0.2),
    sampling(temperature=1.2, top_k=12, top_p=0.95, min_p=0.02),
]


@pytest.mark.parametrize(
    ("vocab", "how"),
    [(40, how) for how in SETTINGS] + [(1200, SETTINGS[i]) for i in (0, 3, 5, 9, 10)],
    ids=str,
)
def test_20_000_draws_follow_the_distribution_that_transformers_warpers_leave(
    vocab: int, how: Sampling
) -> None:
    logits = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    expected = distribution(logits, how)
    drawn: Counter[int | None] = Counter()
    for start in range(0, NUM_DRAWS, 2000):
        positions = range(start, start + 2000)
        drawn.update(choose_tokens(logits.expand(2000, vocab), [how] * 2000, positions))
    assert chi_square_excess(drawn, expected) < 0


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(2, 60),
    how=st.builds(
        Sampling,
        temperature=st.sampled_from([0.3, 1.0, 1.7]),
        top_k=st.none() | st.integers(1, 70),
        top_p=st.sampled_from([1.0, 0.2, 0.55, 0.9, 0.99]),
        min_p=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
        seed=st.just(0),
    ),
)
def test_every_tokens_share_of_the_noise_is_its_probability_under_transformers_warpers(
    seed: int, vocab: int, how: Sampling
) -> None:
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    expected = distribution(logits, how)
    ends = expected.cumsum(0)
    # A tiny share lies at a slightly other place in float32.
    tokens = [token for token in range(vocab) if expected[token] > 1e-5]
    noise = [float(ends[token] - expected[token] * where) for token in tokens
             for where in (0.99, 0.5, 0.01)]  # fmt: skip
    drawn = draw(logits.expand(len(noise), vocab), [how] * len(noise), noise).tolist()
    assert drawn == [token for token in tokens for _ in range(3)]


def test_a_flat_nucleus_wider_than_the_first_guess_is_found() -> None:
    vocab = 3000
    logits = torch.zeros(vocab) + torch.linspace(0, 1e-3, vocab)
    rows = logits.expand(500, vocab)
    drawn = choose_tokens(rows, [sampling(top_p=0.5)] * 500, range(500))
    assert all(token is not None and token >= vocab // 2 - 2 for token in drawn)
    assert len(set(drawn)) > 350


def test_a_tiny_temperature_is_greedy_not_nan() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9]])
    assert choose_tokens(logits, [sampling(temperature=1e-300)], [0]) == [1]


def test_each_row_has_its_own_settings_and_draws_the_same_in_any_company() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(7, 700, generator=generator)
    settings = [
        GREEDY,
        sampling(seed=1),
        sampling(top_k=3, seed=2),
        sampling(top_k=300, top_p=0.9, seed=3),
        sampling(top_p=0.4, seed=4),
        sampling(temperature=3.0, top_p=0.99, seed=5),
        sampling(temperature=3.0, min_p=0.2, seed=6),
    ]
    together = choose_tokens(logits, settings, range(7))
    alone = [choose_tokens(logits[i : i + 1], [settings[i]], [i])[0] for i in range(7)]
    assert together == alone


class CountCandidates(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how many tokens the likeliest ones are taken out to, over all rows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.topk:
            self.count += result[0].numel()
        return result


def num_candidates(logits: torch.Tensor, settings: list[Sampling]) -> int:
    counted = CountCandidates()
    with counted:
        choose_tokens(logits[: len(settings)], settings, range(len(settings)))
    return counted.count


WIDE = sampling(top_k=40_000)


def test_a_row_with_a_large_top_k_makes_the_others_look_at_no_more_tokens() -> None:
    logits = torch.randn(9, 50_000, generator=torch.Generator().manual_seed(0))
    few = [sampling(top_k=50)] * 8
    alone = num_candidates(logits, few), num_candidates(logits, [WIDE])
    assert num_candidates(logits, [*few, WIDE]) == sum(alone)
    assert alone[0] < 8 * 100


def test_a_nucleus_of_some_thousand_tokens_does_not_sort_a_whole_vocabulary() -> None:
    logits = torch.zeros(1, 100_000)
    logits[0, :3000] = 20.0
    assert num_candidates(logits, [sampling(top_p=0.9)]) < 10_000
    logits[0, :20_000] = 20.0
    # Looked for among 256, 4,096 and 32,768; the last are then sorted.
    assert num_candidates(logits, [sampling(top_p=0.9)]) < 2 * 32_768 + 5000


@pytest.mark.parametrize("other", [sampling(top_k=60), sampling(top_k=1500), sampling(top_k=1999)])
def test_a_row_whose_tokens_are_often_equally_likely_draws_the_same_in_any_company(
    other: Sampling,
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(40, 2000, generator=generator)).round()
    own = [sampling(temperature=4.0, top_k=50, seed=seed) for seed in range(40)]
    alone = [choose_tokens(logits[i : i + 1], [own[i]], [i])[0] for i in range(40)]
    company = choose_tokens(logits[[*range(40), 0]], [*own, other], range(41))
    assert company[:40] == alone
