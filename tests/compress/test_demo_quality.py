"""What methods are worth, on a model that knows something: perplexity on text held out from it."""

from __future__ import annotations

from functools import cache

import corpus
import pytest
from tensorwire_server.compress import Quantization, Rounding, prune_model, quantize_model

from .demo_text import (
    CALIBRATION_UNITS,
    EVALUATION_UNITS,
    calibration_windows,
    load_demo,
    perplexity,
)


@cache
def parents_perplexity() -> float:
    return perplexity(load_demo())


@cache
def magnitude_perplexity() -> float:
    model = load_demo()
    prune_model(model, 0.5)
    return perplexity(model)


def quantized_perplexity(quantization: Quantization) -> float:
    model = load_demo()
    quantize_model(model, quantization, calibration=calibration_windows(0))
    return perplexity(model)


def test_the_texts_were_held_out_from_training_and_are_not_the_same() -> None:
    assert all(corpus.is_held_out(unit) for unit in (*CALIBRATION_UNITS, *EVALUATION_UNITS))
    assert not set(CALIBRATION_UNITS) & set(EVALUATION_UNITS)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wanda_beats_magnitude_at_half_of_the_weights(seed: int) -> None:
    model = load_demo()
    prune_model(model, 0.5, method="wanda", calibration=calibration_windows(seed))
    assert parents_perplexity() < perplexity(model) < magnitude_perplexity()


def test_int8_keeps_the_perplexity_to_a_hundredth() -> None:
    assert quantized_perplexity(Quantization(bits=8)) < 1.01 * parents_perplexity()


def test_int4_by_gptq_keeps_it_to_a_twentieth_and_beats_rounding_to_nearest() -> None:
    gptq = quantized_perplexity(Quantization(bits=4, group_size=32, rounding=Rounding.GPTQ))
    nearest = quantized_perplexity(Quantization(bits=4, group_size=32))
    assert parents_perplexity() < gptq < nearest
    assert gptq < 1.05 * parents_perplexity()


def test_a_quarter_of_the_neurons_can_go() -> None:
    model = load_demo()
    prune_model(model, 0.25, structure="neurons", calibration=calibration_windows(0))
    assert perplexity(model) < 1.1 * parents_perplexity()
