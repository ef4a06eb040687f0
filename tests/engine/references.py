"""What transformers' own processors make of logits, for what is to be equal to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensorwire_server.scheduling.work import Row, Sampling, Shaping
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

NUM_DRAWS = 20_000


def row_of(
    sampling: Sampling,
    history: Sequence[int] = (0,),
    *,
    num_prompt_tokens: int = 1,
    sequence_id: int = 0,
) -> Row:
    """Return a decoding row whose next token follows `history`."""
    return Row(
        sequence_id=sequence_id,
        token_ids=(history[-1],),
        start=len(history) - 1,
        pages=(0,),
        sample=True,
        sampling=sampling,
        history=history,
        num_prompt_tokens=num_prompt_tokens,
    )


def shaped(
    logits_V: torch.Tensor, shaping: Shaping, history: Sequence[int], num_prompt_tokens: int
) -> torch.Tensor:
    """Return the logits as transformers' processors shape them, in its order.

    Frequency and presence penalties, which it does not have, are as in the OpenAI API.
    """
    before, after = LogitsProcessorList(), LogitsProcessorList()
    if shaping.bias:
        before.append(SequenceBiasLogitsProcessor([[[i], value] for i, value in shaping.bias]))
    before.append(RepetitionPenaltyLogitsProcessor(shaping.repetition_penalty))
    if shaping.bad_words:
        words = [list(word) for word in shaping.bad_words]
        after.append(NoBadWordsLogitsProcessor(words))
    if shaping.min_new_tokens:
        after.append(
            MinNewTokensLengthLogitsProcessor(
                num_prompt_tokens, shaping.min_new_tokens, list(shaping.stop_ids), device="cpu"
            )
        )
    ids: Any = torch.tensor([list(history)])
    scores = before(ids, logits_V[None].clone())
    counts = torch.bincount(ids[0, num_prompt_tokens:], minlength=len(logits_V))
    scores -= shaping.frequency_penalty * counts + shaping.presence_penalty * (counts > 0)
    result: torch.Tensor = after(ids, scores)[0]
    return result


def distribution(logits_V: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Return the probabilities that transformers' warpers leave: (V,)."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(how.temperature)])
    if how.top_k is not None:
        warpers.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        warpers.append(TopPLogitsWarper(how.top_p))
    if how.min_p > 0:
        warpers.append(MinPLogitsWarper(how.min_p))
    no_ids: Any = torch.zeros(1, 1, dtype=torch.long)
    left: torch.Tensor = warpers(no_ids, logits_V[None])
    probabilities: torch.Tensor = left.double().softmax(-1)[0]
    return probabilities


def chi_square_excess(drawn: Counter[int | None], expected_V: torch.Tensor) -> float:
    """Return by how much the draws are further from the distribution than chance explains.

    Everything that is expected fewer than 8 times is one bin. A chi-square exceeds its mean by four
    standard deviations in one of some ten thousand cases; seeds are fixed, so a test with it passes
    always or never. A token that cannot be drawn is infinitely far.
    """
    num_draws = drawn.total()
    if any(token is None or expected_V[token] <= 0 for token in drawn):
        return float("inf")
    means = (expected_V * num_draws).tolist()
    common = [token for token, mean in enumerate(means) if mean >= 8]
    rest = num_draws - sum(means[token] for token in common)
    bins = [(drawn[token], means[token]) for token in common]
    if rest >= 8:
        bins.append((num_draws - sum(count for count, _ in bins), rest))
    freedom = len(bins) - 1
    chi_square = sum((count - mean) ** 2 / mean for count, mean in bins)
    return float(chi_square - freedom - 4 * (2 * freedom) ** 0.5 - 1e-9)
