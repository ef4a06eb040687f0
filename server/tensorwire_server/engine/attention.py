"""Attention over the slot cache, called by transformers' own modules on one ragged row.

transformers looks an attention function up by name; ours finds the step it serves in a context
variable, because some modules (StableLM's) do not hand their arguments down. A name without a mask
function makes transformers build no mask: what a token may see follows from the step and from the
layer's window.

A step (`StepLayout`) cuts the ragged row into shares, one for each arena of the cache; a share is
its decodes, which are one call, and its prompt chunks, one call each. What of the cache a call
reads, and what each query may not see of that, is a `Span`: one for each window among the layers,
worked out when the first such layer asks.

Dimensions: T tokens of the step, N query heads, H key heads, G = N / H, B slots of one call,
P positions, D head size.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from tensorwire_server.engine.device import has_one_dnn
from tensorwire_server.engine.weighing import Terms, collect, collect_by_head

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensorwire_server.engine.kv_cache import SlotCache
    from tensorwire_server.scheduling.work import Row

ATTENTION_NAME = "tensorwire"
# Positions read in vain for which a decode is better off with a call of its own. Measured on a CPU:
# 100 with 2 or 8 key heads of 64 or 128, 400 with one of 32.
_LONE_CALL_POSITIONS = 192
# Elements of a mask that is repeated for each head of a group: 4 MiB in float32.
_MAX_REPEATED = 1 << 20
# Scores of a key head from which on a chunk is better read head by head.
_FEWEST_BY_HEAD = 48 * 1024
# oneDNN prepares a product of a new shape for a millisecond, so lengths are rounded up: by an
# eighth at most, or to this.
_ROUNDED_TO = 64


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
        """Return (T, N, D): what each token of the ragged row collects from its own sequence.

        Args:
            layer: index of the layer.
            q_NTD: queries.
            k_HTD: keys; query head n reads key head n // (N / H).
            v_HTD: values.
            scale: of the scores.
            extra: what else the layer asks for; `sliding_window`, and the fields of `Terms`.
        """


_STEP: ContextVar[AttentionStep] = ContextVar("step")


@contextmanager
def serving(step: AttentionStep) -> Iterator[None]:
    """Have the attention calls of the forward pass inside answered by this step."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def step_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls; (1, heads, T, D) each, (1, T, N, D) back."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    extra["attention_mask"] = attention_mask
    out_TND = _STEP.get().attend(layer, query[0], key[0], value[0], scale, extra)
    return out_TND.contiguous()[None], None  # some modules take a view of it


