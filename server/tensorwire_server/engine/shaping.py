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
step costs what the histories hold, not what the vocabulary does. What a request says for all of
its steps becomes arrays once: 64 rows with 300 biases each took 30 ms a step to read from tuples.

Dimensions: R rows, V vocabulary, N pairs of a row and a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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


class ShapedSequence:
    """What a sequence's shaping is in every step, as arrays; and its counts, where they matter.

    Args:
        shaping: of all its rows, until it is released.
        vocab: tokens that have a logit. A model's own stop ids may be others, which never come.
    """

    def __init__(self, shaping: Shaping, num_prompt_tokens: int, *, vocab: int) -> None:
        self.shaping = shaping
        self.bias_ids = _ids(token_id for token_id, _ in shaping.bias)
        self.bias_values = np.array([value for _, value in shaping.bias], dtype=np.float32)
        self.counts = TokenCounts(num_prompt_tokens) if shaping.counts else None
        self._num_prompt_tokens = num_prompt_tokens
        words = [word for word in shaping.bad_words if 0 <= word[-1] < vocab]
        self._always = _ids(word[0] for word in words if len(word) == 1)
        stop_ids = _ids(token_id for token_id in shaping.stop_ids if token_id < vocab)
        self._at_first = np.concatenate([self._always, stop_ids])
        # By the token before the one that would complete it: that one alone decides nearly always.
        self._words: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) > 1:
                self._words.setdefault(word[-2], []).append(word)

    def banned(self, history: Sequence[int]) -> NDArray[np.int64]:
        """Return the tokens that may not come next."""
        is_first = len(history) - self._num_prompt_tokens < self.shaping.min_new_tokens
        banned = self._at_first if is_first else self._always
        words = self._words.get(history[-1], ())
        ended = [word[-1] for word in words if _ends_with(history, word[:-1])]
        return np.concatenate([banned, _ids(ended)]) if ended else banned


class Shaper:
    """Shapes the logits of rows; keeps what it knows of each sequence until `release`."""

    def __init__(self) -> None:
        self._sequences: dict[int, ShapedSequence] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def release(self, sequence_id: int) -> None:
        """Forget a sequence; if it comes again, it is counted from its history."""
        self._sequences.pop(sequence_id, None)

    def shape(self, logits_RV: torch.Tensor, rows: Sequence[Row]) -> list[int]:
        """Change the logits of the rows that ask for it, in place.

        Args:
            logits_RV: contiguous.

        Returns:
            The rows of `logits_RV` of which a token was banned.
        """
        shaped = [
            (at, row, self._sequence(row, row.sampling.shaping, logits_RV.shape[1]))
            for at, row in enumerate(rows)
            if row.sampling.shaping is not None
        ]
        if not shaped:
            return []
        _add_bias(logits_RV, [(at, known) for at, _, known in shaped if len(known.bias_ids)])
        _penalise(
            logits_RV,
            [
                (at, known.shaping, known.counts)
                for at, _, known in shaped
                if known.counts is not None
            ],
        )
        banned = [(at, known.banned(row.history)) for at, row, known in shaped]
        _ban(logits_RV, [(at, ids) for at, ids in banned if len(ids)])
        for at, _, known in shaped:
            if known.shaping.only is not None:
                logits_RV[at] = -torch.inf
                logits_RV[at, known.shaping.only] = 0.0
        return [at for at, ids in banned if len(ids)]

    def _sequence(self, row: Row, shaping: Shaping, vocab: int) -> ShapedSequence:
        known = self._sequences.get(row.sequence_id)
        if (
            known is None
            or known.shaping is not shaping
            or (known.counts is not None and known.counts.num_read > len(row.history))
        ):
            known = ShapedSequence(shaping, row.num_prompt_tokens, vocab=vocab)
            self._sequences[row.sequence_id] = known
        if known.counts is not None:
            known.counts.read(row.history)
        return known


def _add_bias(logits_RV: torch.Tensor, rows: Sequence[tuple[int, ShapedSequence]]) -> None:
    if rows:
        values = np.concatenate([known.bias_values for _, known in rows])
        at_N = _places(logits_RV, [(at, known.bias_ids) for at, known in rows])
        logits_RV.view(-1).index_add_(0, at_N, torch.from_numpy(values).to(logits_RV.device))


def _penalise(logits_RV: torch.Tensor, rows: Sequence[tuple[int, Shaping, TokenCounts]]) -> None:
    if not rows:
        return
    counted = [counts for _, _, counts in rows]
    lengths = [len(counts.ids) for counts in counted]

    def spread(values: Sequence[float]) -> NDArray[np.float32]:
        """Return each row's value as often as the row has tokens."""
        return np.repeat(np.array(values, dtype=np.float32), lengths)

    at_N = _places(logits_RV, [(at, counts.ids) for at, _, counts in rows])
    counts_N = np.concatenate([counts.counts for counts in counted])
    frequency_N = spread([s.frequency_penalty for _, s, _ in rows])
    presence_N = spread([s.presence_penalty for _, s, _ in rows])
    taken_off_N = frequency_N * counts_N + presence_N * (counts_N > 0)
    device = logits_RV.device
    factor_N = torch.from_numpy(spread([s.repetition_penalty for _, s, _ in rows])).to(device)
    # One row of all: to select from it takes a third of what two indexes do.
    flat = logits_RV.view(-1)
    scores_N = flat.index_select(0, at_N)
    scores_N = torch.where(scores_N < 0, scores_N * factor_N, scores_N / factor_N)
    scores_N -= torch.from_numpy(taken_off_N).to(device)
    flat.index_copy_(0, at_N, scores_N)


def _ban(logits_RV: torch.Tensor, rows: Sequence[tuple[int, NDArray[np.int64]]]) -> None:
    if rows:
        logits_RV.view(-1).index_fill_(0, _places(logits_RV, rows), -torch.inf)


def _places(logits_RV: torch.Tensor, rows: Sequence[tuple[int, NDArray[np.int64]]]) -> torch.Tensor:
    """Return where the tokens of each row are if all rows are one."""
    vocab = logits_RV.shape[1]
    return torch.from_numpy(np.concatenate([ids + at * vocab for at, ids in rows])).to(
        logits_RV.device
    )


def _ids(ids: Iterable[int]) -> NDArray[np.int64]:
    return np.array([*ids], dtype=np.int64)


def _ends_with(history: Sequence[int], start: tuple[int, ...]) -> bool:
    return len(history) >= len(start) and tuple(history[-len(start) :]) == start
