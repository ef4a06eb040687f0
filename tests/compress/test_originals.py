"""Errors of layers are those against the parent, whatever was done to it in how many steps."""

from __future__ import annotations

from typing import Any

import models_zoo
import pytest
import torch
from tensorwire_server.compress import Quantization, Rounding, prune_model, quantize_model
from tensorwire_server.compress.blocks import blocks_of
from tensorwire_server.compress.originals import Originals
from transformers import AutoModelForCausalLM

WINDOWS = [torch.arange(3, 60).unsqueeze(0), torch.arange(90, 140).unsqueeze(0)]
INT8 = Quantization(bits=8, rounding=Rounding.GPTQ)


def load(family: str = "llama") -> Any:
    return AutoModelForCausalLM.from_pretrained(models_zoo.tiny_model(family))


def errors_of(model: Any, originals: Originals) -> dict[str, float]:
    return {error.name: error.error for error in originals.measure(model, WINDOWS)}


@torch.no_grad()
def inputs_of(model: Any, name: str) -> torch.Tensor:
    """Return (T, I), what a linear layer gets from the text."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0][0])
    )
    for window in WINDOWS:
        model(input_ids=window)
    handle.remove()
    return torch.cat(found)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_an_unchanged_model_has_no_errors() -> None:
    model = load()
    found = errors_of(model, Originals(model))
    assert set(found) == {name for block in blocks_of(model) for name in block.linears}
    assert set(found.values()) == {0.0}


def test_pruning_counts_where_quantizing_came_last() -> None:
    parent, model = load(), load()
    originals = Originals(model)
    prune_model(model, 0.9, calibration=WINDOWS)
    last_step = quantize_model(model, INT8, calibration=WINDOWS).errors
    found = errors_of(model, originals)
    assert max(error.error for error in last_step) < 0.02
    assert min(found.values()) > 0.1
    name = "model.layers.1.mlp.up_proj"
    inputs_TI = inputs_of(model, name)
    before, after = (one.get_submodule(name).weight.data for one in (parent, model))
    assert found[name] == pytest.approx(
        relative(inputs_TI @ after.T, inputs_TI @ before.T), rel=1e-3
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_what_a_layer_lost_with_its_inputs_is_its_error(family: str) -> None:
    """In the first block the parent's own inputs are those that the text gives it."""
    parent, model = load(family), load(family)
    originals = Originals(model)
    pruned = prune_model(model, 0.25, structure="neurons", calibration=WINDOWS)
    found = errors_of(model, originals)
    assert found == {error.name: error.error for error in pruned.errors}
    first = blocks_of(model)[0]
    name = first.linear(first.family.feed_forward[-1])[0]
    outputs = []
    for one in (parent, model):
        weight = one.get_submodule(name).weight.data
        outputs.append(inputs_of(one, name) @ (weight if family == "gpt2" else weight.T))
    assert found[name] == pytest.approx(relative(outputs[1], outputs[0]), rel=1e-3)
    assert 0 < found[name] < 1
    # What lost outputs has nothing to be compared with.
    assert first.linear(first.family.feed_forward[0])[0] not in found


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_heads_and_layers_that_went_before_are_counted_for(family: str) -> None:
    model = load(family)
    originals = Originals(model)
    gone = prune_model(model, 1 / 3, structure="layers", calibration=WINDOWS)
    assert set(errors_of(model, originals).values()) == {0.0}
    assert gone.errors == ()
    pruned = prune_model(model, 0.5, structure="heads", calibration=WINDOWS)
    assert min(error.error for error in pruned.errors if "o_proj" in error.name) > 0
    quantize_model(model, Quantization(bits=4, group_size=32), calibration=WINDOWS)
    found = errors_of(model, originals)
    by_step = {error.name: error.error for error in pruned.errors}
    for index in (0, 1):
        name = f"model.layers.{index}.self_attn.o_proj"
        assert found[name] > 0.9 * by_step[name]
        assert found[f"model.layers.{index}.mlp.down_proj"] > 0.01
