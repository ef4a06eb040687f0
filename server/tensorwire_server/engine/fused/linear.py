"""Products with a weight matrix, in the form that is fastest where they run.

| form | where | how |
|---|---|---|
| `PlainLinear` | CUDA, and a CPU without oneDNN | the matrix as it is |
| `PackedLinear` | CPU, float32 | oneDNN's blocks, made once: 1.1-2x MKL's speed from 2 rows on |
| `HalvedLinear` | x86, float32, where 16 bits hold the weights | FBGEMM; half the memory to read |
| `Int8Linear` | x86, 8-bit | FBGEMM; weights by output channel, activations by row |

A decode step reads every weight once for a few rows, so its time is that of reading. Most models
are published in 16 bits: `HalvedLinear` keeps them so and multiplies in float32. Microseconds on
one core of AVX512, 9728 x 896 (MKL, oneDNN, halved): 1 row 1285, 1622, 726; 8 rows 4486, 2951,
1590; 32 rows 7490, 6084, 6556; 128 rows 18628, 15751, 18776.

The scale of `Int8Linear`'s activations is each row's own. FBGEMM's own dynamic quantization takes
one scale for the whole batch: what a sequence is told would depend on its company, a prompt's
outliers would blur its neighbours, and one row of NaN would be everybody's.

Dimensions: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from tensorwire_server.engine.device import has_one_dnn
from tensorwire_server.engine.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tensorwire_server.engine.quantized import QuantizedWeight

# oneDNN chooses its blocks for about so many rows. Those for 8 lose nothing from 1 to 128.
_PACKED_FOR_ROWS = 8
_TINY = 1e-30  # a row of zeros has no largest value to divide by


class Linear(Protocol):
    """Multiplies rows by a matrix, which it owns in a form of its own."""

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Return (T, O), fresh memory; T may not be 0."""

    def add_to(self, residual_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        """Return the residual plus the product, fresh memory."""


class PlainLinear:
    """The matrix as it is; see `Linear`."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self._weight, self._bias = weight_OI, bias_O

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TI, self._weight, self._bias)

    def add_to(self, residual_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TI, self._weight, self._bias).add_(residual_TO)


class PackedLinear:
    """float32 in oneDNN's own layout; see `Linear`."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        pack: Any = torch.ops.mkldnn._reorder_linear_weight.default
        self._weight = pack(weight_OI.contiguous(), _PACKED_FOR_ROWS)
        self._bias = bias_O
        # Looked up once: torch.ops costs a microsecond at each dot.
        self._multiply: Any = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_and: Any = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._multiply(x_TI, self._weight, self._bias, "none", [], "")
        return product

    def add_to(self, residual_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self._multiply_and(x_TI, residual_TO, self._weight, self._bias, "add")
        return total


class HalvedLinear:
    """Weights in float16, sums in float32; see `Linear`.

    Raises:
        ValueError: float16 does not hold these weights; see `fits_in_half`.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        if not fits_in_half(weight_OI):
            raise ValueError("float16 does not hold these weights")
        with _fbgemm():
            pack: Any = torch.ops.quantized.linear_prepack_fp16.default
            self._packed = pack(weight_OI.contiguous(), bias_O)
        self._multiply: Any = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._multiply(x_TI, self._packed)
        return product

    def add_to(self, residual_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self._multiply(x_TI, self._packed).add_(residual_TO)
        return total


def fits_in_half(weight: torch.Tensor) -> bool:
    """Return whether float16 is these weights: exactly, or for those below 2 ** -17 to 2 ** -25.

    That is so for what is stored in float16, and in bfloat16 up to 65504.
    """
    error = (weight.half().float() - weight).abs_().amax()
    return bool(error <= 2.0**-25)


class Int8Linear:
    """8-bit weights, one scale for each output, and 8-bit activations, one for each row.

    Args:
        weight_OI: float32, rounded here; or integers, which stay what they are.
        bias_O: float32 or None.
    """

    def __init__(
        self, weight_OI: torch.Tensor | QuantizedWeight, bias_O: torch.Tensor | None
    ) -> None:
        with _fbgemm():
            weight = _per_output(weight_OI)
            self._packed: Any = torch.ops.quantized.linear_prepack(weight, None)
        self._bias = bias_O
        # Without VNNI two products are added in 16 bits, where 8 by 8 bits would saturate.
        self._largest = 127 if torch.cpu._is_vnni_supported() else 63
        multiply: Any = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self._multiply = multiply

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        product, peak = self._product(x_TI)
        if self._bias is None:
            return product.mul_(peak)
        return torch.addcmul(self._bias, product, peak)

    def add_to(self, residual_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        product, peak = self._product(x_TI)
        total = torch.addcmul(residual_TO, product, peak)
        return total if self._bias is None else total.add_(self._bias)

    def _product(self, x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what is still to be multiplied by the second, the largest value of each row."""
        peak = x_TI.abs().amax(-1, keepdim=True).clamp_(min=_TINY)
        # Rows of -1 .. 1 have one scale in common.
        product = self._multiply(x_TI / peak, 1 / self._largest, self._largest + 1, self._packed)
        return product, peak


def _per_output(weight_OI: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    """Return torch's own form of integers with a scale for each output."""
    if isinstance(weight_OI, torch.Tensor):
        scales = (weight_OI.abs().amax(1).clamp(min=_TINY) / 127).double()
        zeros = torch.zeros(len(scales), dtype=torch.long)
        return torch.quantize_per_channel(weight_OI, scales, zeros, 0, torch.qint8)
    scales = weight_OI.scales_OG.squeeze(1).double()
    zeros = torch.zeros(len(scales), dtype=torch.long)
    # A scale of 0 is fine in a file, where it means zeros, but not here.
    scales.clamp_(min=_TINY)
    return torch._make_per_channel_quantized_tensor(weight_OI.values_OI, scales, zeros, 0)


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Have weights packed by FBGEMM inside."""
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao has moved; the operators stay
        torch.backends.quantized.engine = "fbgemm"
        try:
            yield
        finally:
            torch.backends.quantized.engine = engine


def has_int8_products(device: torch.device) -> bool:
    """Return whether `Int8Linear` runs here."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


def linear_form(
    device: torch.device, dtype: torch.dtype, *, int8: bool
) -> Callable[[torch.Tensor, torch.Tensor | None], Linear]:
    """Return what makes a matrix (O, I) and a bias (O,) or None into a `Linear`.

    Raises:
        ModelLoadError: 8-bit products are not to be had here.
    """
    has_fbgemm = has_int8_products(device)
    if int8:
        if not has_fbgemm:
            raise ModelLoadError("quantization int8 runs on x86 CPUs only; leave --quantize away")
        return Int8Linear
    if not has_one_dnn(device, dtype):
        return PlainLinear
    return _float_linear if has_fbgemm else PackedLinear


def _float_linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Linear:
    try:
        return HalvedLinear(weight_OI, bias_O)
    except ValueError:
        return PackedLinear(weight_OI, bias_O)
