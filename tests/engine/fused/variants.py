"""Tiny models of the families that `fused` knows, with what each of them can differ in."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models_zoo
import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Callable

_SIZES: dict[str, Any] = {
    "vocab_size": models_zoo.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": models_zoo.CONTEXT_TOKENS,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 80,
}

VARIANTS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "llama-biases": lambda: transformers.LlamaConfig(
        attention_bias=True, mlp_bias=True, head_dim=24, **_SIZES
    ),
    "llama-tied": lambda: transformers.LlamaConfig(**_SIZES | {"tie_word_embeddings": True}),
    "llama-rope3": lambda: transformers.LlamaConfig(rope_parameters=_LLAMA3_ROPE, **_SIZES),
    "llama-yarn": lambda: transformers.LlamaConfig(rope_parameters=_YARN_ROPE, **_SIZES),
    "mistral": lambda: transformers.MistralConfig(sliding_window=None, **_SIZES),
    "mistral-window": lambda: transformers.MistralConfig(sliding_window=24, **_SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "qwen2-windows": lambda: transformers.Qwen2Config(
        use_sliding_window=True, sliding_window=24, max_window_layers=1, **_SIZES
    ),
    "qwen2-16-bits": lambda: transformers.Qwen2Config(**_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(head_dim=24, **_SIZES),
    "granite": lambda: transformers.GraniteConfig(
        embedding_multiplier=1.5,
        residual_multiplier=0.7,
        attention_multiplier=0.2,
        logits_scaling=3.0,
        **_SIZES,
    ),
    "olmo2": lambda: transformers.Olmo2Config(**_SIZES),
}


# With these, greedy output wanders: the tests check that it does.
_SEEDS = {"llama-biases": 7, "llama-tied": 4}
_SEED = 3  # of the others
_TIED_EMBEDDING = 0.2  # a larger one would decide alone what follows: itself


def _randomise(model: Any, seed: int) -> None:
    """As the zoo does, and norms and biases too: here each of them is a line of our own."""
    generator = torch.Generator().manual_seed(seed)
    embedding = _TIED_EMBEDDING if model.config.tie_word_embeddings else 1.0
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1 + 0.3 * noise
        elif parameter.ndim < 2:
            parameter.data = 0.3 * noise
        elif "embed" in name:
            parameter.data = embedding * noise
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.data = gain * noise * parameter.shape[1] ** -0.5


def write_variant(folder: Path, variant: str) -> Path:
    """Write a tiny model with its tokenizer; returns the folder."""
    model = transformers.AutoModelForCausalLM.from_config(VARIANTS[variant]())
    _randomise(model, _SEEDS.get(variant, _SEED))
    model.generation_config.eos_token_id = 2
    if variant.endswith("16-bits"):
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    models_zoo.save_tokenizer(folder, models_zoo.byte_level_tokenizer())
    return folder


@cache
def variant_folder(variant: str) -> Path:
    """Return the folder of a tiny model, written once per process."""
    root = Path(tempfile.mkdtemp(prefix=f"tensorwire-fused-{variant}-"))
    return write_variant(root / variant, variant)
