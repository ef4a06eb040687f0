"""What the engine's step says of tokens, against transformers by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tensorwire_server.compress.errors import MeasurementError
from tensorwire_server.compress.scoring import (
    CHUNK_TOKENS,
    continue_greedily,
    logits_of,
    num_equal,
    tail_log_probability,
)
from tensorwire_server.scheduling.work import StepResult

from .pairs import TEXT

if TYPE_CHECKING:
    from tensorwire_server.engine.generator import Generator
    from tensorwire_server.scheduling.work import ModelCard, Row, StepPlan

# Two programs for the same float32 products, summed in different orders.
TOLERANCE = 2e-3
LENGTHS = (1, 2, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS - 1)


def plain_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


def ids_of(generator: Generator, count: int) -> list[int]:
    ids = generator.tokenizer.encode(TEXT * 3)[:count]
    assert len(ids) == count
    return ids


@pytest.mark.parametrize("count", LENGTHS)
def test_logits_are_those_of_transformers_wherever_the_text_is_cut(
    demo: Generator, plain_demo: Any, count: int
) -> None:
    ids = ids_of(demo, count)
    chunks = list(logits_of(demo, ids))
    assert max(map(len, chunks)) <= CHUNK_TOKENS
    torch.testing.assert_close(
        torch.cat(chunks), plain_logits(plain_demo, ids), rtol=TOLERANCE, atol=TOLERANCE
    )


def test_nothing_stays_in_the_cache(demo: Generator) -> None:
    ids = ids_of(demo, CHUNK_TOKENS + 10)
    list(logits_of(demo, ids))
    assert demo.stats()["kv_sequences"] == 0
    for _ in logits_of(demo, ids):
        assert demo.stats()["kv_sequences"] == 1
        break
    assert demo.stats()["kv_sequences"] == 0
    continue_greedily(demo, [ids, ids[:5]], 3)
    assert demo.stats()["kv_sequences"] == 0


@pytest.mark.parametrize("num_tail", [0, 1, 3, CHUNK_TOKENS + 7])
def test_a_tail_has_the_sum_of_its_tokens(demo: Generator, plain_demo: Any, num_tail: int) -> None:
    ids = ids_of(demo, CHUNK_TOKENS + 20)
    logs = plain_logits(plain_demo, ids).log_softmax(-1)
    wanted = sum(float(logs[at - 1, ids[at]]) for at in range(len(ids) - num_tail, len(ids)))
    assert tail_log_probability(demo, ids, num_tail) == pytest.approx(wanted, rel=1e-3)


def test_greedy_answers_are_those_of_transformers(demo: Generator, plain_demo: Any) -> None:
    ids = ids_of(demo, 60)
    prompts = [ids[:4], ids[10:40], ids[5:20]]
    for prompt, answer in zip(prompts, continue_greedily(demo, prompts, 12), strict=True):
        text = torch.tensor([prompt])
        made = plain_demo.generate(
            text, attention_mask=torch.ones_like(text), max_new_tokens=12, do_sample=False
        )
        assert answer == made[0, len(prompt) :].tolist()


def test_an_answer_ends_with_an_end_token(demo: Generator) -> None:
    ids = ids_of(demo, 60)
    going, ended = continue_greedily(demo, [ids[:4], ids[20:]], 8)
    assert len(going) == 8
    assert len(ended) < 8
    assert [token in demo.card.eos_ids for token in ended] == [False] * (len(ended) - 1) + [True]


class Sick:
    """An engine whose model makes no numbers; one from a folder would be refused when it loads."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self.released: list[int] = []

    def forward(self, plan: StepPlan) -> tuple[list[Row], torch.Tensor]:
        self.released += plan.released
        tokens = sum(len(row.token_ids) for row in plan.rows)
        return [], torch.full((tokens, self.card.vocab_size), torch.nan)

    def step(self, plan: StepPlan) -> StepResult:
        self.released += plan.released
        failed = {row.sequence_id: "non-finite logits" for row in plan.rows}
        return StepResult(tokens={}, failed=failed)


def test_numbers_that_are_none_are_refused_and_leave_nothing(demo: Generator) -> None:
    sick: Any = Sick(demo.card)
    with pytest.raises(MeasurementError, match="no finite numbers of the evaluation text"):
        list(logits_of(sick, [5, 6, 7]))
    assert len(sick.released) == 1
    with pytest.raises(MeasurementError, match="no finite numbers of a prompt"):
        continue_greedily(sick, [[5, 6], [7]], 4)
    assert len(sick.released) == 3


def test_equal_tokens_are_counted_to_the_first_difference_or_end() -> None:
    assert num_equal([1, 2, 3], [1, 2, 3]) == 3
    assert num_equal([1, 2, 3, 4], [1, 9, 3, 4]) == 1
    assert num_equal([1, 2], [1, 2, 3]) == 2
    assert num_equal([], [1]) == 0
    assert num_equal([1, 2, 3], [1, 2, 3], [1, 2, 4]) == 2
