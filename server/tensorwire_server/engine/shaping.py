"""What changes logits before a token is chosen: bias, penalties, bans; of rows that ask for it.

Meaning and order are those of transformers' processors (`transformers.generation.logits_process`)
and of vLLM's sampler (docs.vllm.ai, "Sampling Parameters"), which agree but for this: frequency and
presence exist in vLLM only, and bad words look at the prompt too, as in transformers.

    logit bias              SequenceBiasLogitsProcessor; vLLM's `logit_bias`
    repetition penalty      RepetitionPenaltyLogitsProcessor: prompt and answer
    frequency, presence     vLLM and the OpenAI API: answer only
    bad words               NoBadWordsLogitsProcessor
    min new tokens          MinNewTokensLengthLogitsProcessor; here for stop ids, too, as in vLLM

How often each token has come is kept for each sequence and grows by a token a step: counting a
history of 4,096 tokens anew takes 100 times as long. Only tokens that have come are touched, so a
step costs what the histories hold, not what the vocabulary does.

Dimensions: R rows, V vocabulary, N pairs of a row and a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tensorwire_server.scheduling.work import Row, Shaping

_FIRST_ROOM = 256


class TokenCounts:
    """Which tokens a sequence has, and how often its answer has them."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._num_read = 0
        self._places: dict[int, int] = {}
        self._ids: NDArray[np.int64] = np.empty(_FIRST_ROOM, dtype=np.int64)
        self._counts: NDArray[np.float32] = np.zeros(_FIRST_ROOM, dtype=np.float32)

    @property
    def num_read(self) -> int:
        """Tokens of the history that are counted."""
        return self._num_read

    @property
    def ids(self) -> NDArray[np.int64]:
        """The tokens, each once; a view that is good until the next `read`."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of `ids` is in the answer; 0 if it is in the prompt only."""
        return self._counts[: len(self._places)]

    def read(self, history: Sequence[int]) -> None:
        """Count what the history has gained; it only ever grows."""
        for position in range(self._num_read, len(history)):
            token_id = history[position]
            place = self._places.get(token_id)
            if place is None:
                place = self._places[token_id] = len(self._places)
                if place == len(self._ids):
                    self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                    self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
                self._ids[place] = token_id
            if position >= self._num_prompt_tokens:
                self._counts[place] += 1
        self._num_read = len(history)


class Shaper:
    """Shapes the logits of rows; keeps what it has counted of each sequence until `release`."""

    def __init__(self) -> None:
        self._counts: dict[int, TokenCounts] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def release(self, sequence_id: int) -> None:
        """Forget a sequence; if it comes again, it is counted from its history."""
        self._counts.pop(sequence_id, None)

    def shape(self, logits_RV: torch.Tensor, rows: Sequence[Row]) -> list[int]:
        """Change the logits of the rows that ask for it, in place.

        Args:
            logits_RV: contiguous.

        Returns:
            The rows of `logits_RV` of which a token was banned.
        """
        shaped = [
            (at, row, row.sampling.shaping)
            for at, row in enumerate(rows)
            if row.sampling.shaping is not None
        ]
        _add_bias(logits_RV, shaped)
        self._penalise(logits_RV, [entry for entry in shaped if entry[2].counts])
        return _ban(logits_RV, shaped)

    def _penalise(self, logits_RV: torch.Tensor, rows: Sequence[tuple[int, Row, Shaping]]) -> None:
        if not rows:
            return
        counted = [self._count(row) for _, row, _ in rows]
        lengths = [len(counts.ids) for counts in counted]

        def spread(values: Sequence[float]) -> NDArray[np.float32]:
            """Return each row's value as often as the row has tokens."""
            return np.repeat(np.array(values, dtype=np.float32), lengths)

        starts = np.repeat([at * logits_RV.shape[1] for at, _, _ in rows], lengths)
        places_N = starts + np.concatenate([counts.ids for counts in counted])
        counts_N = np.concatenate([counts.counts for counts in counted])
        frequency_N = spread([s.frequency_penalty for _, _, s in rows])
        presence_N = spread([s.presence_penalty for _, _, s in rows])
        taken_off_N = frequency_N * counts_N + presence_N * (counts_N > 0)
        device = logits_RV.device
        at_N = torch.from_numpy(places_N).to(device)
        factor_N = torch.from_numpy(spread([s.repetition_penalty for _, _, s in rows])).to(device)
        # One row of all: to select from it takes a third of what two indexes do.
        flat = logits_RV.view(-1)
        scores_N = flat.index_select(0, at_N)
        scores_N = torch.where(scores_N < 0, scores_N * factor_N, scores_N / factor_N)
        scores_N -= torch.from_numpy(taken_off_N).to(device)
        flat.index_copy_(0, at_N, scores_N)

    def _count(self, row: Row) -> TokenCounts:
        counts = self._counts.get(row.sequence_id)
        if counts is None or counts.num_read > len(row.history):
            counts = self._counts[row.sequence_id] = TokenCounts(row.num_prompt_tokens)
        counts.read(row.history)
        return counts


def _add_bias(logits_RV: torch.Tensor, rows: Sequence[tuple[int, Row, Shaping]]) -> None:
    pairs = [(at, token_id, value) for at, _, s in rows for token_id, value in s.bias]
    if pairs:
        at, ids, values = zip(*pairs, strict=True)
        places = (_indexes(at, logits_RV), _indexes(ids, logits_RV))
        logits_RV[places] += torch.tensor(values, dtype=logits_RV.dtype, device=logits_RV.device)


def _ban(logits_RV: torch.Tensor, rows: Sequence[tuple[int, Row, Shaping]]) -> list[int]:
    pairs = [(at, token_id) for at, row, s in rows for token_id in _banned(row, s)]
    if pairs:
        at, ids = zip(*pairs, strict=True)
        logits_RV[_indexes(at, logits_RV), _indexes(ids, logits_RV)] = -torch.inf
    for only_at, token_id in [(at, s.only) for at, _, s in rows if s.only is not None]:
        logits_RV[only_at] = -torch.inf
        logits_RV[only_at, token_id] = 0.0
    return sorted({at for at, _ in pairs})


def _indexes(values: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long, device=like.device)


def _banned(row: Row, shaping: Shaping) -> list[int]:
    history = row.history
    banned = [
        word[-1] for word in shaping.bad_words if len(word) == 1 or _ends_with(history, word[:-1])
    ]
    if len(history) - row.num_prompt_tokens < shaping.min_new_tokens:
        banned += shaping.stop_ids
    return banned


def _ends_with(history: Sequence[int], start: tuple[int, ...]) -> bool:
    # The last one first: it alone decides nearly always.
    return (
        len(history) >= len(start)
        and history[-1] == start[-1]
        and tuple(history[-len(start) :]) == start
    )
