"""Quantizing: weights as integers and scales, rounded to nearest or by GPTQ.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds a matrix input by input, and has the inputs
that are still to come make up for the error, as far as the calibration text shows that they can:
with the inverse of H = X Xt of its inputs, the rounding error of input i, divided by the diagonal,
is taken off the later weights in proportion to row i. Its Cholesky factor holds all these rows at
once. Scales of a group are found when its first input comes, from the weights as they then are.

Zeros stay zeros, so a pruned model stays pruned; what that costs is made up for in the same way.

Dimensions: O outputs, I inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from tensorwire_server.compress.blocks import Passage, blocks_of, checked_blocks, weight_of
from tensorwire_server.compress.recipe import Quantization, RecipeError, Rounding
from tensorwire_server.compress.results import LayerError, Quantized
from tensorwire_server.engine.quantized import QuantizedWeight, round_scales

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorwire_server.compress.blocks import OnProgress

_DAMPING = 0.01  # of the mean of H's diagonal: the paper's
# Inputs whose errors reach the ones beyond only together: one large product instead of many small.
_LAZY_INPUTS = 128


@torch.no_grad()
def quantize_model(
    model: Any,
    quantization: Quantization,
    *,
    calibration: Sequence[torch.Tensor] | None = None,
    on_progress: OnProgress | None = None,
) -> Quantized:
    """Quantize the linear layers of a model's blocks; its weights become what is stored.

    Args:
        model: a decoder or encoder of a family in `families.py`; is left in evaluation mode.
        quantization: how.
        calibration: token ids, int64 (1, T) each. GPTQ needs them; with them the errors of layers
            are measured.
        on_progress: is told what is done of how much.

    Raises:
        RecipeError: there is no text for GPTQ, or the model is not one that can be quantized.
    """
    refuse_unquantizable(model)
    blocks = checked_blocks(model)
    is_gptq = quantization.rounding == Rounding.GPTQ
    if is_gptq and calibration is None:
        raise RecipeError("gptq rounds by what a text shows; give calibration, or round to nearest")
    passage = None if calibration is None else Passage(model, calibration)
    weights: dict[str, QuantizedWeight] = {}
    errors: list[LayerError] = []
    for block in blocks:
        parts = (*block.family.attention, *block.family.feed_forward)
        grams = passage.input_grams(block, parts) if passage is not None and is_gptq else {}
        original = block.copied()
        for name, linear in block.linears.items():
            weights[name] = _rounded(name, weight_of(linear), grams.get(name), quantization)
            weight_of(linear).copy_(weights[name].dequantize())
        if passage is not None:
            errors += passage.advance_compared(block, original)
        if on_progress is not None:
            on_progress(block.index + 1, len(blocks), "quantizing")
    return Quantized(weights=weights, errors=tuple(errors))


def refuse_unquantizable(model: Any) -> None:
    """Make sure that the format holds a model's linear layers.

    Raises:
        RecipeError: it does not, or the model's family is not known.
    """
    linears = [linear for block in blocks_of(model) for linear in block.linears.values()]
    if any(isinstance(linear, Conv1D) for linear in linears):
        raise RecipeError(
            f"models of the type {model.config.model_type!r} cannot be quantized: they keep their"
            " matrices the other way round, which no reader of the format expects; prune only"
        )


def _rounded(
    name: str, weight_OI: torch.Tensor, gram_II: torch.Tensor | None, quantization: Quantization
) -> QuantizedWeight:
    try:
        if gram_II is None:
            return round_to_nearest(weight_OI, quantization)
        return round_by_gptq(weight_OI, gram_II, quantization)
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise RecipeError(f"{name} cannot be quantized: {error}") from error


def round_to_nearest(weight_OI: torch.Tensor, quantization: Quantization) -> QuantizedWeight:
    """Return the nearest integers, with scales by which the largest weight just fits."""
    bits, group_size = quantization.bits, quantization.group_size
    num_inputs = weight_OI.shape[1]
    size = group_size or num_inputs
    padded_OI = F.pad(weight_OI.float(), (0, -num_inputs % size))
    grouped_OGI = padded_OI.view(len(padded_OI), -1, size)
    scales_OG = _scales(grouped_OGI, bits)
    values_OGI = _integers(grouped_OGI, scales_OG.unsqueeze(-1), bits)
    return QuantizedWeight(
        bits=bits,
        values_OI=values_OGI.flatten(1)[:, :num_inputs].to(torch.int8).contiguous(),
        scales_OG=scales_OG,
        group_size=group_size,
    )


def round_by_gptq(
    weight_OI: torch.Tensor, gram_II: torch.Tensor, quantization: Quantization
) -> QuantizedWeight:
    """Return integers that change the outputs for a text as little as GPTQ finds.

    Args:
        weight_OI: is not changed.
        gram_II: the sum of x xT over the inputs of the text.
    """
    bits, group_size = quantization.bits, quantization.group_size
    num_inputs = weight_OI.shape[1]
    size = group_size or num_inputs
    weight_OI = weight_OI.float().clone()
    is_zero_OI = weight_OI == 0
    factor_II = _inverse_factor(gram_II)
    values_OI = torch.empty_like(weight_OI)
    scales = []
    lazy = _LAZY_INPUTS if group_size is None else -(-_LAZY_INPUTS // size) * size
    for start in range(0, num_inputs, lazy):
        end = min(start + lazy, num_inputs)
        errors_OI = torch.empty(weight_OI.shape[0], end - start)
        for i in range(start, end):
            if i % size == 0:
                scales.append(_scales(weight_OI[:, i : i + size], bits))
            column = weight_OI[:, i]
            values_OI[:, i] = _integers(column, scales[-1], bits).masked_fill(is_zero_OI[:, i], 0)
            error = (column - values_OI[:, i] * scales[-1]) / factor_II[i, i]
            weight_OI[:, i + 1 : end] -= error.outer(factor_II[i, i + 1 : end])
            errors_OI[:, i - start] = error
        weight_OI[:, end:] -= errors_OI @ factor_II[start:end, end:]
    return QuantizedWeight(
        bits=bits,
        values_OI=values_OI.to(torch.int8),
        scales_OG=torch.stack(scales, dim=1),
        group_size=group_size,
    )


def _inverse_factor(gram_II: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor U of the damped inverse, UT U."""
    gram_II = gram_II.double()
    diagonal = gram_II.diagonal()
    # An input that the text never uses has no say in others' errors, and is rounded to nearest.
    # (The authors' code makes its weights zero. Another text may use it.)
    damping = _DAMPING * diagonal.mean() + (diagonal == 0) * diagonal.mean().clamp(min=1.0)
    lower_II = torch.linalg.cholesky(gram_II + damping.diag())
    factor_II: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower_II), upper=True)
    return factor_II.float()


def _scales(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the scales of groups, which are the last dimension."""
    return round_scales(weights.abs().amax(-1) / _most(bits), bits)


def _integers(weights: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    return (weights / scales).round().clamp(-_most(bits), _most(bits))


def _most(bits: int) -> int:
    """Return the largest integer; the smallest is its negative, so that signs mean the same."""
    return (1 << (bits - 1)) - 1
