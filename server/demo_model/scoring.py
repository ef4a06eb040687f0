"""Bits that a language model needs for a text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@torch.inference_mode()
def model_bits(model: LlamaForCausalLM, ids: list[int]) -> float:
    """Return the bits for all of `ids`, each read with at least half a context before it.

    Only the first half context of the text has less to go by. The end token of an imagined
    document before it stands at the front, so that the first real token is counted too.
    """
    context: int = model.config.max_position_embeddings
    stride = context // 2
    sequence = torch.tensor([model.config.eos_token_id, *ids])
    nats, num_scored = 0.0, 0
    while num_scored < len(ids):
        stop = min(len(ids), num_scored + (stride if num_scored else context))
        start = max(0, stop - context)
        logits_TV = model(sequence[None, start:stop]).logits[0, num_scored - start :]
        targets_T = sequence[num_scored + 1 : stop + 1]
        nats += cross_entropy(logits_TV.float(), targets_T, reduction="sum").item()
        num_scored = stop
    return nats / math.log(2)


@torch.inference_mode()
def answer_bits(model: LlamaForCausalLM, question_ids: list[int], answer_ids: list[int]) -> float:
    """Return the bits for an answer after a question, as far as both fit in the context."""
    context: int = model.config.max_position_embeddings
    sequence = torch.tensor([model.config.eos_token_id, *question_ids, *answer_ids])[:context]
    logits_TV = model(sequence[None, :-1]).logits[0, len(question_ids) :]
    targets_T = sequence[len(question_ids) + 1 :]
    return cross_entropy(logits_TV, targets_T, reduction="sum").item() / math.log(2)


@torch.inference_mode()
def bits_by_position(model: LlamaForCausalLM, ids: list[int]) -> dict[str, float]:
    """Return mean bits per token in each eighth of a full window, cut from `ids` end to end."""
    context: int = model.config.max_position_embeddings
    num_windows = (len(ids) - 1) // context
    sequence = torch.tensor(ids[: num_windows * context + 1])
    sums_T = torch.zeros(context)
    for start in range(0, num_windows * context, context):
        logits_TV = model(sequence[None, start : start + context]).logits[0]
        targets_T = sequence[start + 1 : start + context + 1]
        sums_T += cross_entropy(logits_TV, targets_T, reduction="none")
    means = (sums_T / num_windows / math.log(2)).reshape(8, -1).mean(dim=1)
    eighth = context // 8
    return {f"{i * eighth}-{(i + 1) * eighth - 1}": mean.item() for i, mean in enumerate(means)}
