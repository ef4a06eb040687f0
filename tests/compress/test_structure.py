"""What is planted as useless goes first, and what it leaves behind is exact."""

from __future__ import annotations

from typing import Any

import models_zoo
import pytest
import torch
from tensorwire_server.compress import prune_model
from tensorwire_server.compress.blocks import blocks_of
from tensorwire_server.compress.structure import contributions, refit
from transformers import AutoModelForCausalLM

WINDOWS = [torch.arange(3, 120).unsqueeze(0), torch.arange(200, 320).unsqueeze(0)]
SHARE_OF_ONE_NEURON = 1 / 96


def load(family: str = "llama") -> Any:
    return AutoModelForCausalLM.from_pretrained(models_zoo.tiny_model(family))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=WINDOWS[0]).logits
    return found


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_dead_neuron_of_each_layer_goes_first(family: str) -> None:
    model = load(family)
    for index, block in enumerate(blocks_of(model)):
        output: Any = block.linear(block.family.feed_forward[-1])[1]
        is_transposed = family == "gpt2"
        (output.weight.data.T if is_transposed else output.weight.data)[:, 11 * index + 5] = 0
    num_neurons = 256 if family == "gpt2" else 96
    before = logits(model)
    prune_model(model, 1 / num_neurons, structure="neurons", calibration=WINDOWS)
    # All that is left was fitted again, to what it gave already.
    assert torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize(("family", "dead"), [("llama", 0), ("llama", 1), ("phi3", 0), ("phi3", 1)])
def test_a_dead_head_group_of_each_layer_goes_first(family: str, dead: int) -> None:
    model = load(family)
    for block in blocks_of(model):
        block.linear("self_attn.o_proj")[1].weight.data[:, 32 * dead : 32 * (dead + 1)] = 0
    before = logits(model)
    prune_model(model, 0.5, structure="heads", calibration=WINDOWS)
    assert torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize("idle", [0, 1, 2])
def test_a_layer_that_changes_nothing_goes_first(idle: int) -> None:
    model = load("gemma2")
    block = blocks_of(model)[idle].module
    for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
        norm: Any = block.get_submodule(name)
        norm.weight.data.fill_(-1.0)  # Gemma's norms multiply by 1 + weight
    before = logits(model)
    pruned = prune_model(model, 1 / 3, structure="layers", calibration=WINDOWS)
    assert torch.equal(logits(model), before)
    assert {parameter.name.split(".")[2] for parameter in pruned.parameters} == {str(idle)}
    assert {parameter.after[0] for parameter in pruned.parameters} == {0}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert model.config.layer_types == kinds[:idle] + kinds[idle + 1 :]


def test_parameters_are_told_with_the_shapes_before_and_after() -> None:
    model = load()
    pruned = prune_model(model, 0.25, structure="neurons", calibration=WINDOWS)
    told = {parameter.name: (parameter.before, parameter.after) for parameter in pruned.parameters}
    assert len(told) == 9
    assert told["model.layers.1.mlp.gate_proj.weight"] == ((96, 64), (72, 64))
    assert told["model.layers.2.mlp.down_proj.weight"] == ((64, 96), (64, 72))


def test_a_contribution_is_the_norm_of_what_a_unit_adds() -> None:
    weight_OI, inputs_TI = torch.rand(5, 12), torch.rand(30, 12)
    added = contributions(weight_OI, inputs_TI.T @ inputs_TI, 4)
    for unit in range(4):
        part = slice(3 * unit, 3 * unit + 3)
        wanted = (inputs_TI[:, part] @ weight_OI[:, part].T).square().sum()
        assert float(added[unit]) == pytest.approx(float(wanted), rel=1e-4)


def test_what_stays_makes_up_for_what_goes() -> None:
    """An input that others add up to can go without loss."""
    generator = torch.Generator().manual_seed(5)
    inputs_TI = torch.randn(200, 6, generator=generator)
    inputs_TI[:, 5] = inputs_TI[:, 0] - inputs_TI[:, 3]
    weight_OI, kept = torch.randn(4, 6, generator=generator), torch.arange(5)
    fitted = refit(weight_OI, inputs_TI.T @ inputs_TI, kept)
    wanted = inputs_TI @ weight_OI.T
    lost = (inputs_TI[:, kept] @ fitted.T - wanted).norm() / wanted.norm()
    assert lost < 0.02
    assert (inputs_TI[:, kept] @ weight_OI[:, kept].T - wanted).norm() / wanted.norm() > 0.2
