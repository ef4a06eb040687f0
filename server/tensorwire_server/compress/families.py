"""What the parts of a block are called in each family of models.

One table for everything that looks into transformers' modules. A family that is not in it is
refused by name: guessing which of a stranger's matrices are attention would prune the wrong ones.
Mixtures of experts are not here: their experts are three-dimensional parameters, no linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tensorwire_server.compress.recipe import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where blocks are in a model, and linear layers in a block."""

    blocks: str  # in the base model, which is what `AutoModel` gives
    attention: tuple[str, ...]  # linear layers; the last gives the output
    feed_forward: tuple[str, ...]  # the last takes the neurons
    num_neurons_key: str = "intermediate_size"  # in the configuration
    neurons_per_row: int = 1  # 2: gate and up are the halves of one matrix
    heads_can_go: bool = False  # the size of a head is a number of its own in the configuration
    head_norms: tuple[str, ...] = ()  # which hold weights for every single head


_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Family(
    blocks="layers",
    attention=(*_SPLIT, "self_attn.o_proj"),
    feed_forward=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    heads_can_go=True,
)
_LLAMA_NORMED_HEADS = replace(_LLAMA, head_norms=("self_attn.q_norm", "self_attn.k_norm"))
_STABLELM = replace(_LLAMA, heads_can_go=False)
_PHI = Family(
    blocks="layers",
    attention=(*_SPLIT, "self_attn.dense"),
    feed_forward=("mlp.fc1", "mlp.fc2"),
    heads_can_go=True,
)
_PHI3 = Family(
    blocks="layers",
    attention=("self_attn.qkv_proj", "self_attn.o_proj"),
    feed_forward=("mlp.gate_up_proj", "mlp.down_proj"),
    neurons_per_row=2,
    heads_can_go=True,
)
_GPT2 = Family(
    blocks="h",
    attention=("attn.c_attn", "attn.c_proj"),
    feed_forward=("mlp.c_fc", "mlp.c_proj"),
    num_neurons_key="n_inner",
)
_GPT_NEOX = Family(
    blocks="layers",
    attention=("attention.query_key_value", "attention.dense"),
    feed_forward=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)
_FALCON = Family(
    blocks="h",
    attention=("self_attention.query_key_value", "self_attention.dense"),
    feed_forward=_GPT_NEOX.feed_forward,
    num_neurons_key="ffn_hidden_size",
)
_OPT = Family(
    blocks="decoder.layers",
    attention=(*_SPLIT, "self_attn.out_proj"),
    feed_forward=("fc1", "fc2"),
    num_neurons_key="ffn_dim",
)
_BERT = Family(
    blocks="encoder.layer",
    attention=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ),
    feed_forward=("intermediate.dense", "output.dense"),
)

# By `model_type`.
FAMILIES = {
    "bert": _BERT,
    "cohere": _LLAMA_NORMED_HEADS,
    "falcon": _FALCON,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _LLAMA_NORMED_HEADS,
    "opt": _OPT,
    "phi": _PHI,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "stablelm": _STABLELM,
    "xlm-roberta": _BERT,
}


def family_of(model: Any) -> Family:
    """Return the family of a model of transformers.

    Raises:
        RecipeError: it is not known.
    """
    kind = model.config.model_type
    family = FAMILIES.get(kind)
    if family is None:
        raise RecipeError(
            f"models of the type {kind!r} cannot be compressed; known are {', '.join(FAMILIES)}"
        )
    return family
