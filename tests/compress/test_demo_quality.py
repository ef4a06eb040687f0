"""What methods are worth, on a model that knows something: perplexity on text held out from it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import corpus
import pytest
from tensorwire_server.compress import (
    Quantization,
    Recipe,
    Rounding,
    compress,
    prune_model,
    quantize_model,
)

from .demo_text import (
    CALIBRATION_UNITS,
    EVALUATION_UNITS,
    calibration_windows,
    load_demo,
    perplexity,
    write_text,
)

if TYPE_CHECKING:
    from pathlib import Path

INT4_GPTQ = Quantization(bits=4, group_size=32, rounding=Rounding.GPTQ)


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
    gptq = quantized_perplexity(INT4_GPTQ)
    nearest = quantized_perplexity(Quantization(bits=4, group_size=32))
    assert parents_perplexity() < gptq < nearest
    assert gptq < 1.05 * parents_perplexity()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "most"), [(Quantization(bits=8), 1.01), (INT4_GPTQ, 1.05)], ids=["8", "4"]
)
def test_what_the_engine_serves_of_it_keeps_it_as_well(
    tmp_path: Path, quantization: Quantization, most: float
) -> None:
    """With 8 bits the engine rounds activations as well, which transformers does not."""
    recipe = Recipe(
        quantize=quantization,
        calibrate=write_text(tmp_path / "calibrate.txt", CALIBRATION_UNITS),
        evaluate=write_text(tmp_path / "evaluate.txt", EVALUATION_UNITS),
        num_windows=16,
        window_tokens=256,
        speed=False,
    )
    text = compress("demo", recipe, tmp_path / "out").quality.text
    assert text is not None
    assert text.num_windows >= 16
    assert text.perplexity_ratio.value < most


def test_a_quarter_of_the_neurons_can_go() -> None:
    model = load_demo()
    prune_model(model, 0.25, structure="neurons", calibration=calibration_windows(0))
    assert perplexity(model) < 1.1 * parents_perplexity()
