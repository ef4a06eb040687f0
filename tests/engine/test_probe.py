"""Models that would be answered wrongly are refused at load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import models_zoo
import pytest
import torch
import transformers
from tensorwire_server.engine import probe
from tensorwire_server.engine.attention import StepLayout
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.generator import Generator, RaggedModel
from tensorwire_server.engine.loading import load
from tensorwire_server.engine.masks import MadeMasks
from transformers.masking_utils import (
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

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
            transformers.Qwen2MoeConfig(
                use_sliding_window=True,
                sliding_window=16,
                max_window_layers=1,
                num_experts=4,
                num_experts_per_tok=2,
                **SMALL,
            ),
            "its layer 0 is masked to the last 16 tokens, but asks its attention for all tokens",
        ),
        (
            transformers.Llama4TextConfig(
                attention_chunk_size=16, intermediate_size_mlp=48, num_local_experts=2, **SMALL
            ),
            "its masks hide other tokens than later ones and those before a window",
        ),
        (
            transformers.LlamaConfig(**SMALL | {"sliding_window": 16}),
            "transformers would forget all but the last 16 tokens of its layer 0, which asks its "
            "attention for all tokens",
        ),
        (
            transformers.DeepseekV4Config(
                **SMALL,
                head_dim=16,
                q_lora_rank=16,
                o_lora_rank=16,
                moe_intermediate_size=24,
                n_routed_experts=4,
                num_experts_per_tok=2,
            ),
            "its layer 0 keeps more than keys and values",
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
        load(tmp_path, device="cpu", backend="any")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


WITHOUT_GROUPS = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}


@pytest.mark.parametrize(
    "config",
    [
        transformers.MistralConfig(sliding_window=None, **SMALL),
        transformers.Starcoder2Config(sliding_window=16, **SMALL),
        transformers.Cohere2Config(sliding_window=16, **SMALL),
        transformers.Olmo3Config(sliding_window=16, **SMALL),
        transformers.SmolLM3Config(**SMALL),
        transformers.AfmoeConfig(
            moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=16, **SMALL
        ),
        transformers.Qwen3MoeConfig(
            moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, **SMALL
        ),
        transformers.GPTBigCodeConfig(vocab_size=512, n_embd=32, n_layer=2, n_head=2),
        transformers.BioGptConfig(**WITHOUT_GROUPS),
        # Its keys are larger than its values.
        transformers.DeepseekV3Config(
            **SMALL,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
            moe_intermediate_size=24,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        transformers.Phi3Config(
            **SMALL,
            original_max_position_embeddings=64,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.5] * 8,
                "long_factor": [3.0] * 8,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
    ids=lambda value: value.model_type,
)
def test_architectures_beyond_the_tested_families_load_if_they_prove_right(
    tmp_path: Path, config: Any
) -> None:
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    models_zoo.save_tokenizer(tmp_path, models_zoo.byte_level_tokenizer())
    assert isinstance(load(tmp_path, device="cpu", backend="any"), Generator)


class OffByOne(RaggedModel):
    def positions(self, rows: Sequence[Row]) -> list[int]:
        return [position + (position >= 2) for position in super().positions(rows)]


def engine_of(family: str) -> Generator:
    engine = load(models_zoo.tiny_model(family), device="cpu", backend="any")
    assert isinstance(engine, Generator)
    return engine


def prove(ragged: RaggedModel, model: Any, *, reference: str = "eager") -> None:
    probe.prove(ragged, model, vocab_size=models_zoo.VOCAB_SIZE, reference=reference)


@pytest.mark.parametrize("family", [f for f in models_zoo.EVERY_FAMILY if f != "falcon-alibi"])
def test_the_proof_notices_a_wrong_position(family: str) -> None:
    right = ragged_of(engine_of(family))
    prove(right, right._model)
    with pytest.raises(ModelLoadError, match="its logits differ"):
        prove(OffByOne(right._model, right.cache), right._model)


class Deaf(RaggedModel):
    """Does not hear one of the things that layers ask for."""

    name: str
    instead: Any = None

    def lay_out(self, rows: Sequence[Row]) -> StepLayout:
        layout = DeafLayout(self.cache, rows)
        layout.deaf = self
        return layout


class DeafLayout(StepLayout):
    deaf: Deaf

    def attend(
        self, layer: int, q: Any, k: Any, v: Any, scale: float, extra: dict[str, Any]
    ) -> torch.Tensor:
        if extra.get(self.deaf.name) is not None:
            extra = extra | {self.deaf.name: self.deaf.instead}
        return super().attend(layer, q, k, v, scale, extra)


@pytest.mark.parametrize(
    ("family", "name", "instead"),
    [
        ("mistral", "sliding_window", None),
        ("mistral", "sliding_window", 4),
        ("gemma3", "sliding_window", 2),
        ("gemma2", "sliding_window", None),
        ("gemma2", "softcap", None),
        ("gemma2", "softcap", 0.6),
        ("gpt-oss", "s_aux", None),
        ("falcon-alibi", "key_bias", None),
    ],
)
def test_the_proof_notices_what_is_not_done(family: str, name: str, instead: Any) -> None:
    right = ragged_of(engine_of(family))
    deaf = Deaf(right._model, right.cache)
    deaf.name, deaf.instead = name, instead
    reference = "sdpa" if family == "falcon-alibi" else "eager"
    prove(right, right._model, reference=reference)
    with pytest.raises(ModelLoadError, match="its logits differ"):
        prove(deaf, right._model, reference=reference)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_after_the_proof_windows_and_soft_caps_are_what_they_were(family: str) -> None:
    model = ragged_of(engine_of(family))._model
    windows = {getattr(module, "sliding_window", None) for module in model.modules()}
    caps = {getattr(module, "attn_logit_softcapping", None) for module in model.modules()}
    assert windows <= {None, models_zoo.WINDOW_TOKENS}
    assert caps <= {None, 2.0}
    assert model.config.sliding_window == models_zoo.WINDOW_TOKENS


def test_a_window_is_checked_over_the_whole_context() -> None:
    """Not only as far as the few tokens of the proof go."""
    made = MadeMasks()
    mask = torch.ones(1)
    made.add(mask, sliding_window_causal_mask_function(4096))
    assert made.window_of(mask, 4096) is None
    assert made.window_of(mask, 4097) == 4096
    assert made.window_of(mask, 131072) == 4096


def test_masks_that_are_neither_causal_nor_a_window_are_refused() -> None:
    made = MadeMasks()
    mask = torch.ones(1)
    made.add(mask, chunked_causal_mask_function(100, torch.zeros(1, dtype=torch.int)))
    assert made.window_of(mask, 100) is None
    with pytest.raises(ModelLoadError, match="its masks hide other tokens"):
        made.window_of(mask, 101)
    with pytest.raises(ModelLoadError, match="changed on their way"):
        made.window_of(mask.clone(), 100)


def test_the_proof_notices_logits_that_are_not_numbers() -> None:
    engine = load(models_zoo.tiny_model("llama"), device="cpu", backend="any")
    assert isinstance(engine, Generator)
    model = ragged_of(engine)._model
    with torch.inference_mode():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ModelLoadError, match="its logits differ by nan"):
        probe.prove(engine._model, model, vocab_size=models_zoo.VOCAB_SIZE)
