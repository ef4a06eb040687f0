"""The families that `fused` knows, and what distinguishes their models.

All are decoders with rotary positions and a gated feed-forward part. A description is read from
config.json by way of transformers' own modules, which are built without weights for that, so that
a default is theirs and never ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from tensorwire_server.engine.errors import ModelLoadError


class QKNorm(Enum):
    """Over what queries and keys are normalised before they are rotated."""

    NONE = "none"
    HEAD = "head"
    ALL_HEADS = "all heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What an architecture does differently from Llama."""

    qk_norm: QKNorm = QKNorm.NONE
    norms_after: bool = False  # of what attention and feed-forward give, not of what they get


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(qk_norm=QKNorm.HEAD),
    "GraniteForCausalLM": Family(),
    "Olmo2ForCausalLM": Family(qk_norm=QKNorm.ALL_HEADS, norms_after=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """All that computing needs to know of a model beside its weights."""

    family: Family
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_epsilon: float
    attention_scale: float
    windows: tuple[int | None, ...]  # by layer: of how many positions a token sees the last
    embedding_scale: float
    residual_scale: float
    logits_scale: float


def describe(model: Any) -> Description:
    """Return the description of a model of transformers, whose weights are not looked at.

    Raises:
        ModelLoadError: it has something that no family here has.
    """
    config = model.config
    if config.hidden_act != "silu":
        raise ModelLoadError(f"its activation {config.hidden_act} is not silu")
    first = model.model.layers[0].self_attn
    return Description(
        family=FAMILIES[type(model).__name__],
        num_layers=len(model.model.layers),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads),
        head_size=int(first.head_dim),
        norm_epsilon=float(config.rms_norm_eps),
        attention_scale=float(first.scaling),
        windows=windows_of(model),
        embedding_scale=float(getattr(config, "embedding_multiplier", 1.0)),
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
        logits_scale=1.0 / float(getattr(config, "logits_scaling", 1.0)),
    )


def windows_of(model: Any) -> tuple[int | None, ...]:
    """Return each layer's window; Qwen keeps it in the layer, Mistral has one for all."""
    windows = []
    for layer in model.model.layers:
        holder = layer.self_attn if hasattr(layer.self_attn, "sliding_window") else None
        if model.config.model_type == "mistral":
            holder = model.config
        windows.append(None if holder is None else holder.sliding_window)
    return tuple(windows)
