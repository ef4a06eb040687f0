"""Logits become what transformers' processors make of them; counts live as long as needed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorwire_server.engine.shaping import Shaper, TokenCounts
from tensorwire_server.scheduling.work import Row, Sampling, Shaping

from .references import row_of, shaped

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCAB = 24
PLAIN = Sampling(temperature=1.0, top_k=None, top_p=1.0, seed=0)
IDS = st.integers(0, VOCAB - 1)
SHAPINGS = st.builds(
    Shaping,
    bias=st.dictionaries(IDS, st.floats(-100, 100, width=32), max_size=4).map(
        lambda bias: tuple(bias.items())
    ),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 10.0]),
    frequency_penalty=st.sampled_from([0.0, -2.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, -0.4, 2.0]),
    bad_words=st.lists(st.lists(IDS, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
    min_new_tokens=st.integers(0, 6),
    stop_ids=st.lists(IDS, min_size=1, max_size=3, unique=True).map(tuple),
)
HISTORIES = st.tuples(
    st.lists(IDS, min_size=1, max_size=20), st.lists(IDS, max_size=20)
)  # prompt, answer


def logits_of(seed: int, rows: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def row(shaping: Shaping | None, prompt: list[int], answer: list[int], id: int = 0) -> Row:
    sampling = replace(PLAIN, shaping=shaping)
    return row_of(sampling, prompt + answer, num_prompt_tokens=len(prompt), sequence_id=id)


@settings(deadline=None)  # torch's first call takes its time
@given(
    st.lists(st.tuples(st.none() | SHAPINGS, HISTORIES), min_size=1, max_size=5),
    st.integers(0, 1000),
)
def test_each_row_is_shaped_as_transformers_processors_shape_it_alone(
    wanted: list[tuple[Shaping | None, tuple[list[int], list[int]]]], seed: int
) -> None:
    logits = logits_of(seed, len(wanted))
    expected = [
        plain if shaping is None else shaped(plain, shaping, prompt + answer, len(prompt))
        for plain, (shaping, (prompt, answer)) in zip(logits.clone(), wanted, strict=True)
    ]
    rows = [row(shaping, *history, id=i) for i, (shaping, history) in enumerate(wanted)]
    Shaper().shape(logits, rows)
    # The same few float32 operations in another order of factors.
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-5, atol=1e-4)


@settings(deadline=None)
@given(SHAPINGS, HISTORIES)
def test_what_was_counted_step_by_step_is_what_is_counted_at_once(
    shaping: Shaping, history: tuple[list[int], list[int]]
) -> None:
    prompt, answer = history
    steady, tokens = Shaper(), list(prompt)
    living = row_of(replace(PLAIN, shaping=shaping), tokens, num_prompt_tokens=len(prompt))
    for token in [*answer, 0]:
        logits = logits_of(len(tokens), 1)
        afresh = logits.clone()
        steady.shape(logits, [living])
        Shaper().shape(afresh, [living])
        assert torch.equal(logits, afresh)
        tokens.append(token)  # the scheduler's own list: it grows under the row


PENALISED = Shaping(repetition_penalty=1.5, frequency_penalty=0.5)


def test_a_token_is_counted_once_however_often_its_row_is_shaped() -> None:
    counts = TokenCounts(num_prompt_tokens=2)
    tokens = [5, 6, 5, 7]
    counts.read(tokens)
    counts.read(tokens)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == {5: 1, 6: 0, 7: 1}
    tokens += [7, 8]
    counts.read(tokens)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == {
        5: 1, 6: 0, 7: 2, 8: 1,
    }  # fmt: skip


def test_counts_grow_beyond_any_room_they_began_with() -> None:
    counts = TokenCounts(num_prompt_tokens=1)
    counts.read([0, *range(1, 5000), *range(1, 5000)])
    assert counts.ids.tolist() == list(range(5000))
    assert counts.counts.tolist() == [0, *[2] * 4999]


def test_a_sequence_that_has_left_is_forgotten_and_counted_again_if_it_comes_back() -> None:
    shaper = Shaper()
    living = row(PENALISED, [1, 2], [3, 3])
    shaper.shape(logits_of(0, 1), [living])
    assert len(shaper) == 1
    shaper.release(living.sequence_id)
    assert len(shaper) == 0
    again, fresh = logits_of(1, 1), logits_of(1, 1)
    shaper.shape(again, [living])
    Shaper().shape(fresh, [living])
    assert torch.equal(again, fresh)


def test_an_id_that_is_used_for_another_sequence_brings_no_counts_along() -> None:
    shaper = Shaper()
    shaper.shape(logits_of(0, 1), [row(PENALISED, [1, 2, 3], [4, 4, 4])])
    logits, expected = logits_of(1, 1), logits_of(1, 1)
    shaper.shape(logits, [row(PENALISED, [7], [8])])
    Shaper().shape(expected, [row(PENALISED, [7], [8])])
    assert torch.equal(logits, expected)


def test_rows_that_ask_for_nothing_are_left_as_they_are_and_nothing_is_kept_of_them() -> None:
    shaper = Shaper()
    logits = logits_of(0, 2)
    before = logits.clone()
    assert shaper.shape(logits, [row(None, [1], [2]), row(None, [1], [2], id=1)]) == []
    assert len(shaper) == 0
    assert shaper.shape(logits, [row(None, [1], [2]), row(Shaping(), [1], [2], id=1)]) == []
    assert torch.equal(logits, before)


class CountedTuple(tuple[Any, ...]):
    """Counts how often it is read."""

    num_reads = 0

    def __iter__(self) -> Iterator[Any]:
        CountedTuple.num_reads += 1
        return super().__iter__()


def test_what_a_request_says_is_read_at_its_first_step_only() -> None:
    said = Shaping(
        bias=CountedTuple([(3, 1.0)]),
        bad_words=CountedTuple([(5,), (1, 2)]),
        min_new_tokens=9,
        stop_ids=CountedTuple([4]),
    )
    CountedTuple.num_reads = 0
    shaper = Shaper()
    reads = []
    for length in range(1, 5):
        shaper.shape(logits_of(0, 1), [row(said, [1] * length, [])])
        reads.append(CountedTuple.num_reads)
    assert reads == reads[:1] * 4


def test_a_models_stop_id_without_a_logit_is_banned_in_no_row() -> None:
    said = Shaping(min_new_tokens=9, stop_ids=(VOCAB + 2,), bad_words=((VOCAB + 3,),))
    logits = logits_of(0, 3)
    before = logits.clone()
    rows = [row(said, [1], [], id=at) for at in range(3)]
    assert Shaper().shape(logits, rows) == []
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("shaping", "banned"),
    [
        (Shaping(bad_words=((4,),)), {4}),
        (Shaping(bad_words=((2, 3, 9),)), {9}),
        (Shaping(bad_words=((1, 2, 3, 9),)), {9}),  # begun in the prompt
        (Shaping(bad_words=((3, 2, 9),)), set()),
        (Shaping(bad_words=((0, 1, 2, 3, 9),)), set()),  # longer than what is there
        (Shaping(min_new_tokens=2, stop_ids=(5, 6)), {5, 6}),
        (Shaping(min_new_tokens=1, stop_ids=(5, 6)), set()),
    ],
)
def test_what_is_banned_depends_on_what_came_before(shaping: Shaping, banned: set[int]) -> None:
    logits = logits_of(0, 1)
    changed = Shaper().shape(logits, [row(shaping, [1, 2], [3])])
    assert set(torch.isinf(logits[0]).nonzero()[:, 0].tolist()) == banned
    assert changed == ([0] if banned else [])


def test_one_token_alone_may_be_left_whatever_else_is_asked() -> None:
    logits = logits_of(0, 2)
    shaping: Any = Shaping(bad_words=((4,),), bias=((7, 100.0),), only=4)
    Shaper().shape(logits, [row(shaping, [1], []), row(None, [1], [], id=1)])
    assert logits[0].argmax() == 4
    assert torch.isfinite(logits[0]).sum() == 1
    assert torch.isfinite(logits[1]).all()
