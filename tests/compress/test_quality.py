"""Both folders loaded as they are served, and everything measured that there is something for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tensorwire_server.compress.errors import MeasurementError
from tensorwire_server.compress.quality import Material, Quality, measure_quality

from .demo_text import DEMO
from .pairs import MINILM

if TYPE_CHECKING:
    from pathlib import Path

LABELLED = [("It rains", "weather"), ("The sun shines", "weather"), ("I eat", "food"),
            ("Bread and butter", "food")]  # fmt: skip


def test_a_text_model_has_all_that_there_is_text_for(pruned_demo: Path) -> None:
    material = Material(windows=[[5, 6, 7, 8]] * 3, prompts=[[5, 6]], labelled=LABELLED)
    told: list[tuple[int, int, str]] = []
    quality = measure_quality(
        DEMO, pruned_demo, material, on_progress=lambda *step: told.append(step)
    )
    assert quality.text is not None
    assert quality.text.kl.value > 0
    assert quality.continuations is not None
    assert quality.accuracy is not None
    assert quality.embedding is None
    assert [done for done, _, _ in told] == list(range(1, 13))
    assert {total for _, total, _ in told} == {12}
    assert {what for _, _, what in told} == {"perplexity", "continuations", "accuracy"}


def test_an_encoder_has_cosines_and_accuracy(rounded_minilm: Path) -> None:
    material = Material(sentences=["One.", "Two.", "Three."], labelled=LABELLED)
    told: list[tuple[int, int, str]] = []
    quality = measure_quality(
        MINILM, rounded_minilm, material, on_progress=lambda *step: told.append(step)
    )
    assert quality.embedding is not None
    assert 0.5 < quality.embedding.least < 0.9999
    assert quality.accuracy is not None
    assert quality.accuracy.num_labels == 2
    assert (quality.text, quality.continuations) == (None, None)
    assert told[-1][:2] == (14, 14)


def test_without_material_nothing_is_said() -> None:
    assert measure_quality(MINILM, MINILM, Material()) == Quality()


def test_models_of_two_kinds_are_not_compared() -> None:
    with pytest.raises(MeasurementError, match="different kinds"):
        measure_quality(DEMO, MINILM, Material())
