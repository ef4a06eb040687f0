"""Perplexity, divergence and agreement of a child and its parent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tensorwire_server.compress.errors import MeasurementError
from tensorwire_server.compress.intervals import Estimate
from tensorwire_server.compress.text_quality import (
    CONTINUED_TOKENS,
    compare,
    measure_continuations,
    measure_text,
)

from .pairs import TEXT

if TYPE_CHECKING:
    from tensorwire_server.engine.generator import Generator

# Float32 products summed in another order, over some hundred tokens.
TOLERANCE = 1e-4


def windows_of(generator: Generator, *lengths: int) -> list[list[int]]:
    ids = generator.tokenizer.encode(TEXT * 4)
    return [ids[10 * place : 10 * place + length] for place, length in enumerate(lengths)]


def plain_logs(model: Any, window: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([window])).logits[0]
    return torch.log_softmax(logits.double(), -1)[:-1]


def plain_perplexity(model: Any, windows: list[list[int]]) -> float:
    total, count = 0.0, 0
    for window in windows:
        next_T = torch.tensor(window[1:])
        total -= float(plain_logs(model, window).gather(1, next_T[:, None]).sum())
        count += len(next_T)
    return math.exp(total / count)


def measured(parent: Generator, child: Generator, windows: list[list[int]]) -> Any:
    return measure_text(parent, child, windows, seed=0, on_window=lambda: None)


def test_perplexity_is_that_of_transformers(
    demo: Generator, child: Generator, plain_demo: Any, plain_child: Any
) -> None:
    windows = windows_of(demo, 150, 40, 2, 129)
    quality = measured(demo, child, windows)
    before, after = (plain_perplexity(model, windows) for model in (plain_demo, plain_child))
    assert quality.perplexity_before.value == pytest.approx(before, rel=TOLERANCE)
    assert quality.perplexity_after.value == pytest.approx(after, rel=TOLERANCE)
    assert quality.perplexity_ratio.value == pytest.approx(after / before, rel=TOLERANCE)
    assert after > 1.05 * before  # else the pair would prove little
    assert (quality.num_windows, quality.num_tokens) == (4, 149 + 39 + 1 + 128)


def test_divergence_and_agreement_are_those_of_transformers(
    demo: Generator, child: Generator, plain_demo: Any, plain_child: Any
) -> None:
    window = windows_of(demo, 140)[0]
    quality = measured(demo, child, [window])
    before, after = plain_logs(plain_demo, window), plain_logs(plain_child, window)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    same = float((before.argmax(-1) == after.argmax(-1)).double().mean())
    assert quality.kl.value == pytest.approx(kl, rel=1e-3)
    assert quality.agreement.value == pytest.approx(same)
    assert 0 < same < 1


def test_a_model_does_not_differ_from_itself(demo: Generator) -> None:
    quality = measured(demo, demo, windows_of(demo, *[20] * 10))
    assert quality.kl == Estimate(value=0.0, low=0.0, high=0.0)
    assert quality.perplexity_ratio == Estimate(value=1.0, low=1.0, high=1.0)
    assert quality.agreement == Estimate(value=1.0, low=1.0, high=1.0)
    before = quality.perplexity_before
    assert before == quality.perplexity_after
    assert before.low < before.value < before.high


def test_two_small_distributions_diverge_as_by_hand() -> None:
    before = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    after = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log() + 7.0  # logits have no fixed height
    tokens, loss_before, loss_after, kl, same = compare(before, after, torch.tensor([0, 1]))
    assert tokens == 2
    assert loss_before == pytest.approx(-math.log(0.5) - math.log(0.1), rel=1e-5)
    assert loss_after == pytest.approx(-math.log(0.25) - math.log(0.1), rel=1e-5)
    # Of the child from the parent, not the other way round (0.1308).
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), rel=1e-5)
    assert same == 1


def test_other_vocabularies_are_refused(demo: Generator, other_words: Generator) -> None:
    with pytest.raises(MeasurementError, match="different vocabularies"):
        measured(demo, other_words, [[1, 2, 3]])


def test_continuations_count_up_to_the_first_difference(
    demo: Generator, child: Generator, plain_demo: Any, plain_child: Any
) -> None:
    prompts = windows_of(demo, *[8] * 10)

    def answer(model: Any, prompt: list[int]) -> list[int]:
        text = torch.tensor([prompt])
        made = model.generate(
            text, attention_mask=torch.ones_like(text), do_sample=False,
            max_new_tokens=CONTINUED_TOKENS,
        )  # fmt: skip
        return list(made[0, len(prompt) :].tolist())

    equal, total = 0, 0
    for prompt in prompts:
        wanted, found = answer(plain_demo, prompt), answer(plain_child, prompt)
        total += len(wanted)
        while wanted and found and wanted.pop(0) == found.pop(0):
            equal += 1
    result = measure_continuations(demo, child, prompts, seed=0)
    assert (result.num_prompts, result.num_tokens) == (10, total)
    assert result.agreement.value == pytest.approx(equal / total)
    assert 0 < equal < total


def test_a_models_answers_are_its_own(demo: Generator) -> None:
    prompts = windows_of(demo, *[6] * 8)
    same = measure_continuations(demo, demo, prompts, seed=0).agreement
    assert same == Estimate(value=1.0, low=1.0, high=1.0)
