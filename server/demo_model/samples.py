"""Text sampled from the demo model, and how much of it was learnt by heart."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPAN_CHARS = 60
NUM_SPANS = 200
MAX_NEW_TOKENS = 160
BATCH_SIZE = 50
SEED = 7

_SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")


def sample_texts(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[str]:
    """Return a batch of documents that the model makes up after an end token alone."""
    prompts = torch.full((BATCH_SIZE, 1), tokenizer.eos_token_id)
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[misc,assignment]
    outputs = generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
    )
    texts = tokenizer.batch_decode(outputs)
    # A document may be a chat: then its longest turn is taken.
    return [max(_SPECIAL_TOKEN.split(text), key=len) for text in texts]


def verbatim_share(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train_text: str,
    *,
    temperature: float,
    top_p: float,
) -> float:
    """Return how many of 200 sampled spans, each of its own document, are in `train_text`."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    spans: list[str] = []
    while len(spans) < NUM_SPANS:
        for text in sample_texts(model, tokenizer, temperature=temperature, top_p=top_p):
            if len(text) >= SPAN_CHARS:
                start = rng.randrange(len(text) - SPAN_CHARS + 1)
                spans.append(text[start : start + SPAN_CHARS])
    return sum(span in train_text for span in spans[:NUM_SPANS]) / NUM_SPANS
