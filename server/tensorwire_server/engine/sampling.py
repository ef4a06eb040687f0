"""Choosing the next token of every row in one pass.

Noise is a pure function of (seed, position): one uniform number per token from Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), key = seed,
counter = position. The token is where the inverse of the cumulated distribution, in vocabulary
order after filtering, meets that number. So a sequence draws the same alone, in company, and when
it is continued elsewhere.

Filters have the order and meaning of transformers' warpers: temperature, top-k, top-p, min-p
(`transformers.generation.logits_process`). What changes logits before that is in `shaping.py`.

Dimensions: R rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_server.scheduling.work import Sampling

_WORD = 0xFFFFFFFF
_PHILOX_ROUNDS = 10
# How many of the likeliest tokens are looked at: a row takes the first of these that is enough for
# it, else the whole vocabulary. That is the row's own affair: of tokens that are equally likely
# another width takes others, so a width that company decides would change what is drawn. And one
# row's 40,000 made a step of 63 others at 50 sixteen times as long (measured, 49,152 tokens).
_WIDTHS = (64, 256, 4096, 32_768)
# Of rows without a top-k nobody knows what they need; a trained model's nucleus is nearly always
# among so many.
_NUCLEUS_WIDTHS = _WIDTHS[1:]


def philox(key: int, counter: int) -> tuple[int, int, int, int]:
    """Return four random 32-bit words for a 64-bit key and a 128-bit counter."""
    c0, c1, c2, c3 = (counter >> shift & _WORD for shift in (0, 32, 64, 96))
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """Return the noise of one token: a number in [0, 1) with 53 random bits."""
    low, high, _, _ = philox(seed, position)
    return ((high << 32 | low) >> 11) * 2.0**-53


def choose_tokens(
    logits_RV: torch.Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    finite_R: torch.Tensor | None = None,
) -> list[int | None]:
    """Return each row's token, or None where the row's logits cannot be used.

    Args:
        logits_RV: float32; -inf is a token that is banned.
        samplings: one per row.
        positions: the position each row's new token will stand at.
        finite_R: False for rows that have no token, whatever their logits are; by default those
            whose logits are not finite.
    """
    if not samplings:
        return []
    # A NaN or an infinity survives a sum, which costs one pass and no copy.
    finite = torch.isfinite(logits_RV.sum(-1)) if finite_R is None else finite_R
    tokens = logits_RV.argmax(-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        logits = _pick(logits_RV, drawn)
        if not bool(finite.all()):
            # A bad row must not disturb the others; what it draws is thrown away below.
            logits = torch.where(finite[drawn, None], logits, 0.0)
        noise = [uniform(samplings[row].seed, positions[row]) for row in drawn]
        tokens[drawn] = draw(logits, [samplings[row] for row in drawn], noise)
    chosen: list[int] = tokens.tolist()
    usable: list[bool] = finite.tolist()
    return [token if good else None for token, good in zip(chosen, usable, strict=True)]


def _pick(values_RV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return some of the rows; all of them, which is the common case, without a copy."""
    return values_RV if len(rows) == len(values_RV) else values_RV[rows]


