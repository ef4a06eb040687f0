"""What a query collects from keys and values, with all that layers add to plain softmax attention.

Without additions torch's own kernel does it. Soft caps and sinks change the scores in ways that it
does not offer, so there the scores are written out.

Dimensions: N query heads, H key heads, G = N / H, P positions, D head size; `...Q` any queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping

# How many scores (heads x queries x keys) are written out at once: 16 MiB in float32.
_SCORES_AT_ONCE = 1 << 22
# The same, of one key head: 4 MiB. The fewer, the more often all keys are read: a quarter as many
# take up to twice as long. But memory for more is asked of the system anew each time.
_SCORES_OF_A_HEAD = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How one layer scores; what it lets a query see is in the masks."""

    scale: float
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    # A score of each head's own that takes its share of the softmax and brings no value.
    sinks_HG1: torch.Tensor | None = None
    bias_HGP: torch.Tensor | None = None  # added to the scaled scores, by the key's position

    @classmethod
    def of_call(cls, scale: float, num_heads: int, extra: Mapping[str, Any]) -> Terms:
        """Read what a module hands down: `softcap`, `s_aux` (N,), `key_bias` (N, positions)."""
        softcap, sinks_N, bias_NP = extra.get("softcap"), extra.get("s_aux"), extra.get("key_bias")
        if softcap is None and sinks_N is None and bias_NP is None:
            return _plain(scale)
        return cls(
            scale=scale,
            softcap=softcap,
            sinks_HG1=None if sinks_N is None else sinks_N.view(num_heads, -1, 1),
            bias_HGP=None if bias_NP is None else bias_NP.unflatten(0, (num_heads, -1)),
        )

    @property
    def is_plain(self) -> bool:
        """Whether nothing is added to plain attention."""
        return self.softcap is None and self.sinks_HG1 is None and self.bias_HGP is None

    def bias_of(self, low: int, high: int) -> torch.Tensor | None:
        """Return (H, G, high - low), the bias of some positions."""
        return None if self.bias_HGP is None else self.bias_HGP[:, :, low:high]

    def queries_at_once(self, q_HGQD: torch.Tensor, num_keys: int) -> int:
        """Return how many queries a call may take: their scores, or masks, stand in memory."""
        num_heads = q_HGQD.shape[0] * q_HGQD.shape[1]
        return max(1, _SCORES_AT_ONCE // (num_heads * num_keys))


@cache
def _plain(scale: float) -> Terms:
    return Terms(scale=scale)


def collect(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    terms: Terms,
    *,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return what each query collects: (..., Q, D).

    Args:
        q: (..., Q, D).
        k: (..., P, D).
        v: (..., P, D).
        terms: scale and soft cap.
        mask: added to the scores, shaped to broadcast over (..., Q, P); None hides nothing.
        bias: likewise.
        sinks: shaped to broadcast over (..., Q, 1).
    """
    added = mask if bias is None else bias if mask is None else bias + mask
    if terms.softcap is None and sinks is None:
        if added is not None:
            added = added.expand(*q.shape[:-1], k.shape[-2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=terms.scale)
    scores = (q @ k.transpose(-1, -2)).float() * terms.scale
    if terms.softcap is not None:
        scores = scores.div_(terms.softcap).tanh_().mul_(terms.softcap)
    if added is not None:
        scores += added
    if sinks is None:
        return scores.softmax(-1).to(q.dtype) @ v
    sinks = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    shares = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return shares.to(q.dtype) @ v


def collect_by_head(
    q_HGTD: torch.Tensor,
    k_HPD: torch.Tensor,
    v_HPD: torch.Tensor,
    scale: float,
    mask_TP: torch.Tensor,
) -> torch.Tensor:
    """Return what each query collects: (H, G, T, D).

    torch's own kernel gives each thread heads of its own, of which there may be few, and multiplies
    by MKL, which uses half of what AVX512 can do on some CPUs. oneDNN shares out each product.

    Args:
        q_HGTD: float32 on a CPU, as all of these, where there is oneDNN.
        k_HPD: any number of positions.
        v_HPD: as many.
        scale: of the scores.
        mask_TP: added to the scores of the last P positions; those before hide nothing.
    """
    multiply: Any = torch.ops.mkldnn._linear_pointwise.default
    _, num_groups, num_queries, _ = q_HGTD.shape
    num_parts = -(-num_queries * num_groups * k_HPD.shape[1] // _SCORES_OF_A_HEAD)
    step = -(-num_queries // num_parts)
    collected = torch.empty_like(q_HGTD)
    for q_GTD, k_PD, v_PD, out_GTD in zip(q_HGTD, k_HPD, v_HPD, collected, strict=True):
        for begin in range(0, num_queries, step):
            queries = slice(begin, begin + step)
            q = q_GTD[:, queries] * scale
            scores = multiply(q.flatten(0, 1), k_PD, None, "none", [], "")
            scores.view(num_groups, -1, len(k_PD))[..., -mask_TP.shape[1] :] += mask_TP[queries]
            out = multiply(scores.softmax(-1), v_PD.t(), None, "none", [], "")
            out_GTD[:, queries] = out.view(q.shape)
    return collected
