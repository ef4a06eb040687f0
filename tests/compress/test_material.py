"""What models are calibrated with and judged on is what they read when they are served."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import models_zoo
import pytest
import torch
import transformers
from tensorwire_server.compress.material import Texts, calibration_of, evaluation_of, read_texts
from tensorwire_server.compress.parent import load_parent
from tensorwire_server.compress.quality import measure_quality
from tensorwire_server.compress.recipe import Quantization, Recipe, RecipeError
from tensorwire_server.compress.text import Text
from tensorwire_server.engine.loading import load

from .pairs import MINILM, TEXT

if TYPE_CHECKING:
    from pathlib import Path

LINES = tuple(TEXT.splitlines())
TEXTS = Texts(
    calibration=Text(path="a", documents=("\n".join(LINES),), sha256="0"),
    evaluation=Text(path="b", documents=(TEXT.upper(),), sha256="1"),
    labelled=(),
    named=(),
)
RECIPE = Recipe(quantize=Quantization(bits=8), num_windows=4, window_tokens=64, speed=False)


def write_llama(folder: Path, *, begins: bool = False, **said: Any) -> Path:
    """Write a tiny model whose tokenizer says more than a usual one."""
    models_zoo.write_model(folder, "llama")
    models_zoo.save_tokenizer(
        folder, models_zoo.metaspace_tokenizer() if begins else models_zoo.byte_level_tokenizer()
    )
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return folder


def test_windows_begin_as_served_prompts_do(tmp_path: Path) -> None:
    parent = load_parent(str(write_llama(tmp_path / "model", begins=True)))
    material = evaluation_of(parent, TEXTS, RECIPE)
    calibration = calibration_of(parent, TEXTS, RECIPE)
    assert calibration is not None
    windows = [*material.windows, *(window[0].tolist() for window in calibration)]
    (start,) = parent.start_ids
    assert start == parent.tokenizer.bos_token_id
    assert all(window[0] == start and start not in window[1:] for window in windows)
    assert all(prompt[0] == start for prompt in material.prompts)
    assert max(map(len, windows)) == RECIPE.window_tokens


def test_a_tokenizer_that_begins_with_nothing_gets_nothing(tmp_path: Path) -> None:
    parent = load_parent(str(write_llama(tmp_path / "model")))
    assert parent.start_ids == []


def test_windows_are_no_longer_than_the_served_context(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", model_max_length=16)
    parent = load_parent(str(folder))
    assert parent.context_tokens == load(folder).card.context_tokens == 16
    material = evaluation_of(parent, TEXTS, RECIPE)
    assert max(map(len, material.windows)) == 16
    # No room for an answer: that is not measured, and everything else is.
    quality = measure_quality(folder, folder, material)
    assert quality.continuations is None
    assert quality.text is not None
    assert quality.text.perplexity_ratio.value == 1


def test_an_encoder_is_calibrated_on_what_it_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MINILM, folder)
    settings = {"max_seq_length": 12, "do_lower_case": True}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    prompts = {"prompts": {"query": "Query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    served = load(folder)
    recipe = replace(RECIPE, num_windows=len(LINES))
    windows = calibration_of(load_parent(str(folder)), TEXTS, recipe)
    assert windows is not None
    assert [window[0].tolist() for window in windows] == [
        served.tokenizer.encode(line) for line in LINES
    ]
    assert max(window.shape[1] for window in windows) == served.card.context_tokens == 12


def test_positions_that_are_reserved_are_not_filled(tmp_path: Path) -> None:
    """RoBERTa's positions begin behind its padding id."""
    folder = tmp_path / "model"
    shutil.copytree(MINILM, folder)
    config = transformers.RobertaConfig(
        vocab_size=31000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=14, pad_token_id=1,
    )  # fmt: skip
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    parent = load_parent(str(folder))
    assert parent.context_tokens == load(folder).card.context_tokens == 12
    windows = calibration_of(parent, TEXTS, RECIPE)
    assert windows is not None
    assert max(window.shape[1] for window in windows) == 12
    with torch.inference_mode():
        parent.model(input_ids=windows[0])


def test_labels_must_not_come_from_the_calibration_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    examples = [{"text": line, "label": str(n % 2)} for n, line in enumerate(LINES)]
    (tmp_path / "labels").write_text("\n".join(map(json.dumps, examples)))
    recipe = Recipe(
        quantize=Quantization(bits=8),
        calibrate=str(tmp_path / "text"),
        labels=str(tmp_path / "labels"),
    )
    with pytest.raises(RecipeError, match=r"of the file of labels .* stand in the calibration"):
        read_texts(recipe)
