"""From the logits of a step to its result: one pass over all rows, whatever each asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tensorwire_server.engine.sampling import choose_tokens
from tensorwire_server.engine.scores import find_entries, score
from tensorwire_server.engine.shaping import Shaper
from tensorwire_server.scheduling.work import StepResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tensorwire_server.scheduling.work import Row

NOT_FINITE = "non-finite logits"
NOTHING_LEFT = "every token of the vocabulary is banned"


def wanted_logits(rows: Iterable[Row]) -> tuple[list[Row], list[int]]:
    """Return of which tokens of a ragged row the logits are wanted.

    Returns:
        Their rows, each as often as it has such tokens, and the tokens' places in the ragged row.
    """
    wanted: list[Row] = []
    places: list[int] = []
    end = 0
    for row in rows:
        length = len(row.token_ids)
        end += length
        if length == 1 and row.sample:  # a decode, as nearly all are
            wanted.append(row)
            places.append(end - 1)
        else:
            count = row.num_logits
            wanted += [row] * count
            places += range(end - count, end)
    return wanted, places


class Sampler:
    """Chooses tokens and reports on them; keeps what shapes the logits of sequences."""

    def __init__(self) -> None:
        self._shaper = Shaper()

    @property
    def num_shaped(self) -> int:
        """Sequences of which something is kept: counts, or what their options say."""
        return len(self._shaper)

    def release(self, sequence_id: int) -> None:
        """Forget a sequence."""
        self._shaper.release(sequence_id)

    def run(self, rows: Sequence[Row], logits_RV: torch.Tensor) -> StepResult:
        """Return the tokens of the rows that are to be sampled, and what is reported.

        Args:
            rows: as `wanted_logits` gives them.
            logits_RV: float32, one for each; changed in place.
        """
        if not rows:
            return StepResult(tokens={}, failed={})
        logits_RV = logits_RV.contiguous()
        # Before anything is banned: what is -inf then is meant to be.
        finite = torch.isfinite(logits_RV.sum(-1))
        entries = find_entries(rows)
        if not entries:
            return self._sample(rows, logits_RV, finite)
        last = [
            at
            for at, row in enumerate(rows)
            if row.sample and (at + 1 == len(rows) or rows[at + 1] is not row)
        ]
        sampled = [rows[at] for at in last]
        if len(last) == len(rows) and all(row.sampling.shaping is None for row in rows):
            result = self._sample(sampled, logits_RV, finite)
        else:  # a copy: what is reported is what the model gave
            result = self._sample(sampled, logits_RV[last], finite[last])
        failed = dict(result.failed)
        for row, good in zip(rows, finite.tolist(), strict=True):
            if not good:
                failed[row.sequence_id] = NOT_FINITE
        # Rows without a sample have no token yet; which one that will be is none of their business.
        chosen = {row.sequence_id: -1 for row in rows} | dict(result.tokens)
        kept = {id: token for id, token in chosen.items() if id not in failed}
        return StepResult(
            tokens={id: token for id, token in result.tokens.items() if id not in failed},
            failed=failed,
            scores=score(logits_RV, entries, kept),
        )

    def _sample(
        self, rows: Sequence[Row], logits_RV: torch.Tensor, finite_R: torch.Tensor
    ) -> StepResult:
        if not rows:
            return StepResult(tokens={}, failed={})
        banned = self._shaper.shape(logits_RV, rows)
        stuck: set[int] = set()
        if banned:
            best: list[float] = logits_RV[banned].amax(-1).tolist()
            stuck = {at for at, value in zip(banned, best, strict=True) if value == -torch.inf}
            if stuck:
                finite_R = finite_R.clone()
                finite_R[sorted(stuck)] = False
        samplings = [row.sampling for row in rows]
        positions = [row.start + len(row.token_ids) for row in rows]
        chosen = choose_tokens(logits_RV, samplings, positions, finite_R)
        tokens: dict[int, int] = {}
        failed: dict[int, str] = {}
        for at, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if token is None:
                failed[row.sequence_id] = NOTHING_LEFT if at in stuck else NOT_FINITE
            else:
                tokens[row.sequence_id] = token
        return StepResult(tokens=tokens, failed=failed)
