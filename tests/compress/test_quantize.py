"""Rounding to nearest and GPTQ, against the paper written out."""

from __future__ import annotations

from typing import Any

import models_zoo
import pytest
import torch
from tensorwire_server.compress import (
    Quantization,
    RecipeError,
    Rounding,
    prune_model,
    quantize_model,
)
from tensorwire_server.compress.blocks import blocks_of
from tensorwire_server.compress.quantize import round_by_gptq, round_to_nearest
from tensorwire_server.engine.quantized import pack, round_scales
from transformers import AutoModelForCausalLM

WINDOWS = [torch.arange(3, 60).unsqueeze(0), torch.arange(90, 140).unsqueeze(0)]
INT8 = Quantization(bits=8)
INT4 = Quantization(bits=4, group_size=32)


def matrix_and_inputs(num_inputs: int = 320) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (24, I) weights and (2 I, I) inputs that depend on each other."""
    generator = torch.Generator().manual_seed(7)
    weight_OI = torch.randn(24, num_inputs, generator=generator)
    mixed = torch.randn(num_inputs, num_inputs, generator=generator) / num_inputs**0.5
    inputs_TI = torch.randn(2 * num_inputs, num_inputs, generator=generator) @ (
        torch.eye(num_inputs) + mixed
    )
    return weight_OI, inputs_TI


def gptq_by_the_paper(
    weight_OI: torch.Tensor, inputs_TI: torch.Tensor, bits: int, size: int
) -> torch.Tensor:
    """Return integers by equations 2 and 3 of the paper: an explicit inverse, one input a time."""
    most = 2 ** (bits - 1) - 1
    weight = weight_OI.double().clone()
    hessian = (inputs_TI.T @ inputs_TI).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(hessian.shape[0])
    inverse = torch.linalg.inv(hessian)
    integers = torch.zeros_like(weight)
    for i in range(weight.shape[1]):
        if i % size == 0:
            scales = round_scales(weight[:, i : i + size].abs().amax(1).float() / most, bits)
        integers[:, i] = (weight[:, i] / scales).round().clamp(-most, most)
        error = (weight[:, i] - integers[:, i] * scales) / inverse[i, i]
        weight -= error.outer(inverse[i])
        inverse -= inverse[:, i].outer(inverse[i]) / inverse[i, i].clone()
        inverse[i, i] = 1.0  # it is settled; any number but 0
    return integers


@pytest.mark.parametrize("form", [INT4, Quantization(bits=4, group_size=24), INT8], ids=str)
def test_gptq_is_the_papers(form: Quantization) -> None:
    weight_OI, inputs_TI = matrix_and_inputs()
    found = round_by_gptq(weight_OI, inputs_TI.T @ inputs_TI, form)
    wanted = gptq_by_the_paper(weight_OI, inputs_TI, form.bits, form.group_size or 320)
    # One is computed in float32: a weight half way between two integers may go either way.
    different = found.values_OI != wanted
    assert float(different.float().mean()) < 0.005


@pytest.mark.parametrize("form", [INT4, INT8], ids=str)
def test_gptq_changes_outputs_less_than_rounding_to_nearest(form: Quantization) -> None:
    weight_OI, inputs_TI = matrix_and_inputs()
    wanted = inputs_TI @ weight_OI.T
    gptq = round_by_gptq(weight_OI, inputs_TI.T @ inputs_TI, form).dequantize()
    nearest = round_to_nearest(weight_OI, form).dequantize()
    assert (inputs_TI @ gptq.T - wanted).norm() < 0.8 * (inputs_TI @ nearest.T - wanted).norm()


def test_inputs_that_the_text_never_uses_are_rounded_to_nearest() -> None:
    weight_OI, inputs_TI = matrix_and_inputs(64)
    inputs_TI[:, [5, 40]] = 0
    found = round_by_gptq(weight_OI, inputs_TI.T @ inputs_TI, INT8)
    nearest = (weight_OI / found.scales_OG).round()
    assert torch.equal(found.values_OI[:, [5, 40]].float(), nearest[:, [5, 40]])
    nothing = round_by_gptq(weight_OI, torch.zeros(64, 64), INT4)
    assert torch.equal(nothing.values_OI, round_to_nearest(weight_OI, INT4).values_OI)


@pytest.mark.parametrize("num_inputs", [64, 72])
@pytest.mark.parametrize("form", [INT4, INT8], ids=str)
def test_nearest_is_at_most_half_a_step_away(form: Quantization, num_inputs: int) -> None:
    weight_OI = torch.randn(6, num_inputs, generator=torch.Generator().manual_seed(1))
    weight_OI[2] = 0
    found = round_to_nearest(weight_OI, form)
    size = form.group_size or num_inputs
    assert found.scales_OG.shape == (6, -(-num_inputs // size))
    steps_OI = found.scales_OG.repeat_interleave(size, 1)[:, :num_inputs]
    # Scales are rounded to few bits: the largest of a group may miss by that much.
    slack = 2.0**-7 * weight_OI.abs().amax()
    assert bool(((found.dequantize() - weight_OI).abs() <= steps_OI / 2 + slack).all())
    assert found.values_OI.abs().amax() == 2 ** (form.bits - 1) - 1
    assert pack("layer", found)  # the format holds the scales


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.GPTQ])
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_survive(bits: int, rounding: Rounding) -> None:
    model = load()
    prune_model(model, 0.5, method="wanda", calibration=WINDOWS)
    gone = {
        name: linear.weight == 0
        for block in blocks_of(model)
        for name, linear in block.linears.items()
    }
    form = Quantization(bits=bits, rounding=rounding, group_size=32 if bits == 4 else None)
    quantized = quantize_model(model, form, calibration=WINDOWS)
    assert set(quantized.weights) == set(gone)
    for name, weight in quantized.weights.items():
        assert bool((weight.values_OI[gone[name]] == 0).all())
        assert float((weight.values_OI[~gone[name]] != 0).float().mean()) > 0.9


def test_a_models_weights_become_what_is_stored_and_nothing_else_changes() -> None:
    model, told = load(), []
    quantized = quantize_model(model, INT4, on_progress=lambda *what: told.append(what))
    assert [what[:2] for what in told] == [(1, 3), (2, 3), (3, 3)]
    assert quantized.errors == ()
    for name, tensor in load().state_dict().items():
        layer = quantized.weights.get(name.removesuffix(".weight"))
        wanted = tensor if layer is None else layer.dequantize()
        assert torch.equal(model.state_dict()[name], wanted)
    assert len(quantized.weights) == 3 * 7


def test_errors_are_measured_where_there_is_a_text() -> None:
    coarse, fine = (
        quantize_model(load(), form, calibration=WINDOWS).errors for form in (INT4, INT8)
    )
    assert len(coarse) == len(fine) == 3 * 7
    for rough, smooth in zip(coarse, fine, strict=True):
        assert rough.name == smooth.name
        assert 0 < smooth.error < 0.02 < rough.error < 0.3


def test_a_model_that_the_format_does_not_hold_is_refused_and_stays_as_it_was() -> None:
    model, before = load("gpt2"), load("gpt2").state_dict()
    with pytest.raises(RecipeError, match=r"type 'gpt2' cannot be quantized: .* prune only"):
        quantize_model(model, INT8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_is_no_number_is_refused_by_its_name() -> None:
    model = load()
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(RecipeError, match=r"weight model\.norm\.weight holds a number that is inf"):
        quantize_model(model, INT8)


@pytest.mark.parametrize(
    ("form", "weight", "said"),
    [
        (INT4, 1e6, r"layers\.1\.mlp\.up_proj cannot be quantized: scales of int4 must"),
        (
            # Its outputs, squared, are beyond float32.
            Quantization(bits=8, rounding=Rounding.GPTQ),
            1e28,
            r"layers\.1\.mlp\.down_proj cannot be quantized: linalg",
        ),
    ],
    ids=["scale", "gram"],
)
def test_a_matrix_that_cannot_be_quantized_is_named(
    form: Quantization, weight: float, said: str
) -> None:
    model = load()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0] = weight
    with pytest.raises(RecipeError, match=said):
        quantize_model(model, form, calibration=WINDOWS)


def test_gptq_without_a_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="give calibration, or round to nearest"):
        quantize_model(load(), Quantization(bits=8, rounding=Rounding.GPTQ))


def load(family: str = "llama") -> Any:
    return AutoModelForCausalLM.from_pretrained(models_zoo.tiny_model(family))
