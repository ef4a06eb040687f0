"""Fused steps equal transformers' own `generate`, for every family and what it can differ in."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import models_zoo
import pytest
import torch
from tensorwire_server.engine.fused.model import FusedModel
from tensorwire_server.engine.generator import Generator
from tensorwire_server.engine.loading import load
from tensorwire_server.scheduling.work import Row, StepPlan

from ..driving import GREEDY, Request, assert_right, compare, mixed_requests, references, run
from .variants import VARIANTS, variant_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

# float32 on a CPU, another order of additions: errors measured up to 2e-6 of the largest logit.
FLOAT_ERROR = 3e-5


@cache
def fused(variant: str, *, quantize: str = "none") -> Generator:
    engine = load(variant_folder(variant), device="cpu", backend="fused", quantize=quantize)
    assert isinstance(engine, Generator)
    assert isinstance(engine._model, FusedModel)
    return engine


def row(number: int, ids: Sequence[int], start: int = 0, *, sample: bool = True) -> Row:
    return Row(
        sequence_id=number,
        token_ids=tuple(ids),
        start=start,
        pages=(),
        sample=sample,
        sampling=GREEDY,
    )


def logits_of(engine: Generator, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits after a prompt, (1, V); the cache is empty again."""
    with torch.inference_mode():
        _, logits = engine._model.forward([row(0, ids)])
        engine._model.cache.release(0)
    return logits.clone()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_requests_joining_at_random_steps_equal_generate(variant: str) -> None:
    requests = mixed_requests(24, seed=1)
    expected = references(variant_folder(variant), requests)
    for tokens, _ in expected:  # a reference that tells right from wrong
        assert len(set(tokens)) >= min(8, len(tokens) - 2)
    made = run(fused(variant), requests)
    assert_right(compare(made.tokens, expected), at_least=500)
    assert made.largest_batch >= 12


@pytest.mark.slow
@pytest.mark.parametrize("step_tokens", [16, 40, 4096])
def test_the_size_of_prompt_chunks_changes_nothing(step_tokens: int) -> None:
    requests = mixed_requests(16, seed=2)
    expected = references(variant_folder("qwen3"), requests)
    made = run(fused("qwen3"), requests, max_running=16, step_tokens=step_tokens)
    assert_right(compare(made.tokens, expected))


def slow_prompts(plan: StepPlan) -> float:
    """Say what a step took where a prompt's token takes as long as a whole step without any."""
    tokens = [len(one.token_ids) * _share_of_layers(one) for one in plan.rows]
    return 1.0 + sum(number for number in tokens if number > 1)


def _share_of_layers(row: Row) -> float:
    first, last = row.layers or (0, 3)
    return (last - first) / 3


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3", "olmo2"])
def test_prompts_that_go_through_a_layer_at_a_time_equal_generate(variant: str) -> None:
    requests = mixed_requests(16, seed=3)
    expected = references(variant_folder(variant), requests)
    limits = {3: 5, 7: 20}
    made = run(
        fused(variant), requests, num_pages=24, took_s=slow_prompts, cancel_after=limits,
        expected_share=0.0,
    )  # fmt: skip
    for number in made.cancelled:
        length = len(made.tokens[number])
        expected[number] = expected[number][0][:length], expected[number][1][:length]
    assert_right(compare(made.tokens, expected), at_least=350)
    assert made.paths["some of the layers"] >= 30
    assert made.stats["preemptions"] >= 1


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "olmo2"])
def test_a_chunk_may_stop_behind_any_layer_and_go_on_beside_others(variant: str) -> None:
    engine = fused(variant)
    ids = [5 + 7 * i % 500 for i in range(150)]
    right = logits_of(engine, ids)
    beside = [9, 8, 7, 6, 5]
    forward = engine._model.forward
    with torch.inference_mode():
        forward([row(0, ids[:60], sample=False), row(1, beside[:1], sample=False)])
        for i, layers in enumerate([(0, 1), (1, 2), (1, 2), (2, 3)]):  # one is told twice
            chunk = row(0, ids[60:], 60, sample=layers[1] == 3)
            chunk.layers = layers
            rows, logits = forward([chunk, row(1, beside[i + 1 : i + 2], i + 1)])
            assert {one.sequence_id for one in rows} == ({0, 1} if chunk.sample else {1})
        decoded = logits[[one.sequence_id for one in rows].index(1)].clone()
        mine = logits[[one.sequence_id for one in rows].index(0)].clone()
        forward([row(0, [3], 150), row(1, [3], 5)])
        assert len(engine._model.cache.halfway) == 0
        engine._model.cache.release(0)
        engine._model.cache.release(1)
    assert (mine - right[0]).abs().max() <= FLOAT_ERROR * right.abs().max()
    alone = logits_of(engine, beside)
    assert (decoded - alone[0]).abs().max() <= FLOAT_ERROR * alone.abs().max()


