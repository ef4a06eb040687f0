"""Models that would be answered wrongly are refused at load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import models_zoo
import pytest
import torch
import transformers
from tensorwire_server.engine import probe
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.generator import Generator, RaggedModel
from tensorwire_server.engine.loading import load

from .driving import ragged_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tensorwire_server.scheduling.work import Row

SMALL: dict[str, Any] = {
    "vocab_size": models_zoo.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.MistralConfig(sliding_window=16, **SMALL),
            "its attention needs sliding_window",
        ),
        (
            transformers.Qwen2Config(
                use_sliding_window=True, sliding_window=16, max_window_layers=1, **SMALL
            ),
            "its attention needs sliding_window",
        ),
        (
            transformers.Gemma2Config(head_dim=16, sliding_window=16, **SMALL),
            "its attention needs sliding_window, softcap",
        ),
        (
            transformers.MambaConfig(
                vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4
            ),
            "MambaForCausalLM has attention of its own",
        ),
        (
            transformers.BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=2),
            "BloomForCausalLM has attention of its own",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_attention_this_engine_does_not_do_is_refused(
    tmp_path: Path, config: Any, reason: str
) -> None:
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    models_zoo.save_tokenizer(tmp_path, models_zoo.byte_level_tokenizer())
    with pytest.raises(ModelLoadError, match="cannot serve") as caught:
        load(tmp_path, device="cpu")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MistralConfig(sliding_window=None, **SMALL),
        transformers.Qwen3Config(head_dim=16, **SMALL),
        transformers.PhiConfig(**SMALL),
        transformers.GPTNeoXConfig(
            **{key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
        ),
    ],
    ids=lambda value: value.model_type,
)
def test_architectures_beyond_the_tested_families_load_if_they_prove_right(
    tmp_path: Path, config: Any
) -> None:
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    models_zoo.save_tokenizer(tmp_path, models_zoo.byte_level_tokenizer())
    assert isinstance(load(tmp_path, device="cpu"), Generator)


class OffByOne(RaggedModel):
    def positions(self, rows: Sequence[Row]) -> list[int]:
        return [position + (position >= 2) for position in super().positions(rows)]


@pytest.mark.parametrize("family", models_zoo.FAMILIES)
def test_the_proof_notices_a_wrong_position(family: str) -> None:
    engine = load(models_zoo.tiny_model(family), device="cpu", backend="any")
    assert isinstance(engine, Generator)
    right = ragged_of(engine)
    model = right._model
    probe.prove(right, model, vocab_size=models_zoo.VOCAB_SIZE)
    with pytest.raises(ModelLoadError, match="its logits differ"):
        probe.prove(OffByOne(model, right.cache), model, vocab_size=models_zoo.VOCAB_SIZE)


def test_the_proof_notices_logits_that_are_not_numbers() -> None:
    engine = load(models_zoo.tiny_model("llama"), device="cpu", backend="any")
    assert isinstance(engine, Generator)
    model = ragged_of(engine)._model
    with torch.inference_mode():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ModelLoadError, match="its logits differ by nan"):
        probe.prove(engine._model, model, vocab_size=models_zoo.VOCAB_SIZE)
