"""Log-probabilities of tokens, as the model gives them.

They are those of the logits before anything shapes them (vLLM's `raw_logprobs`), so they do not
depend on a request's settings, and a prompt's are worth as much as an answer's.

Dimensions: E entries, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from tensorwire_server.scheduling.work import Scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tensorwire_server.scheduling.work import Row

# Of a long prompt's logits so many rows at once: what is computed on the way is as large as they.
_BLOCK = 64


class Entry(NamedTuple):
    """One token whose log-probability is wanted."""

    at: int  # the row of its logits
    sequence_id: int
    position: int  # of the token in its sequence
    token_id: int | None  # None: the one that is being chosen
    num_top: int
    is_prompt: bool


def find_entries(rows: Sequence[Row]) -> list[Entry]:
    """Return what is wanted of these rows of logits; a row that has several stands there as often.

    The logits of a row's last tokens are there: each tells of the token behind it.
    """
    entries: list[Entry] = []
    position = 0
    for at in range(len(rows) - 1, -1, -1):
        row = rows[at]
        sampling = row.sampling
        if not sampling.reports:
            continue
        is_last = at + 1 == len(rows) or rows[at + 1] is not row
        position = row.start + len(row.token_ids) if is_last else position - 1
        is_prompt = position < row.num_prompt_tokens
        num_top = sampling.prompt_logprobs if is_prompt else sampling.logprobs
        if num_top is not None:
            known = row.history[position] if position < len(row.history) else None
            entries.append(Entry(at, row.sequence_id, position, known, num_top, is_prompt))
    return entries[::-1]


def score(
    logits_RV: torch.Tensor, entries: Sequence[Entry], chosen: dict[int, int]
) -> list[Scores]:
    """Return the entries' log-probabilities.

    Args:
        logits_RV: float32, as the model gave them.
        entries: in order of rows.
        chosen: the new token of each sequence that has one; others have failed, and are left out.
    """
    usable = [entry for entry in entries if entry.sequence_id in chosen]
    return [
        scores
        for start in range(0, len(usable), _BLOCK)
        for scores in _score_block(logits_RV, usable[start : start + _BLOCK], chosen)
    ]


def _score_block(
    logits_RV: torch.Tensor, entries: Sequence[Entry], chosen: dict[int, int]
) -> Iterable[Scores]:
    device = logits_RV.device
    rows = [entry.at for entry in entries]
    ids = [chosen[e.sequence_id] if e.token_id is None else e.token_id for e in entries]
    is_slice = rows[-1] - rows[0] == len(rows) - 1
    logits_EV = logits_RV[rows[0] : rows[-1] + 1] if is_slice else logits_RV[rows]
    whole_E1 = logits_EV.logsumexp(-1, keepdim=True)
    own_E = logits_EV.gather(1, torch.tensor(ids, device=device)[:, None]) - whole_E1
    best = logits_EV.topk(min(max(entry.num_top for entry in entries), logits_EV.shape[1]))
    own = own_E[:, 0].cpu().numpy().astype("<f4")
    top = (best.values - whole_E1).cpu().numpy().astype("<f4")
    top_ids = best.indices.cpu().numpy().astype("<i4")
    start = 0
    for end in range(1, len(entries) + 1):
        first = entries[start]
        if end < len(entries) and _belong_together(first, entries[end]):
            continue
        k = min(first.num_top, top.shape[1])
        yield Scores(
            sequence_id=first.sequence_id,
            start=first.position,
            token_logprobs=own[start:end].tobytes(),
            num_top=k,
            top_ids=np.ascontiguousarray(top_ids[start:end, :k]).tobytes(),
            top_logprobs=np.ascontiguousarray(top[start:end, :k]).tobytes(),
        )
        start = end


def _belong_together(one: Entry, other: Entry) -> bool:
    return one.sequence_id == other.sequence_id and one.is_prompt == other.is_prompt
