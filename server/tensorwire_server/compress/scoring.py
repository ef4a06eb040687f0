"""What a served text model thinks of tokens, through the engine's own step.

So quality is that of the numbers which answer clients: of the fused products, the stored integers,
the cache, not of a second implementation beside them.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import TYPE_CHECKING

import torch

from tensorwire_server.compress.errors import MeasurementError
from tensorwire_server.scheduling.work import Row, Sampling, StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tensorwire_server.engine.generator import Generator

# So many rows of logits at once: of a vocabulary of 150 000 they take 80 MB.
CHUNK_TOKENS = 128
_SCORED = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0, prompt_logprobs=0)
_GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
_SEQUENCE = 1


def logits_of(generator: Generator, ids: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield the logits behind each token of a text, (T, V) float32, some tokens at a time.

    Raises:
        MeasurementError: the model makes no finite numbers of this text.
    """
    edges = [*range(0, len(ids), CHUNK_TOKENS), len(ids)]
    try:
        for start, end in pairwise(edges):
            row = Row(
                sequence_id=_SEQUENCE,
                token_ids=tuple(ids[start:end]),
                start=start,
                pages=(),
                sample=False,
                sampling=_SCORED,
                history=ids,
                num_prompt_tokens=len(ids) + 1,  # or the last token would count as an answer's
            )
            _, logits_TV = generator.forward(StepPlan(rows=(row,), released=()))
            if not bool(torch.isfinite(logits_TV).all()):
                raise MeasurementError("the model makes no finite numbers of the evaluation text")
            yield logits_TV
    finally:
        generator.forward(StepPlan(rows=(), released=(_SEQUENCE,)))


def log_probabilities(logits_TV: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities in float64: differences of nearly equal ones are summed up."""
    return torch.log_softmax(logits_TV.double(), dim=-1)


def tail_log_probability(generator: Generator, ids: Sequence[int], num_tail: int) -> float:
    """Return the log-probability of the last `num_tail` tokens behind those before them."""
    total = 0.0
    end = 0
    for logits_TV in logits_of(generator, ids[:-1]):
        start, end = end, end + len(logits_TV)
        first = max(start, len(ids) - 1 - num_tail)
        if first < end:
            next_T = torch.tensor(ids[first + 1 : end + 1], device=logits_TV.device)
            own_TV = log_probabilities(logits_TV[first - start :])
            total += float(own_TV.gather(1, next_T[:, None]).sum())
    return total


def continue_greedily(
    generator: Generator, prompts: Sequence[Sequence[int]], num_tokens: int
) -> list[list[int]]:
    """Return what follows each prompt: up to `num_tokens` tokens, the last maybe an end token.

    Raises:
        MeasurementError: the model makes no finite numbers of a prompt.
    """
    texts = [list(prompt) for prompt in prompts]
    try:
        # Read one by one, continued all together: as a server does it.
        for number, prompt in enumerate(prompts):
            _step(generator, texts, [_greedy_row(number, texts[number], 0, len(prompt))])
        for _ in range(num_tokens - 1):
            rows = [
                _greedy_row(number, text, len(text) - 1, len(prompt))
                for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
                if text[-1] not in generator.card.eos_ids
            ]
            if not rows:
                break
            _step(generator, texts, rows)
    finally:
        generator.step(StepPlan(rows=(), released=tuple(range(len(texts)))))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _step(generator: Generator, texts: list[list[int]], rows: Sequence[Row]) -> None:
    result = generator.step(StepPlan(rows=tuple(rows), released=()))
    if result.failed:
        raise MeasurementError("the model makes no finite numbers of a prompt")
    for number, token in result.tokens.items():
        texts[number].append(token)


def _greedy_row(number: int, text: list[int], start: int, num_prompt_tokens: int) -> Row:
    return Row(
        sequence_id=number,
        token_ids=tuple(text[start:]),
        start=start,
        pages=(),
        sample=True,
        sampling=_GREEDY,
        history=text,
        num_prompt_tokens=num_prompt_tokens,
    )


def num_equal(*texts: Sequence[int]) -> int:
    """Return how many tokens texts share before the first difference, or the first end."""
    columns = zip(*texts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
