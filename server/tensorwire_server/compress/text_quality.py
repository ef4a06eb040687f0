"""How far a compressed text model is from its parent, on texts that neither has learnt.

Letters: T tokens, V vocabulary, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tensorwire_server.compress.errors import MeasurementError
from tensorwire_server.compress.intervals import Bootstrap, Estimate, perplexity_of
from tensorwire_server.compress.scoring import (
    continue_greedily,
    log_probabilities,
    logits_of,
    num_equal,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from tensorwire_server.engine.generator import Generator

CONTINUED_TOKENS = 32  # behind each prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class TextQuality:
    """Parent and child on the same windows of text; each window begins anew."""

    num_windows: int
    num_tokens: int  # that were predicted: all but the first of each window
    perplexity_before: Estimate
    perplexity_after: Estimate
    perplexity_ratio: Estimate  # after / before, paired by window
    kl: Estimate  # of the child from the parent, nats a token
    agreement: Estimate  # share of places where both find the same token the likeliest


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    """Greedy answers of parent and child to the same prompts."""

    num_prompts: int
    num_tokens: int  # of the parent's answers
    agreement: Estimate  # share of these before the first difference


def measure_text(
    parent: Generator,
    child: Generator,
    windows: Sequence[Sequence[int]],
    *,
    seed: int,
    on_window: Callable[[], None],
) -> TextQuality:
    """Score both models on token ids.

    Args:
        windows: each of at least 2 tokens and at most the models' context.
        seed: of the intervals.
        on_window: called after each window.

    Raises:
        MeasurementError: a model makes no finite numbers of a window.
    """
    if parent.card.vocab_size != child.card.vocab_size:
        raise MeasurementError("parent and child have different vocabularies")
    rows = []
    for window in windows:
        rows.append(_score(parent, child, window))
        on_window()
    tokens_W, before_W, after_W, kl_W, same_W = np.array(rows).T
    bootstrap = Bootstrap(len(windows), seed=seed)
    return TextQuality(
        num_windows=len(windows),
        num_tokens=int(tokens_W.sum()),
        perplexity_before=bootstrap.estimate(before_W, tokens_W, become=perplexity_of),
        perplexity_after=bootstrap.estimate(after_W, tokens_W, become=perplexity_of),
        perplexity_ratio=bootstrap.estimate(after_W - before_W, tokens_W, become=perplexity_of),
        kl=bootstrap.estimate(kl_W, tokens_W),
        agreement=bootstrap.estimate(same_W, tokens_W),
    )


def _score(parent: Generator, child: Generator, window: Sequence[int]) -> NDArray[np.float64]:
    """Return (5,): tokens, the losses of both models, divergence and agreement, as sums."""
    sums = np.zeros(5)
    # The last token only tells what would come behind the window.
    ids = window[:-1]
    at = 1
    for before_TV, after_TV in zip(logits_of(parent, ids), logits_of(child, ids), strict=True):
        next_T = torch.tensor(window[at : at + len(before_TV)], device=before_TV.device)
        at += len(next_T)
        sums += compare(before_TV, after_TV, next_T)
    return sums


def compare(
    before_TV: torch.Tensor, after_TV: torch.Tensor, next_T: torch.Tensor
) -> NDArray[np.float64]:
    """Compare two models' logits where `next_T` came next.

    Returns:
        (5,), sums over T: tokens, the losses of both (nats), the divergence KL(before || after)
        (nats), how often both find the same token the likeliest.
    """
    before, after = log_probabilities(before_TV), log_probabilities(after_TV)
    losses = [-float(model.gather(1, next_T[:, None]).sum()) for model in (before, after)]
    kl = float((before.exp() * (before - after)).sum())
    same = int((before_TV.argmax(-1) == after_TV.argmax(-1)).sum())
    return np.array([len(next_T), *losses, kl, same], dtype=np.float64)


def measure_continuations(
    parent: Generator, child: Generator, prompts: Sequence[Sequence[int]], *, seed: int
) -> Continuations:
    """Let both models continue prompts greedily.

    Args:
        prompts: token ids, each at least 1 and at most the context less `CONTINUED_TOKENS`.
        seed: of the interval.

    Raises:
        MeasurementError: a model makes no finite numbers of a prompt.
    """
    wanted = continue_greedily(parent, prompts, CONTINUED_TOKENS)
    found = continue_greedily(child, prompts, CONTINUED_TOKENS)
    equal = [num_equal(one, other) for one, other in zip(wanted, found, strict=True)]
    lengths = [len(one) for one in wanted]
    return Continuations(
        num_prompts=len(prompts),
        num_tokens=sum(lengths),
        agreement=Bootstrap(len(prompts), seed=seed).estimate(equal, lengths),
    )
