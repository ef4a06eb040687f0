"""Prefixes that are found and sequences that are preempted change no token of any answer."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import models_zoo
import pytest
import torch
from tensorwire_server.engine.generator import Generator
from tensorwire_server.engine.loading import load
from tensorwire_server.scheduling.work import Sampling

from .driving import Request, assert_right, compare, references, run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorwire_server.scheduling.work import StepPlan, StepResult

NO_STOP: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def engine() -> Generator:
    loaded = load(models_zoo.tiny_model("llama"), device="cpu")
    assert isinstance(loaded, Generator)
    return loaded


def alike(count: int, *, shared: int = 72, own: int = 9, new: int = 24) -> list[Request]:
    """Requests that begin with one of two texts; every fourth is all the same as another one."""
    rng = random.Random(3)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, models_zoo.VOCAB_SIZE) for _ in range(number))

    texts = [ids(shared), ids(shared)]
    requests = [
        Request(prompt_ids=texts[i % 2] + ids(own), max_new_tokens=new, joins_at_step=i)
        for i in range(count)
    ]
    return [
        replace(requests[i - 3], joins_at_step=i) if i % 4 == 3 else requests[i]
        for i in range(count)
    ]


@pytest.mark.parametrize("step_tokens", [17, 64, 512])
def test_a_prefix_that_is_found_gives_the_tokens_of_one_that_is_read(
    engine: Generator, step_tokens: int
) -> None:
    requests = alike(16)
    made = run(engine, requests, max_running=8, step_tokens=step_tokens)
    assert made.stats["prefix_hit_tokens"] >= 10 * 64, "hits did not happen"
    assert_right(compare(made.tokens, references(models_zoo.tiny_model("llama"), requests)))


def test_a_preempted_sequence_gives_the_tokens_of_one_that_was_let_run(engine: Generator) -> None:
    requests = [replace(request, joins_at_step=0) for request in alike(12, shared=15, new=100)]
    made = run(engine, requests, max_running=8, num_pages=26, expected_share=0.0)
    assert made.stats["preemptions"] >= 3, "nobody was preempted"
    assert made.stats["recomputed_tokens"] >= 1, "nothing was computed again"
    assert made.stats["page_evictions"] >= 1, "nothing was evicted"
    assert_right(compare(made.tokens, references(models_zoo.tiny_model("llama"), requests)))


@pytest.mark.parametrize(("num_pages", "path"), [(512, "prefix_hit_tokens"), (26, "preemptions")])
def test_a_seed_draws_the_same_through_hits_and_preemption(
    engine: Generator, num_pages: int, path: str
) -> None:
    requests = [
        replace(
            request,
            joins_at_step=0,
            sampling=Sampling(temperature=1.1, top_k=30, top_p=0.95, seed=50 + i),
        )
        for i, request in enumerate(alike(8, shared=40, new=40))
    ]
    alone = [run(engine, [request], stop_ids=NO_STOP).tokens[0] for request in requests]
    made = run(engine, requests, num_pages=num_pages, expected_share=0.0, stop_ids=NO_STOP)
    assert made.stats[path] >= 1
    assert made.tokens == alone
    assert len({tuple(tokens) for tokens in alone}) == 8


def test_choices_of_one_prompt_read_it_once(engine: Generator) -> None:
    request = alike(1, shared=100)[0]
    choices = [
        replace(request, sampling=Sampling(temperature=1.0, top_k=None, top_p=1.0, seed=7 + i))
        for i in range(6)
    ]
    alone = [run(engine, [choice], stop_ids=NO_STOP).tokens[0] for choice in choices]
    made = run(engine, choices, step_tokens=64, stop_ids=NO_STOP)
    # 109 tokens, of which each feeds the last one, for its logits.
    assert made.stats["prefix_hit_tokens"] == 5 * 108
    assert made.num_prompt_tokens == 109 + 5
    assert made.tokens == alone


@pytest.mark.parametrize("length", [2, 15, 16, 17, 18, 129])
@pytest.mark.parametrize("joins_at_step", [0, 3])
def test_a_choice_begins_with_all_that_another_has_read_however_long_the_prompt_is(
    engine: Generator, length: int, joins_at_step: int
) -> None:
    """Together, or while the first one is being continued; less than a page nobody waits for."""
    request = alike(1, shared=length, own=0)[0]
    choices = [replace(request, joins_at_step=i and joins_at_step) for i in range(4)]
    made = run(engine, choices)
    waits = joins_at_step or length > 16
    assert made.num_prompt_tokens == (length + 3 if waits else 4 * length)
    assert_right(compare(made.tokens, references(models_zoo.tiny_model("llama"), choices)))


class Meddler:
    """Swaps a page that is about to be loaded with one of another text.

    Keys know their positions, so two pages of one text could be swapped without harm.
    """

    def __init__(self, engine: Generator) -> None:
        self._engine = engine
        self.card, self.tokenizer = engine.card, engine.tokenizer
        self.num_swaps = 0

    def step(self, plan: StepPlan) -> StepResult:
        store = self._engine._model.cache.store
        for loaded in plan.loads:
            first = store.page(loaded.pages[0])
            others = sorted(store._held.keys() - loaded.pages)
            others = [page for page in others if store.page(page).shape == first.shape]
            if others:
                with torch.inference_mode():
                    second = store.page(others[0])
                    kept = first.clone()
                    first.copy_(second)
                    second.copy_(kept)
                self.num_swaps += 1
        return self._engine.step(plan)

    def stats(self) -> Mapping[str, int]:
        return self._engine.stats()


def test_two_swapped_pages_of_the_store_turn_the_comparison_red(engine: Generator) -> None:
    requests = alike(6)
    meddler = Meddler(engine)
    made = run(meddler, requests)
    assert meddler.num_swaps >= 1
    assert compare(made.tokens, references(models_zoo.tiny_model("llama"), requests)).wrong


@pytest.mark.slow
@pytest.mark.parametrize("family", models_zoo.FAMILIES)
def test_every_family_takes_hits_and_preemption(family: str) -> None:
    loaded = load(models_zoo.tiny_model(family), device="cpu")
    assert isinstance(loaded, Generator)
    requests = [
        replace(one, joins_at_step=i // 2) for i, one in enumerate(alike(8, shared=40, new=64))
    ]
    expected = references(models_zoo.tiny_model(family), requests)
    for num_pages, path in [(512, "prefix_hit_tokens"), (16, "preemptions")]:
        made = run(loaded, requests, num_pages=num_pages, expected_share=0.0)
        assert made.stats[path] >= 1
        assert_right(compare(made.tokens, expected))
