"""Attention over the slot cache, called by transformers' own modules on one ragged row.

transformers looks an attention function up by name; ours finds the step it serves in the keyword
argument `step`, which the modules hand down untouched. A name without a mask function makes
transformers build no mask.

Dimensions: T tokens of the step, N query heads, H key heads, G = N / H, B slots of one call,
P positions, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_server.engine.kv_cache import SlotCache
    from tensorwire_server.scheduling.work import Row

ATTENTION_NAME = "tensorwire"


class AttentionStep(Protocol):
    """What answers the attention calls of one forward pass."""

    def attend(
        self,
        layer: int,
        q_NTD: torch.Tensor,
        k_HTD: torch.Tensor,
        v_HTD: torch.Tensor,
        scale: float,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        """Return (T, N, D): what each token of the ragged row collects from its own sequence."""


def step_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    step: AttentionStep,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls; (1, heads, T, D) each, (1, T, N, D) back."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    extra["attention_mask"] = attention_mask
    return step.attend(layer, query[0], key[0], value[0], scale, extra).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, step_attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """Tokens of one sequence that are read at once."""

    first: int  # place of its first token in the ragged row
    last: int  # one past its last token
    slot: int
    start: int  # positions already in the cache
    end: int
    mask: torch.Tensor | None  # (tokens, end); None: plain causal from position 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaShare:
    """What one arena does in a step: its tokens are a contiguous part of the ragged row."""

    arena: int
    first: int
    last: int
    # (T x H) rows of the arena's (S x H x P, D) view that this step's keys and values go to.
    write_index: torch.Tensor
    num_decodes: int  # the first tokens of the share
    num_slots: int  # slots 0 .. num_slots - 1 cover all decodes
    num_positions: int  # the longest decode's length
    # Where slots 0 .. num_slots - 1 are not exactly the decodes: which token a slot stands for,
    # and which slot a token reads its answer from.
    token_of_slot: torch.Tensor | None
    slot_of_token: torch.Tensor | None
    mask: torch.Tensor | None  # (B, 1, 1, P); None: all of one length
    chunks: tuple[PromptChunk, ...]


class StepLayout:
    """One step's rows in the order of the ragged row, and where each meets the cache."""

    def __init__(self, cache: SlotCache, rows: Sequence[Row]) -> None:
        for row in rows:
            cache.reserve(row.sequence_id, row.start, row.start + len(row.token_ids))
        # Reserving may move slots, so places are read only now.
        places = {row.sequence_id: cache.place(row.sequence_id) for row in rows}

        def order(row: Row) -> tuple[int, bool, int]:
            arena, slot = places[row.sequence_id]
            return arena, len(row.token_ids) > 1, slot

        self.rows = sorted(rows, key=order)
        self._cache = cache
        self._shares: list[ArenaShare] = []
        first = 0
        for index in range(len(cache.arenas)):
            mine = [row for row in self.rows if places[row.sequence_id][0] == index]
            if mine:
                slots = [places[row.sequence_id][1] for row in mine]
                share = _share(cache, index, first, mine, slots)
                self._shares.append(share)
                first = share.last
        self.num_tokens = first

    def attend(
        self,
        layer: int,
        q_NTD: torch.Tensor,
        k_HTD: torch.Tensor,
        v_HTD: torch.Tensor,
        scale: float,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        """Write this step's keys and values, then answer each token; see `AttentionStep`."""
        num_heads = k_HTD.shape[0]
        q_TND = q_NTD.transpose(0, 1)
        q_THGD = q_TND.reshape(len(q_TND), num_heads, -1, q_TND.shape[-1])
        k_THD, v_THD = k_HTD.transpose(0, 1), v_HTD.transpose(0, 1)
        parts = []
        for share in self._shares:
            k_SHPD, v_SHPD = self._cache.arenas[share.arena].kv_L2SHPD[layer].unbind(0)
            tokens = slice(share.first, share.last)
            _write(k_SHPD, share.write_index, k_THD[tokens])
            _write(v_SHPD, share.write_index, v_THD[tokens])
            if share.num_decodes:
                q = q_THGD[share.first : share.first + share.num_decodes]
                parts.append(_decode(q, k_SHPD, v_SHPD, share, scale))
            for chunk in share.chunks:
                parts.append(_read(q_THGD, k_SHPD, v_SHPD, chunk, scale))
        out_THGD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out_THGD.flatten(1, 2)


def _share(
    cache: SlotCache, arena: int, first: int, rows: Sequence[Row], slots: Sequence[int]
) -> ArenaShare:
    device = cache.geometry.device
    num_heads, num_positions = cache.geometry.num_heads, cache.arenas[arena].num_positions
    writes: list[int] = []
    chunks = []
    num_decodes = 0
    last = first
    for row, slot in zip(rows, slots, strict=True):
        num_tokens, base = len(row.token_ids), slot * num_heads * num_positions
        writes.extend(range(base + row.start, base + row.start + num_tokens))
        if num_tokens == 1:
            num_decodes += 1
        else:
            chunks.append(_chunk(row, slot, last, device))
        last += num_tokens
    lengths = [row.start + 1 for row in rows[:num_decodes]]
    decode_slots = slots[:num_decodes]
    num_slots = max(decode_slots, default=-1) + 1
    dense = num_slots == num_decodes
    heads = torch.arange(num_heads, device=device) * num_positions
    write_index = torch.tensor(writes, device=device)[:, None] + heads
    return ArenaShare(
        arena=arena,
        first=first,
        last=last,
        write_index=write_index.flatten(),
        num_decodes=num_decodes,
        num_slots=num_slots,
        num_positions=max(lengths, default=0),
        token_of_slot=None if dense else _token_of_slot(decode_slots, num_slots, device),
        slot_of_token=None if dense else torch.tensor(decode_slots, device=device),
        mask=_decode_mask(cache, decode_slots, lengths, num_slots),
        chunks=tuple(chunks),
    )


def _chunk(row: Row, slot: int, first: int, device: torch.device) -> PromptChunk:
    num_tokens = len(row.token_ids)
    end = row.start + num_tokens
    mask = None
    if row.start:
        seen = torch.ones(num_tokens, end, dtype=torch.bool, device=device)
        mask = seen.tril(diagonal=row.start)
    return PromptChunk(
        first=first, last=first + num_tokens, slot=slot, start=row.start, end=end, mask=mask
    )


def _token_of_slot(slots: Sequence[int], num_slots: int, device: torch.device) -> torch.Tensor:
    tokens = [0] * num_slots  # a slot that does not decode computes something nobody reads
    for token, slot in enumerate(slots):
        tokens[slot] = token
    return torch.tensor(tokens, device=device)


def _decode_mask(
    cache: SlotCache, slots: Sequence[int], lengths: Sequence[int], num_slots: int
) -> torch.Tensor | None:
    if not slots or (min(lengths) == max(lengths) and num_slots == len(slots)):
        return None
    geometry = cache.geometry
    visible = [1] * num_slots  # at least one key each: a softmax over nothing is NaN
    for slot, length in zip(slots, lengths, strict=True):
        visible[slot] = length
    positions = torch.arange(max(lengths), device=geometry.device)
    hidden = positions >= torch.tensor(visible, device=geometry.device)[:, None]
    mask = torch.zeros(hidden.shape, dtype=geometry.dtype, device=geometry.device)
    return mask.masked_fill_(hidden, float("-inf"))[:, None, None]


def _write(cache_SHPD: torch.Tensor, index: torch.Tensor, new_THD: torch.Tensor) -> None:
    size = new_THD.shape[-1]
    cache_SHPD.view(-1, size).index_copy_(0, index, new_THD.reshape(-1, size))


def _decode(
    q_BHGD: torch.Tensor,
    k_SHPD: torch.Tensor,
    v_SHPD: torch.Tensor,
    share: ArenaShare,
    scale: float,
) -> torch.Tensor:
    """One call for all decodes: the heads of a group are query rows, keys are never expanded."""
    if share.token_of_slot is not None:
        q_BHGD = q_BHGD[share.token_of_slot]
    k = k_SHPD[: share.num_slots, :, : share.num_positions]
    v = v_SHPD[: share.num_slots, :, : share.num_positions]
    mask = share.mask
    if mask is not None:
        mask = mask.expand(*q_BHGD.shape[:3], share.num_positions)
    out = F.scaled_dot_product_attention(q_BHGD, k, v, attn_mask=mask, scale=scale)
    return out if share.slot_of_token is None else out[share.slot_of_token]


def _read(
    q_THGD: torch.Tensor,
    k_SHPD: torch.Tensor,
    v_SHPD: torch.Tensor,
    chunk: PromptChunk,
    scale: float,
) -> torch.Tensor:
    """One sequence's chunk: its key heads are the batch, the heads of a group share them."""
    q_HGTD = q_THGD[chunk.first : chunk.last].permute(1, 2, 0, 3)
    num_groups = q_HGTD.shape[1]
    k = k_SHPD[chunk.slot, :, None, : chunk.end].expand(-1, num_groups, -1, -1)
    v = v_SHPD[chunk.slot, :, None, : chunk.end].expand(-1, num_groups, -1, -1)
    out = F.scaled_dot_product_attention(
        q_HGTD, k, v, attn_mask=chunk.mask, is_causal=chunk.mask is None, scale=scale
    )
    return out.permute(2, 0, 1, 3)
