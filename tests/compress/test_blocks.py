"""The passage of a text gives each block what the model would give it."""

from __future__ import annotations

import models_zoo
import pytest
import torch
from tensorwire_server.compress import RecipeError
from tensorwire_server.compress.blocks import Passage, blocks_of
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "falcon-alibi"])
@torch.no_grad()
def test_every_block_gets_what_the_model_would_give_it(family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(models_zoo.tiny_model(family))
    windows = [torch.arange(3, 40).unsqueeze(0), torch.arange(9, 30).unsqueeze(0)]
    wanted = [model(input_ids=ids, output_hidden_states=True).hidden_states for ids in windows]
    passage = Passage(model, windows)
    for index, block in enumerate(blocks_of(model)):
        for (hidden, _), states in zip(passage.compute(block), wanted, strict=True):
            assert torch.equal(hidden, states[index])
        norms, grams = passage.input_norms(block), passage.input_grams(block, [*PARTS[family]])
        for name, gram_II in grams.items():
            assert torch.allclose(norms[name].square(), gram_II.diagonal(), rtol=1e-4)
        passage.advance(block)


PARTS = {
    "gemma3": ("self_attn.q_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_attn", "mlp.c_proj"),
    "falcon-alibi": ("self_attention.dense",),
}


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ([], "is empty"),
        ([torch.zeros(5, dtype=torch.int64)], r"shape \(1, tokens\), got \[5\]"),
        ([torch.tensor([[1, 512]])], "outside of the vocabulary"),
        ([torch.tensor([[-1, 5]])], "outside of the vocabulary"),
    ],
)
def test_a_text_that_is_none_for_this_model_is_refused(
    windows: list[torch.Tensor], said: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(models_zoo.tiny_model("llama"))
    with pytest.raises(RecipeError, match=said):
        Passage(model, windows)
