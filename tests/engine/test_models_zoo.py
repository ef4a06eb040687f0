"""The tiny models can tell right from wrong."""

from __future__ import annotations

import models_zoo
import pytest

from .driving import mixed_requests, references


@pytest.mark.slow
@pytest.mark.parametrize("family", models_zoo.EVERY_FAMILY)
def test_greedy_output_wanders_and_differs_between_prompts(family: str) -> None:
    requests = mixed_requests(64, seed=1)
    outputs = [tokens for tokens, _ in references(models_zoo.tiny_model(family), requests)]
    uncut = [
        tokens
        for tokens, request in zip(outputs, requests, strict=True)
        if len(tokens) == request.max_new_tokens
    ]
    assert len(uncut) >= 48, "too many meet EOS at once"
    assert min(len(set(tokens)) for tokens in uncut) >= 8
    prompts = {request.prompt_ids for request in requests}
    assert len({tuple(tokens[:8]) for tokens in outputs}) == len(prompts)
