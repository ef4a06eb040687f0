"""Falcon's attention, which does not go through transformers' attention interface.

Its modules compute attention themselves, so theirs is replaced by one that does the same up to the
queries, keys and values, and asks whatever attention the model is set to. Other than theirs it
keeps the keys of a group once, not once for each of its query heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.models.falcon.modeling_falcon import (
    FalconAttention,
    apply_rotary_pos_emb,
    build_alibi_tensor,
)

from tensorwire_server.engine.attention import step_attention

# transformers' other one, "eager", adds ALiBi's bias twice (seen in 5.23).
REFERENCE = "sdpa"


class RaggedFalconAttention(FalconAttention):
    """Falcon's attention for the ragged row; under transformers' own names it is theirs."""

    key_bias_NP: torch.Tensor | None  # ALiBi's, the same for each layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,
        attention_mask: Any,
        *args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Answer like the class it replaces, but for weights of attention, which it never has."""
        if self.config._attn_implementation in ("eager", "sdpa"):
            kwargs["position_embeddings"] = position_embeddings
            theirs: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states, alibi, attention_mask, *args, **kwargs
            )
            return theirs
        q, k, v = self._split(self.query_key_value(hidden_states))
        extra: dict[str, Any] = {}
        if alibi is None:
            assert position_embeddings is not None
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        else:
            # What the model made counts the ragged row through, and stands in its mask as well.
            extra["key_bias"], attention_mask = self.key_bias_NP, None
        out, _ = step_attention(
            self, q, k, v, attention_mask, scaling=self.inv_norm_factor, **extra
        )
        return self.dense(out.flatten(2)), None

    def _split(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values, (1, heads, T, D) each.

        A group is its query heads, a key and a value. Multi-head attention is groups of one,
        multi-query attention one group of all.
        """
        num_groups: Any = self.num_kv_heads
        grouped = fused.view(1, fused.shape[1], num_groups, -1, self.head_dim)
        q, k, v = grouped[:, :, :, :-2], grouped[:, :, :, -2], grouped[:, :, :, -1]
        return q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def adapt(model: Any) -> None:
    """Make a loaded Falcon model call the attention it is set to."""
    config = model.config
    key_bias_NP = _alibi_bias(config, model) if config.alibi else None
    attentions: list[Any] = [m for m in model.modules() if isinstance(m, FalconAttention)]
    for attention in attentions:
        attention.__class__ = RaggedFalconAttention
        attention.key_bias_NP = key_bias_NP
    # transformers' own method declines, as Falcon's modules would not follow it.
    model.set_attn_implementation = partial(setattr, config, "_attn_implementation")


def _alibi_bias(config: Any, model: Any) -> torch.Tensor:
    """Return (heads, positions), rounded as transformers rounds it: to bfloat16, twice."""
    every_position = torch.ones(1, config.max_position_embeddings, device=model.device)
    alibi_N1P = build_alibi_tensor(every_position.long(), config.num_attention_heads, model.dtype)
    scaled_N1P: torch.Tensor = alibi_N1P / (config.hidden_size // config.num_attention_heads) ** 0.5
    return scaled_N1P[:, 0]
