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
    windows: tuple[int | None, ...]  # by layer: how many positions back a token sees
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
    attentions = [layer.self_attn for layer in model.model.layers]
    first = attentions[0]
    return Description(
        family=FAMILIES[type(model).__name__],
        num_layers=len(attentions),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(config.num_key_value_heads),
        head_size=int(first.head_dim),
        norm_epsilon=float(config.rms_norm_eps),
        attention_scale=float(first.scaling),
        windows=tuple(_window(attention, config) for attention in attentions),
        embedding_scale=float(getattr(config, "embedding_multiplier", 1.0)),
        residual_scale=float(getattr(config, "residual_multiplier", 1.0)),
        logits_scale=1.0 / float(getattr(config, "logits_scaling", 1.0)),
    )


def _window(attention: Any, config: Any) -> int | None:
    # Qwen keeps it in each layer, Mistral has one for all.
    if hasattr(attention, "sliding_window"):
        window: int | None = attention.sliding_window
    elif config.model_type == "mistral":
        window = config.sliding_window
    else:
        window = None
    return window
