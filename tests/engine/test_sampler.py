"""What a step gives: tokens, failures and reports, of rows that ask for different things."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tensorwire_server.engine.sampler import NOT_FINITE, NOTHING_LEFT, Sampler, wanted_logits
from tensorwire_server.scheduling.work import Row, Sampling, Scores, Shaping

from .references import NUM_DRAWS, chi_square_excess, distribution, row_of, shaped

VOCAB = 40
GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
DRAWN = Sampling(temperature=1.0, top_k=None, top_p=1.0, seed=5)
HISTORY = [3, 4, 5, 6, 3, 7, 7, 8]
NUM_PROMPT = 4
ALL = Shaping(
    bias=((1, 2.0), (3, -1.5)),
    repetition_penalty=1.4,
    frequency_penalty=0.6,
    presence_penalty=0.3,
    bad_words=((11,), (7, 8, 12), (9, 13)),
    min_new_tokens=6,
    stop_ids=(2, 14),
)


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def decoding(sampling: Sampling, id: int = 0) -> Row:
    return row_of(sampling, HISTORY, num_prompt_tokens=NUM_PROMPT, sequence_id=id)


@pytest.mark.parametrize(
    "shaping",
    [
        Shaping(bias=ALL.bias),
        Shaping(repetition_penalty=1.8),
        Shaping(frequency_penalty=0.9),
        Shaping(presence_penalty=-1.5),
        Shaping(bad_words=ALL.bad_words),
        Shaping(min_new_tokens=6, stop_ids=(2, 14)),
        ALL,
    ],
    ids=["bias", "repetition", "frequency", "presence", "bad words", "min tokens", "all"],
)
def test_20_000_draws_follow_what_transformers_processors_and_warpers_leave(
    shaping: Shaping,
) -> None:
    how = Sampling(
        temperature=0.9, top_k=30, top_p=0.97, min_p=0.005, seed=1, shaping=shaping
    )  # fmt: skip
    (logits,) = logits_of(1)
    expected = distribution(shaped(logits, shaping, HISTORY, NUM_PROMPT), how)
    drawn: Counter[int | None] = Counter()
    for start in range(0, NUM_DRAWS, 2000):
        # 2,000 sequences with the same history and seeds of their own.
        rows = [decoding(replace(how, seed=start + i), id=i) for i in range(2000)]
        drawn.update(Sampler().run(rows, logits.repeat(2000, 1)).tokens.values())
    assert drawn.total() == NUM_DRAWS
    assert chi_square_excess(drawn, expected) < 0


def test_each_row_is_served_as_it_would_be_alone() -> None:
    settings = [
        GREEDY,
        DRAWN,
        replace(DRAWN, top_k=3, shaping=ALL),
        replace(GREEDY, shaping=ALL, logprobs=2),
        replace(DRAWN, min_p=0.2, logprobs=0),
        replace(GREEDY, shaping=Shaping(bias=((9, 50.0),))),
    ]
    logits = logits_of(len(settings))
    rows = [decoding(sampling, id=i) for i, sampling in enumerate(settings)]
    together = Sampler().run(rows, logits.clone())
    assert together.failed == {}
    for i, row in enumerate(rows):
        alone = Sampler().run([row], logits[i : i + 1].clone())
        assert alone.tokens == {i: together.tokens[i]}
        assert [s for s in together.scores if s.sequence_id == i] == [*alone.scores]
    assert together.tokens[5] == 9


def floats(packed: bytes) -> list[float]:
    return [value for (value,) in struct.iter_unpack("<f", packed)]


def ids(packed: bytes) -> list[int]:
    return [value for (value,) in struct.iter_unpack("<i", packed)]


def test_reports_are_of_the_models_own_logits_whatever_shapes_them() -> None:
    logits = logits_of(1)
    (expected,) = logits.log_softmax(-1).tolist()
    best = sorted(range(VOCAB), key=lambda token: -expected[token])[:3]
    shaping = Shaping(bias=((best[0], -100.0),), bad_words=((best[1],),))
    result = Sampler().run([decoding(replace(GREEDY, shaping=shaping, logprobs=3))], logits)
    assert result.tokens == {0: best[2]}
    (scores,) = result.scores
    assert (scores.start, scores.num_top) == (len(HISTORY), 3)
    assert floats(scores.token_logprobs) == pytest.approx([expected[best[2]]], abs=1e-5)
    assert ids(scores.top_ids) == best
    assert floats(scores.top_logprobs) == pytest.approx([expected[i] for i in best], abs=1e-5)


def chunk(sampling: Sampling, start: int, length: int, *, sample: bool) -> Row:
    return Row(
        sequence_id=0,
        token_ids=tuple(HISTORY[start : start + length]),
        start=start,
        pages=(0,),
        sample=sample,
        sampling=sampling,
        history=HISTORY,
        num_prompt_tokens=NUM_PROMPT,
    )


@pytest.mark.parametrize(
    ("sampling", "start", "length", "count"),
    [
        (GREEDY, 0, 8, 1),
        (GREEDY, 0, 3, 0),
        (replace(GREEDY, logprobs=1), 0, 3, 0),  # the prompt's own are not asked for
        (replace(GREEDY, logprobs=1), 0, 4, 1),  # its last token says of the first new one
        (replace(GREEDY, logprobs=1), 0, 8, 5),
        (replace(GREEDY, logprobs=1), 5, 2, 2),
        (replace(GREEDY, prompt_logprobs=1), 0, 3, 3),
        (replace(GREEDY, prompt_logprobs=1), 2, 6, 6),
        (replace(GREEDY, prompt_logprobs=1), 3, 2, 0),
        (replace(GREEDY, prompt_logprobs=1), 3, 5, 1),
        (replace(GREEDY, prompt_logprobs=1, logprobs=0), 3, 2, 2),
    ],
)
def test_logits_are_wanted_where_something_is_sampled_or_reported(
    sampling: Sampling, start: int, length: int, count: int
) -> None:
    row = chunk(sampling, start, length, sample=start + length == len(HISTORY))
    other = decoding(GREEDY, id=1)
    rows, places = wanted_logits([other, row, other])
    assert [r is row for r in rows] == [False, *[True] * count, False]
    assert places == [0, *range(1 + length - count, 1 + length), 1 + length]


def scores_by_position(scores: list[Scores]) -> dict[int, float]:
    return {
        one.start + i: value for one in scores for i, value in enumerate(floats(one.token_logprobs))
    }


@pytest.mark.parametrize("cut", range(1, len(HISTORY)))
def test_what_is_read_again_is_reported_wherever_it_is_cut(cut: int) -> None:
    how = replace(GREEDY, logprobs=2, prompt_logprobs=1)
    logits = logits_of(len(HISTORY))
    found: list[Scores] = []
    for row in (
        chunk(how, 0, cut, sample=False),
        chunk(how, cut, len(HISTORY) - cut, sample=True),
    ):
        rows, places = wanted_logits([row])
        result = Sampler().run(rows, logits[[row.start + place for place in places]])
        found += result.scores
    token = int(logits[-1].argmax())
    targets = [*HISTORY[1:], token]
    expected = logits.log_softmax(-1)[range(len(HISTORY)), targets].tolist()
    by_position = scores_by_position(found)
    assert list(by_position) == list(range(1, len(HISTORY) + 1))
    assert list(by_position.values()) == pytest.approx(expected, abs=1e-5)
    assert {one.num_top for one in found if one.start < NUM_PROMPT} == {1}
    assert {one.num_top for one in found if one.start >= NUM_PROMPT} == {2}


def test_a_row_that_is_not_finite_fails_alone_and_reports_nothing() -> None:
    settings = [replace(GREEDY, logprobs=1), replace(DRAWN, shaping=ALL, logprobs=1), DRAWN]
    logits = logits_of(3)
    logits[1, 3] = torch.nan
    rows = [decoding(sampling, id=i) for i, sampling in enumerate(settings)]
    result = Sampler().run(rows, logits)
    assert result.failed == {1: NOT_FINITE}
    assert result.tokens.keys() == {0, 2}
    assert [scores.sequence_id for scores in result.scores] == [0]


def test_a_prompt_that_is_not_finite_in_its_middle_fails_though_its_end_is() -> None:
    row = chunk(replace(GREEDY, prompt_logprobs=0), 0, 8, sample=True)
    logits = logits_of(8)
    logits[2, 3] = torch.inf
    rows, _ = wanted_logits([row])
    result = Sampler().run(rows, logits)
    assert (result.tokens, result.failed, result.scores) == ({}, {0: NOT_FINITE}, [])


def test_a_row_with_every_token_banned_fails_alone_and_says_so() -> None:
    all_banned = Shaping(bad_words=tuple((token,) for token in range(VOCAB)))
    for sampling in (GREEDY, DRAWN, replace(DRAWN, top_k=3), replace(DRAWN, top_p=0.5)):
        rows = [decoding(replace(sampling, shaping=all_banned)), decoding(sampling, id=1)]
        result = Sampler().run(rows, logits_of(2))
        assert result.failed == {0: NOTHING_LEFT}
        assert result.tokens.keys() == {1}


def test_more_of_the_likeliest_than_there_are_tokens_are_all_of_them() -> None:
    result = Sampler().run([decoding(replace(GREEDY, logprobs=20))], logits_of(1)[:, :12])
    (scores,) = result.scores
    assert scores.num_top == 12
    assert sorted(ids(scores.top_ids)) == list(range(12))


def test_nothing_is_kept_of_a_sequence_that_has_left() -> None:
    sampler = Sampler()
    sampler.run([decoding(replace(GREEDY, shaping=ALL))], logits_of(1))
    assert sampler.num_shaped == 1
    sampler.release(0)
    assert sampler.num_shaped == 0
    assert sampler.run([], torch.empty(0, VOCAB)).tokens == {}
