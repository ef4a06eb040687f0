"""Sampled tokens and their reports are the same alone, in company, and however often read again."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import models_zoo
import numpy as np
import pytest
from emissions import each
from tensorwire_server.engine.generator import Generator
from tensorwire_server.engine.loading import load
from tensorwire_server.scheduling.continuous import ContinuousScheduler
from tensorwire_server.scheduling.pages import PagePool
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import Sampling, Shaping
from tensorwire_server.workers.logprobs import LogprobBook

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.slow

# Read in other chunks, a token's logits differ in the last bits of a float32.
TOLERANCE = 2e-4
PAGE_TOKENS = 16
COUNT = 40
SHARED = tuple(random.Random(1).randrange(3, models_zoo.VOCAB_SIZE) for _ in range(64))
PLAIN = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
SHAPING = Shaping(
    bias=((20, 1.0), (21, -3.0)),
    repetition_penalty=1.3,
    frequency_penalty=0.5,
    presence_penalty=0.4,
    bad_words=((30,), (31, 32)),
    min_new_tokens=COUNT - 2,
    stop_ids=(2, 40, 41),
)
SETTINGS = [
    PLAIN,
    replace(PLAIN, shaping=SHAPING, logprobs=2),
    Sampling(temperature=1.0, top_k=None, top_p=1.0, seed=3, prompt_logprobs=1),
    Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=4, shaping=SHAPING),
    Sampling(temperature=1.3, top_k=None, top_p=0.95, min_p=0.02, seed=5, shaping=SHAPING),
    Sampling(
        temperature=1.1, top_k=99, top_p=0.99, min_p=0.01, seed=6, shaping=SHAPING,
        logprobs=3, prompt_logprobs=2,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What one sequence came to."""

    tokens: list[int]
    reports: Mapping[str, Any]


def prompt(number: int) -> tuple[int, ...]:
    rng = random.Random(number)
    return (*SHARED, *(rng.randrange(3, models_zoo.VOCAB_SIZE) for _ in range(8 + 3 * number)))


def run(
    engine: Generator, numbers: list[int], *, num_pages: int, step_tokens: int
) -> tuple[dict[int, Made], Mapping[str, float]]:
    scheduler = ContinuousScheduler(
        PagePool(num_pages, PAGE_TOKENS),
        max_running=8,
        step_tokens=step_tokens,
        max_waiting=64,
        model="m",
        share_prefixes=True,
        expected_share=0.1,  # admit more than there is room for
    )
    books: dict[int, LogprobBook] = {}
    tokens: dict[int, list[int]] = {}
    for number in numbers:
        sampling = SETTINGS[number % len(SETTINGS)]
        books[number] = LogprobBook(sampling, prompt(number))
        tokens[number] = []
        scheduler.submit(
            Sequence(
                id=number,
                prompt_ids=prompt(number),
                max_new_tokens=COUNT,
                sampling=sampling,
                arrived_at=float(number),
            )
        )
    step = 0
    while (plan := scheduler.plan(float(step))) is not None:
        step += 1
        result = engine.step(plan)
        for scores in result.scores:
            books[scores.sequence_id].add(scores)
        for emission in each(scheduler.commit(plan, result)):
            tokens[emission.sequence_id].append(emission.token_id)
        assert not scheduler.take_failed()
    scheduler.check_invariants()
    made = {
        number: Made(tokens[number], books[number].to_wire(COUNT, must_be_whole=True))
        for number in numbers
    }
    return made, scheduler.stats()


def test_company_hits_and_preemption_change_neither_a_draw_nor_a_report() -> None:
    engine = load(models_zoo.tiny_model("llama"), device="cpu")
    assert isinstance(engine, Generator)
    numbers = list(range(2 * len(SETTINGS)))
    alone: dict[int, Made] = {}
    for number in numbers:
        alone |= run(engine, [number], num_pages=200, step_tokens=512)[0]
    # Room for some four of them, so that they push one another out; a second wave finds prefixes.
    together, counts = run(engine, numbers, num_pages=36, step_tokens=24)
    assert counts["preemptions"] > 0
    assert counts["recomputed_tokens"] > 0
    assert counts["prefix_hit_tokens"] > 0
    for number in numbers:
        one, other = alone[number], together[number]
        assert len(one.tokens) == COUNT
        assert other.tokens == one.tokens, SETTINGS[number % len(SETTINGS)]
        assert other.reports.keys() == one.reports.keys()
        for name, columns in one.reports.items():
            for column, packed in columns.items():
                if column.endswith("_ids"):
                    assert other.reports[name][column] == packed
                else:
                    np.testing.assert_allclose(
                        np.frombuffer(other.reports[name][column], dtype="<f4"),
                        np.frombuffer(packed, dtype="<f4"),
                        atol=TOLERANCE,
                        rtol=0,
                    )
    assert len({tuple(one.tokens) for one in alone.values()}) == len(numbers)
    assert engine._sampler.num_shaped == 0