def test_a_sequence_that_leaves_between_two_layers_leaves_nothing() -> None:
    engine = fused("llama")
    chunk = row(1, [5, 6, 7], sample=False)
    chunk.layers = (0, 2)
    assert engine.step(StepPlan(rows=(chunk,), released=())).tokens == {}
    halfway = engine._model.cache.halfway
    assert len(halfway) == 1
    engine.step(StepPlan(rows=(), released=(1,)))
    assert len(halfway) == 0
    engine._model.cache.check_invariants()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_logits_are_those_of_the_modules(variant: str) -> None:
    modules = load(variant_folder(variant), device="cpu", backend="any")
    assert isinstance(modules, Generator)
    ids = [5 + 7 * i % 500 for i in range(40)]
    mine, theirs = logits_of(fused(variant), ids), logits_of(modules, ids)
    assert (mine - theirs).abs().max() <= FLOAT_ERROR * theirs.abs().max()


class ShiftedPositions(FusedModel):
    """Continues every sequence one position too late."""

    def positions(self, rows: Sequence[Row]) -> list[int]:
        return [position + (rows[0].start > 0) for position in super().positions(rows)]


@pytest.mark.slow
def test_a_position_too_far_turns_the_comparison_red() -> None:
    requests = [replace(request, joins_at_step=0) for request in mixed_requests(8, seed=1)]
    expected = references(variant_folder("llama"), requests)
    model = fused("llama")._model
    assert isinstance(model, FusedModel)
    shifted = ShiftedPositions(model._d, model._weights, model.cache, num_parameters=0)
    engine = Generator(shifted, fused("llama").tokenizer, fused("llama").card)
    assert len(compare(run(engine, requests).tokens, expected).wrong) >= 4


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_step_in_which_nobody_samples_gives_no_logits(quantize: str) -> None:
    engine = fused("llama", quantize=quantize)
    with torch.inference_mode():
        rows, logits = engine._model.forward([row(1, [5, 6, 7], sample=False)])
    assert rows == []
    assert logits.shape == (0, models_zoo.VOCAB_SIZE)
    made = engine.step(StepPlan(rows=(row(1, [8], 3),), released=()))
    whole = engine.step(StepPlan(rows=(row(2, [5, 6, 7, 8]),), released=(1,)))
    engine.step(StepPlan(rows=(), released=(2,)))
    assert [*made.tokens.values()] == [*whole.tokens.values()]


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_non_finite_numbers_fail_their_row_alone(quantize: str) -> None:
    engine = load(variant_folder("llama"), device="cpu", backend="fused", quantize=quantize)
    assert isinstance(engine, Generator)
    assert isinstance(engine._model, FusedModel)
    poison = 300
    with torch.inference_mode():
        engine._model._weights.embedding_VC[poison] = float("nan")
    alone = engine.step(StepPlan(rows=(row(1, [5, 6, 7]),), released=())).tokens[1]
    rows = (row(1, [5, 6, 7]), row(2, [5, poison, 7]), row(3, [5, 6, 7]))
    made = engine.step(StepPlan(rows=rows, released=(1,)))
    assert made.failed == {2: "non-finite logits"}
    assert made.tokens == {1: alone, 3: alone}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama-biases", "qwen3", "granite", "olmo2"])
def test_8_bits_move_the_logits_by_a_few_percent(variant: str) -> None:
    # Random weights: measured 0.018 to 0.052 of the largest logit.
    errors = []
    for salt in range(8):
        ids = [3 + (salt * 31 + 7 * i) % 500 for i in range(30)]
        right = logits_of(fused(variant), ids)
        error = (logits_of(fused(variant, quantize="int8"), ids) - right).abs().max()
        errors.append(float(error / right.abs().max()))
    assert 1e-4 < max(errors) < 0.1


def test_8_bits_answer_a_row_the_same_whatever_its_company_is() -> None:
    engine = fused("llama", quantize="int8")
    ids = [5, 6, 7, 8, 9, 10]
    alone = logits_of(engine, ids)
    company = [row(i, [(11 * i + 3 * j) % 500 for j in range(1 + 9 * i)]) for i in range(1, 6)]
    with torch.inference_mode():
        rows, logits = engine._model.forward([row(0, ids), *company])
        for number in range(6):
            engine._model.cache.release(number)
    mine = logits[[r.sequence_id for r in rows].index(0)]
    # Sums of floats in another order flip a rounding to 8 bits now and then, no more.
    assert (mine - alone[0]).abs().max() <= 0.01 * alone.abs().max()


def sampled_alone_and_together(engine: Generator) -> tuple[list[int], list[int]]:
    request = Request(prompt_ids=(5, 6, 7), max_new_tokens=30)
    others = [Request(prompt_ids=(9 + i, 8), max_new_tokens=30) for i in range(12)]
    alone = run(engine, [request], stop_ids=frozenset()).tokens[0]
    return alone, run(engine, [request, *others], stop_ids=frozenset()).tokens[0]


def test_a_greedy_answer_does_not_depend_on_its_company() -> None:
    alone, together = sampled_alone_and_together(fused("llama"))
    assert alone == together