AttentionInterface.register(ATTENTION_NAME, step_attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The positions a call reads."""

    low: int
    high: int
    # Added to the scores, -inf hides: (B, 1, 1, P) of decodes, (T, P) of a chunk.
    # None: decodes see all of the span, a chunk sees it causally from position 0.
    mask: torch.Tensor | None
    # A chunk's mask stands there for each head of a group, (G x T, P): the heads are query rows of
    # one call, which reads the keys once for all of them. With 4,096 keys, 3 heads and 4 or 8
    # queries that takes 0.7 and 0.8 of the time (on a CPU); with more queries it matters less.
    repeats: bool = False
    # Its key heads are read one after the other, as `collect_by_head` does. The mask is for the
    # last positions only: all queries see those before. With AVX512 and 4,000 keys that takes half
    # of the time with 64 queries and more, 0.6 to 0.8 with 16.
    by_head: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """Tokens of one sequence that are read at once."""

    first: int  # place of its first token in the ragged row
    last: int  # one past its last token
    slot: int
    start: int  # positions already in the cache
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaShare:
    """What one arena does in a step: its tokens are a contiguous part of the ragged row."""

    arena: int
    first: int
    last: int
    # (T x H) rows of the arena's (S x H x P, D) view that this step's keys and values go to.
    write_index: torch.Tensor
    lengths: tuple[int, ...]  # of the decodes, which are the share's first tokens
    slots: tuple[int, ...]  # of the decodes
    num_slots: int  # slots 0 .. num_slots - 1 cover all decodes
    # Where slots 0 .. num_slots - 1 are not exactly the decodes: which token a slot stands for,
    # and which slot a token reads its answer from.
    token_of_slot: torch.Tensor | None
    slot_of_token: torch.Tensor | None
    chunks: tuple[PromptChunk, ...]
    # By window. The decodes' is None where each of them is better off with a call of its own.
    decode_spans: dict[int | None, Span | None] = field(default_factory=dict)
    chunk_spans: dict[tuple[int, int | None, bool], Span] = field(default_factory=dict)


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
        geometry = cache.geometry
        self._place_shape = geometry.num_heads, geometry.head_size, geometry.head_size
        self._longest = max((row.start + len(row.token_ids) for row in rows), default=0)
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
        (num_heads, _, key_size), value_size = k_HTD.shape, v_HTD.shape[2]
        terms = Terms.of_call(scale, num_heads, extra)
        window: int | None = extra.get("sliding_window")
        if window is not None and window >= self._longest:
            window = None
        is_smaller = (num_heads, key_size, value_size) != self._place_shape
        if is_smaller:
            q_NTD, k_HTD, v_HTD = self._widen(q_NTD, k_HTD, v_HTD)
        q_TND = q_NTD.transpose(0, 1)
        q_THGD = q_TND.reshape(len(q_TND), num_heads, -1, q_TND.shape[-1])
        k_THD, v_THD = k_HTD.transpose(0, 1), v_HTD.transpose(0, 1)
        parts = []
        for share in self._shares:
            k_SHPD, v_SHPD = self._cache.arenas[share.arena].kv_L2SHPD[layer].unbind(0)
            tokens = slice(share.first, share.last)
            _write(k_SHPD, share.write_index, k_THD[tokens])
            _write(v_SHPD, share.write_index, v_THD[tokens])
            if is_smaller:
                k_SHPD, v_SHPD = k_SHPD[:, :num_heads], v_SHPD[:, :num_heads]
            if share.slots:
                q = q_THGD[share.first : share.first + len(share.slots)]
                parts.append(_decode(q, k_SHPD, v_SHPD, share, window, terms))
            for number in range(len(share.chunks)):
                parts.append(_read(q_THGD, k_SHPD, v_SHPD, share, number, window, terms))
        out_THGD = parts[0] if len(parts) == 1 else torch.cat(parts)
        if is_smaller:
            out_THGD = out_THGD[..., :value_size]
        return out_THGD.flatten(1, 2)

    def _widen(self, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Bring a layer that is smaller than the cache's places up to their size, with zeros.

        Queries and keys score the same, and what values collect is cut off again. Heads that the
        layer lacks are written, but never read.
        """
        geometry = self._cache.geometry
        q, *kv = (F.pad(state, (0, geometry.head_size - state.shape[2])) for state in states)
        missing = geometry.num_heads - kv[0].shape[0]
        return q, *(F.pad(state, (0, 0, 0, 0, 0, missing)) for state in kv)


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
        end = row.start + num_tokens
        writes.extend(range(base + row.start, base + end))
        if num_tokens == 1:
            num_decodes += 1
        else:
            place = slice(last, last + num_tokens)
            chunks.append(
                PromptChunk(first=place.start, last=place.stop, slot=slot, start=row.start, end=end)
            )
        last += num_tokens
    decode_slots = tuple(slots[:num_decodes])
    num_slots = max(decode_slots, default=-1) + 1
    dense = num_slots == num_decodes
    heads = torch.arange(num_heads, device=device) * num_positions
    write_index = torch.tensor(writes, device=device)[:, None] + heads
    return ArenaShare(
        arena=arena,
        first=first,
        last=last,
        write_index=write_index.flatten(),
        lengths=tuple(row.start + 1 for row in rows[:num_decodes]),
        slots=decode_slots,
        num_slots=num_slots,
        token_of_slot=None if dense else _token_of_slot(decode_slots, num_slots, device),
        slot_of_token=None if dense else torch.tensor(decode_slots, device=device),
        chunks=tuple(chunks),
    )


def _token_of_slot(slots: Sequence[int], num_slots: int, device: torch.device) -> torch.Tensor:
    tokens = [0] * num_slots  # a slot that does not decode computes something nobody reads
    for token, slot in enumerate(slots):
        tokens[slot] = token
    return torch.tensor(tokens, device=device)


def _write(cache_SHPD: torch.Tensor, index: torch.Tensor, new_THD: torch.Tensor) -> None:
    size = new_THD.shape[-1]
    cache_SHPD.view(-1, size).index_copy_(0, index, new_THD.reshape(-1, size))


def _decode(
    q_BHGD: torch.Tensor,
    k_SHPD: torch.Tensor,
    v_SHPD: torch.Tensor,
    share: ArenaShare,
    window: int | None,
    terms: Terms,
) -> torch.Tensor:
    """One call for all decodes: the heads of a group are query rows, keys are never expanded."""
    if window not in share.decode_spans:
        share.decode_spans[window] = _decode_span(share, window, q_BHGD)
    span = share.decode_spans[window]
    if span is None:
        return _decode_one_by_one(q_BHGD, k_SHPD, v_SHPD, share, window, terms)
    if share.token_of_slot is not None:
        q_BHGD = q_BHGD[share.token_of_slot]
    k = k_SHPD[: share.num_slots, :, span.low : span.high]
    v = v_SHPD[: share.num_slots, :, span.low : span.high]
    bias_HGP = terms.bias_of(span.low, span.high)
    out = collect(q_BHGD, k, v, terms, mask=span.mask, bias=bias_HGP, sinks=terms.sinks_HG1)
    return out if share.slot_of_token is None else out[share.slot_of_token]


def _decode_one_by_one(
    q_BHGD: torch.Tensor,
    k_SHPD: torch.Tensor,
    v_SHPD: torch.Tensor,
    share: ArenaShare,
    window: int | None,
    terms: Terms,
) -> torch.Tensor:
    parts = []
    for token, (slot, high) in enumerate(zip(share.slots, share.lengths, strict=True)):
        low = _first_visible(high, window)
        k, v = k_SHPD[slot, None, :, low:high], v_SHPD[slot, None, :, low:high]
        q, bias_HGP = q_BHGD[token, None], terms.bias_of(low, high)
        parts.append(collect(q, k, v, terms, mask=None, bias=bias_HGP, sinks=terms.sinks_HG1))
    return torch.cat(parts)


def _first_visible(length: int, window: int | None) -> int:
    """Return the first position that the last of `length` tokens sees: itself and those before."""
    return 0 if window is None else max(0, length - window)


def _decode_span(share: ArenaShare, window: int | None, like: torch.Tensor) -> Span | None:
    lengths = share.lengths
    lows = [_first_visible(length, window) for length in lengths]
    low, high = min(lows), max(lengths)
    needed = sum(lengths) - sum(lows)
    if window is not None and like.device.type == "cpu":
        # Sequences of different length have their windows apart; what lies between is nobody's.
        wasted = share.num_slots * (high - low) - needed
        if wasted > _LONE_CALL_POSITIONS * len(lengths):
            return None
    if needed == share.num_slots * (high - low):
        return Span(low=low, high=high, mask=None)
    # A slot that does not decode sees one key all the same: a softmax over nothing is NaN.
    begins, ends = [low] * share.num_slots, [low + 1] * share.num_slots
    for slot, begin, end in zip(share.slots, lows, lengths, strict=True):
        begins[slot], ends[slot] = begin, end
    positions = torch.arange(low, high, device=like.device)
    hidden = positions >= torch.tensor(ends, device=like.device)[:, None]
    if window is not None:
        hidden |= positions < torch.tensor(begins, device=like.device)[:, None]
    return Span(low=low, high=high, mask=_additive(hidden, like)[:, None, None])


def _read(
    q_THGD: torch.Tensor,
    k_SHPD: torch.Tensor,
    v_SHPD: torch.Tensor,
    share: ArenaShare,
    number: int,
    window: int | None,
    terms: Terms,
) -> torch.Tensor:
    """One sequence's chunk: its key heads are the batch, the heads of a group share them."""
    chunk = share.chunks[number]
    key = number, window, terms.is_plain
    if key not in share.chunk_spans:
        num_positions = k_SHPD.shape[2]
        share.chunk_spans[key] = _chunk_span(chunk, window, terms, q_THGD, num_positions)
    span = share.chunk_spans[key]
    q_HGTD = q_THGD[chunk.first : chunk.last].permute(1, 2, 0, 3)
    num_groups = q_HGTD.shape[1]
    if span.by_head:
        assert span.mask is not None
        k, v = k_SHPD[chunk.slot, :, : span.high], v_SHPD[chunk.slot, :, : span.high]
        return collect_by_head(q_HGTD, k, v, terms.scale, span.mask).permute(2, 0, 1, 3)
    if span.repeats:
        k = k_SHPD[chunk.slot, :, None, span.low : span.high]
        v = v_SHPD[chunk.slot, :, None, span.low : span.high]
        q = q_HGTD.flatten(1, 2)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask, scale=terms.scale)
        return out.reshape(q_HGTD.shape).permute(2, 0, 1, 3)
    k = _for_groups(k_SHPD[chunk.slot, :, span.low : span.high], num_groups)
    v = _for_groups(v_SHPD[chunk.slot, :, span.low : span.high], num_groups)
    if terms.is_plain:
        out = F.scaled_dot_product_attention(
            q_HGTD, k, v, attn_mask=span.mask, is_causal=span.mask is None, scale=terms.scale
        )
        return out.permute(2, 0, 1, 3)
    assert span.mask is not None
    bias, sinks = terms.bias_of(span.low, span.high), terms.sinks_HG1
    bias = None if bias is None else bias[:, :, None]
    sinks = None if sinks is None else sinks[..., None]
    step = terms.queries_at_once(q_HGTD, span.high - span.low)
    parts = []
    for begin in range(0, q_HGTD.shape[2], step):
        queries = slice(begin, begin + step)
        q, mask = q_HGTD[:, :, queries], span.mask[queries]
        parts.append(collect(q, k, v, terms, mask=mask, bias=bias, sinks=sinks))
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3)


