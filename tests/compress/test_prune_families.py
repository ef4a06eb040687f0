"""Every family of the table: what goes, and that plain `from_pretrained` loads what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import models_zoo
import pytest
import torch
import transformers
from tensorwire_server.compress import (
    Quantization,
    RecipeError,
    Rounding,
    prune_model,
    quantize_model,
)
from tensorwire_server.compress.blocks import blocks_of
from tensorwire_server.compress.families import FAMILIES
from transformers import AutoModel, AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

DECODERS = (
    *("llama", "qwen2", "qwen2-mixed", "qwen3", "mistral", "gemma", "gemma2", "gemma3"),
    *("granite", "olmo2", "cohere", "phi", "phi3", "gpt2", "gpt-neox", "opt", "falcon"),
    *("falcon-multi-query", "falcon-alibi", "stablelm"),
)
ENCODERS = ("bert", "roberta", "xlm-roberta")
FIXED_HEADS = (
    *("gpt2", "gpt-neox", "opt", "falcon", "falcon-multi-query", "falcon-alibi", "stablelm"),
    *ENCODERS,
)
IDS = torch.arange(7, 47).unsqueeze(0)


def load(family: str) -> Any:
    """Return a tiny random model."""
    if family not in ENCODERS:
        return AutoModelForCausalLM.from_pretrained(models_zoo.tiny_model(family))
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=models_zoo.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return AutoModel.from_config(config).eval()


def windows(seed: int = 0) -> list[torch.Tensor]:
    """Return a text of two lengths; long enough for every input to be used."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, models_zoo.VOCAB_SIZE, (1, length), generator=generator)
        for length in (48, 40)
    ]


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS)[0]
    return found


def reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def test_every_family_of_the_table_is_in_these_tests() -> None:
    assert {load(family).config.model_type for family in (*DECODERS, *ENCODERS)} == set(FAMILIES)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_linear_layers_are_all_matrices_of_a_block(family: str) -> None:
    for block in blocks_of(load(family)):
        matrices = {
            f"{block.name}.{name}"
            for name, parameter in block.module.named_parameters()
            if parameter.ndim == 2
        }
        assert {f"{name}.weight" for name in block.linears} == matrices


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_neurons_and_a_layer_go_and_the_rest_loads(family: str, tmp_path: Path) -> None:
    model = load(family)
    last = blocks_of(model)[0].linears[_last(model)]
    num_neurons = last.weight.numel() // model.config.hidden_size
    achieved = prune_model(model, 0.25, structure="neurons", calibration=windows())
    assert (achieved.achieved, achieved.met) == (0.25, True)
    before = outputs(model)
    assert before.isfinite().all()
    prune_model(model, 1 / 3, structure="layers", calibration=windows())
    assert not torch.equal(outputs(model), before)
    again = reloaded(model, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert again.config.num_hidden_layers == len(blocks_of(again)) == 2
    for block in blocks_of(again):
        weight: torch.Tensor = block.linears[f"{block.name}.{block.family.feed_forward[-1]}"].weight
        assert weight.numel() == again.config.hidden_size * num_neurons * 3 // 4
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize("family", sorted({*DECODERS} - {*FIXED_HEADS}))
def test_half_of_the_head_groups_go_and_the_rest_loads(family: str, tmp_path: Path) -> None:
    model = load(family)
    size = model.config.get_text_config().head_dim if hasattr(model.config, "head_dim") else 16
    prune_model(model, 0.5, structure="heads", calibration=windows())
    again = reloaded(model, tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (2, 1)
    assert again.config.head_dim == size
    for block in blocks_of(again):
        *inputs, output = (block.linear(part)[1] for part in block.family.attention)
        assert sum(linear.weight.shape[0] for linear in inputs) == 4 * size
        assert output.weight.shape[1] == 2 * size


@pytest.mark.parametrize("family", FIXED_HEADS)
def test_heads_of_families_that_derive_their_size_are_refused(family: str) -> None:
    model = load(family)
    before = outputs(model)
    with pytest.raises(RecipeError, match=r"heads of .* cannot go: .* prune neurons or layers"):
        prune_model(model, 0.5, structure="heads", calibration=windows())
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_weights_go_one_by_one_and_zeros_survive_quantization(family: str) -> None:
    model = load(family)
    before = outputs(model)
    # The text passes from block to block as it does through the model: no change, no error.
    unchanged = prune_model(model, 1e-9, method="wanda", calibration=windows())
    assert {error.error for error in unchanged.errors} == {0.0}
    assert torch.equal(outputs(model), before)
    prune_model(model, 0.5, method="wanda", calibration=windows())
    gone = {name: weight == 0 for name, weight in model.named_parameters() if weight.ndim == 2}
    if family != "gpt2":  # whose matrices the format does not hold
        form = Quantization(bits=4, group_size=32, rounding=Rounding.GPTQ)
        quantize_model(model, form, calibration=windows())
    weights = dict(model.named_parameters())
    for block in blocks_of(model):
        for name in block.linears:
            was_zero = gone[f"{name}.weight"]
            assert was_zero.float().mean() == pytest.approx(0.5, abs=0.001)
            assert bool((weights[f"{name}.weight"][was_zero] == 0).all())


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_family_that_is_not_known_is_refused_by_name(family: str) -> None:
    model = load(family)
    with pytest.raises(RecipeError, match=rf"'{model.config.model_type}' cannot .* known are bert"):
        prune_model(model, 0.5)


def _last(model: Any) -> str:
    block = blocks_of(model)[0]
    return block.linear(block.family.feed_forward[-1])[0]
