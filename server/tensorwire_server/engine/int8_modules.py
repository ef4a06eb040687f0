"""Products of stored 8-bit integers within transformers' own modules."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from tensorwire_server.engine.fused.linear import Int8Linear

if TYPE_CHECKING:
    from tensorwire_server.engine.fused.stored import StoredWeights
    from tensorwire_server.engine.quantized import QuantizedWeight

log = logging.getLogger(__name__)

# Rounded activations change what comes out, relative to the largest number, by 0.01 to 0.05. What
# is above this has lost its meaning.
_TOLERANCE = 0.15


class _Int8Module(torch.nn.Module):
    """Stands where a `torch.nn.Linear` stood.

    What encoders multiply is lopsided: some numbers far from the others, on one side, or what GELU
    leaves. So each row is moved until its extremes are equally far from 0, which makes the steps
    that it is rounded to finer, and what was moved is added again: W x = W (x - m) + m W 1.
    """

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._linear = Int8Linear(weight, bias)
        self._sums_O = weight.dequantize().sum(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `torch.nn.Linear`."""
        x_TI = x.flatten(0, -2)
        lowest_T1, highest_T1 = x_TI.aminmax(dim=-1, keepdim=True)
        middle_T1 = (lowest_T1 + highest_T1) / 2
        product_TO = self._linear(x_TI - middle_T1).addcmul_(middle_T1, self._sums_O)
        return product_TO.view(*x.shape[:-1], -1)


def multiply_in_int8(model: Any, stored: StoredWeights) -> None:
    """Have a float32 encoder's stored 8-bit integers multiplied as such, where it bears that.

    An encoder that looks into its linear layers, or makes something else of what they give, goes on
    with the numbers that the integers stand for.

    Args:
        model: with those numbers as its weights.
        stored: where they came from; without 8-bit integers, nothing is changed.
    """
    if not stored.has_int8_layers or model.dtype != torch.float32:
        return
    right = _output(model)
    replaced = {}
    for name, name_in_files in stored.layers_of(model).items():
        weight = stored.quantized(f"{name_in_files}.weight")
        if weight is not None:
            linear = replaced[name] = model.get_submodule(name)
            model.set_submodule(name, _Int8Module(weight, linear.bias))
    try:
        error = (_output(model) - right).abs().max() / right.abs().max().clamp(min=1e-6)
        reason = None if error <= _TOLERANCE else f"they change its output by {error:.1e}"
    except (AttributeError, RuntimeError, TypeError) as failure:
        reason = str(failure)
    if reason is not None:
        log.warning("int8_products_left_out reason=%r", reason)
        for name, linear in replaced.items():
            model.set_submodule(name, linear)


@torch.inference_mode()
def _output(model: Any) -> torch.Tensor:
    """Return (1, T, D) of a few tokens."""
    num_tokens = min(7, int(model.get_input_embeddings().num_embeddings))
    output: torch.Tensor = model(input_ids=torch.arange(num_tokens)[None]).last_hidden_state
    return output