def draw(
    logits_RV: torch.Tensor, samplings: Sequence[Sampling], noise: Sequence[float]
) -> torch.Tensor:
    """Return the token of each row that its noise falls on: (R,), long.

    Args:
        logits_RV: float32; -inf is a token that is banned.
        samplings: one per row, none of them greedy.
        noise: numbers from 0 to below 1, one per row.
    """
    device, vocab = logits_RV.device, logits_RV.shape[1]
    # The maximum becomes 0 first, so that a tiny temperature gives 0 and -inf, never inf or NaN.
    temperatures = torch.tensor([s.temperature for s in samplings], device=device)
    temperatures.clamp_(min=torch.finfo(temperatures.dtype).tiny)
    weights = logits_RV - logits_RV.amax(-1, keepdim=True)
    weights.div_(temperatures[:, None]).exp_()
    uniforms = torch.tensor(noise, dtype=torch.float64, device=device)
    tokens = torch.empty(len(samplings), dtype=torch.long, device=device)

    def fill_in(rows: list[int], width: int) -> None:
        """Fill in the rows' tokens, looking at each one's `width` likeliest only."""
        if rows:
            settings = [samplings[row] for row in rows]
            tokens[rows] = _draw_likeliest(_pick(weights, rows), settings, uniforms[rows], width)

    by_width: defaultdict[int, list[int]] = defaultdict(list)
    nucleus: list[int] = []
    plain: list[int] = []
    for row, sampling in enumerate(samplings):
        if sampling.top_k is not None and sampling.top_k < vocab:
            by_width[_width(sampling.top_k, vocab)].append(row)
        elif sampling.top_p < 1:
            nucleus.append(row)
        else:
            plain.append(row)
    for width, rows in by_width.items():
        fill_in(rows, width)
    for width in _NUCLEUS_WIDTHS:
        if nucleus and width <= vocab // 2:  # else to try costs more than it spares
            within = _nucleus_within(weights, samplings, nucleus, width)
            fill_in([row for row in nucleus if row in within], width)
            nucleus = [row for row in nucleus if row not in within]
    fill_in(nucleus, vocab)
    if plain:
        least = [samplings[row].min_p for row in plain]
        chosen = _pick(weights, plain)
        if any(least):
            # The largest weight is 1, so that a weight is its token's share of the likeliest's.
            bound = torch.tensor(least, dtype=weights.dtype, device=device)
            chosen = torch.where(chosen < bound[:, None], 0.0, chosen)
        tokens[plain] = _invert(chosen, uniforms[plain])
    return tokens


def _width(num_tokens: int, vocab: int) -> int:
    return next((width for width in _WIDTHS if num_tokens <= width < vocab), vocab)


def _nucleus_within(
    weights_RV: torch.Tensor, samplings: Sequence[Sampling], rows: Sequence[int], width: int
) -> set[int]:
    """Return those rows whose `width` likeliest tokens already hold top-p of the whole."""
    chosen = _pick(weights_RV, rows)
    shares: list[float] = (chosen.topk(width).values.sum(-1) / chosen.sum(-1)).tolist()
    return {row for row, share in zip(rows, shares, strict=True) if share > samplings[row].top_p}


def _draw_likeliest(
    weights_RV: torch.Tensor, samplings: Sequence[Sampling], noise_R: torch.Tensor, width: int
) -> torch.Tensor:
    device, vocab = weights_RV.device, weights_RV.shape[1]
    best = weights_RV.topk(width)
    weights = best.values.double()
    top_k = torch.tensor([vocab if s.top_k is None else s.top_k for s in samplings], device=device)
    weights.masked_fill_(torch.arange(width, device=device) >= top_k[:, None], 0)
    # Top-p is a share of what top-k left, and of everything where there is no top-k.
    whole = torch.where(top_k < vocab, weights.sum(-1), weights_RV.sum(-1).double())
    top_p = torch.tensor([s.top_p for s in samplings], dtype=torch.float64, device=device)
    before = weights.cumsum(-1) - weights
    # Out is what comes after the share is reached; the likeliest has nothing before it.
    out = (before >= (top_p * whole)[:, None]) & (top_p < 1)[:, None]
    weights.masked_fill_(out, 0)
    if any(s.min_p for s in samplings):
        min_p = torch.tensor([s.min_p for s in samplings], dtype=torch.float64, device=device)
        weights.masked_fill_(weights < min_p[:, None], 0)
    tokens, order = best.indices.sort(-1)
    choice = _invert(weights.gather(1, order), noise_R)
    return tokens.gather(1, choice[:, None])[:, 0]


def _invert(weights_RC: torch.Tensor, noise_R: torch.Tensor) -> torch.Tensor:
    """Return, per row, which of its C weights the noise falls on."""
    # In double precision a sum over 150,000 tokens errs less than the logits do.
    cumulated = weights_RC.cumsum(-1, dtype=torch.float64)
    target = noise_R[:, None] * cumulated[:, -1:]
    # right=True: the first whose sum exceeds the target, so never one of weight 0.
    return torch.searchsorted(cumulated, target, right=True)[:, 0]