def _for_groups(kv_HPD: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return (H, G, P, D), without a copy where that is right."""
    kv_HGPD = kv_HPD[:, None].expand(-1, num_groups, -1, -1)
    # CUDA's memory-efficient kernel answers the last query from wrong memory if keys are expanded,
    # in float32, with a mask, and 65, 129, 193, ... queries (measured with torch 2.11 on an H200).
    is_misread = num_groups > 1 and kv_HPD.is_cuda and kv_HPD.dtype == torch.float32
    return kv_HGPD.contiguous() if is_misread else kv_HGPD


def _chunk_span(
    chunk: PromptChunk, window: int | None, terms: Terms, like: torch.Tensor, num_positions: int
) -> Span:
    if window is not None and chunk.end <= window:
        window = None
    low = _first_visible(chunk.start + 1, window)
    if window is None and chunk.start == 0 and terms.is_plain:
        return Span(low=0, high=chunk.end, mask=None)
    num_groups = like.shape[2]
    num_scores = num_groups * (chunk.end - chunk.start) * (chunk.end - low)
    high, masked_from = chunk.end, low
    by_head = _is_better_by_head(num_scores, window, terms, like)
    if by_head:
        # What the slot has behind the chunk's end is zero, and hidden like what is yet to come.
        grain = max(_ROUNDED_TO, (1 << chunk.end.bit_length()) // 16)
        high = min(-(-chunk.end // grain) * grain, num_positions)
        masked_from = chunk.start
    is_repeatable = terms.is_plain and num_scores <= _MAX_REPEATED and like.device.type == "cpu"
    repeats = is_repeatable and not by_head
    positions = torch.arange(masked_from, high, device=like.device)
    own = torch.arange(chunk.start, chunk.end, device=like.device)[:, None]
    hidden = positions > own
    if window is not None:
        hidden |= positions <= own - window
    mask = _additive(hidden, like)
    return Span(
        low=low,
        high=high,
        mask=mask.repeat(num_groups, 1) if repeats else mask,
        repeats=repeats,
        by_head=by_head,
    )


def _is_better_by_head(
    num_scores: int, window: int | None, terms: Terms, like: torch.Tensor
) -> bool:
    is_usual = terms.is_plain and window is None
    return is_usual and num_scores >= _FEWEST_BY_HEAD and has_one_dnn(like.device, like.dtype)


def _additive(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, float("-inf"))
