"""Weights stored as integers of 8 or 4 bits: the format of the files, and the way back to numbers.

The layout is that of compressed-tensors (`pack-quantized`), symmetric and for weights only, so that
other programs read these folders too; `docs/quantized-format.md` describes it byte by byte. What it
could say beyond that (zero points, activations in few bits, other layouts) is refused by name:
ignoring any of it would compute something else than what was meant.

Scales are rounded so that an integer times its scale loses nothing. What is computed from a stored
weight is then the same number in every program that multiplies the two.

Dimensions: O outputs, I inputs, G groups of inputs that share a scale, P packed words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tensorwire_server.engine.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_METHOD, _LAYOUT = "compressed-tensors", "pack-quantized"
PARTS = PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WORD_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScaleRule:
    """Which scales lose nothing when they are multiplied by an integer, and how they are stored."""

    dtype: torch.dtype
    significant_bits: int  # with those of the integer no more than the dtype of the product has
    smallest: float
    largest: float


_SCALE_RULES = {
    # Products are exact in float16: 8 + 3 bits, multiples of its smallest number, and finite.
    4: _ScaleRule(dtype=torch.float16, significant_bits=8, smallest=2.0**-24, largest=255 * 2.0**5),
    # Products are exact in float32: 16 + 7 bits.
    8: _ScaleRule(dtype=torch.float32, significant_bits=16, smallest=2.0**-100, largest=2.0**100),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A matrix as integers and scales; symmetric, no zero points."""

    bits: int  # 4 or 8
    values_OI: torch.Tensor  # int8; -8 .. 7 or -128 .. 127
    scales_OG: torch.Tensor  # float32
    group_size: int | None  # inputs that share a scale, the last group may be short; None: all

    def dequantize(self) -> torch.Tensor:
        """Return (O, I) float32; exact where the scales come from `round_scales`."""
        if self.group_size is None:
            return self.values_OI * self.scales_OG
        num_inputs = self.values_OI.shape[1]
        # Whoever wrote config.json chose the size; it may be larger than any memory.
        size = min(self.group_size, num_inputs)
        scales_OI = self.scales_OG.repeat_interleave(size, dim=1)[:, :num_inputs]
        return self.values_OI * scales_OI

    def take(self, outputs: torch.Tensor) -> QuantizedWeight:
        """Return the weight of these outputs, in this order."""
        return replace(self, values_OI=self.values_OI[outputs], scales_OG=self.scales_OG[outputs])


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return one weight of all outputs; bits and groups must be the same."""
    return replace(
        weights[0],
        values_OI=torch.cat([weight.values_OI for weight in weights]),
        scales_OG=torch.cat([weight.scales_OG for weight in weights]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationFormat:
    """What config.json says of a folder's quantized weights."""

    bits: int  # 4 or 8
    group_size: int | None
    ignored: frozenset[str]  # linear layers that are stored as they were

    def __str__(self) -> str:
        return f"int{self.bits}"


def name_of(form: QuantizationFormat | None) -> str:
    """Return `none`, `int8` or `int4`."""
    return "none" if form is None else str(form)


def round_scales(scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the nearest scales that the format holds exactly, float32 and never 0.

    Args:
        scales: any shape, not negative.
        bits: of the integers, 4 or 8.

    Raises:
        ValueError: a scale is not finite, negative, or larger than the format holds.
    """
    rule = _SCALE_RULES[bits]
    scales = scales.double()
    if not bool(((scales >= 0) & (scales <= rule.largest)).all()):  # so that NaN is refused too
        raise ValueError(f"scales of int{bits} must be 0 to {rule.largest:g}")
    scales = scales.clamp(min=rule.smallest)
    _, exponents = torch.frexp(scales)
    steps = torch.ldexp(torch.ones_like(scales), exponents - rule.significant_bits)
    steps = steps.clamp(min=rule.smallest)
    return (scales / steps).round().mul(steps).clamp(max=rule.largest).float()


def pack(name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Return the tensors of a linear layer for a safetensors file, by their names in it.

    Args:
        name: of the layer, without `.weight`.
        weight: its scales must be such as `round_scales` returns.

    Raises:
        ValueError: the format does not hold the scales exactly.
    """
    scales = weight.scales_OG.to(_SCALE_RULES[weight.bits].dtype)
    if not torch.equal(scales.float(), weight.scales_OG):
        raise ValueError(f"the scales of {name} are not rounded; see round_scales")
    return {
        f"{name}.{PACKED}": _packed(weight.values_OI, weight.bits),
        f"{name}.{SCALE}": scales.contiguous(),
        f"{name}.{SHAPE}": torch.tensor(weight.values_OI.shape, dtype=torch.int64),
    }


def _packed(values_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Return (O, P) int32; the first of the integers in a word has its lowest bits."""
    num_outputs, num_inputs = values_OI.shape
    unsigned = (values_OI.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    unsigned = F.pad(unsigned, (0, -num_inputs % (_WORD_BITS // bits)))
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32).view(num_outputs, -1)


def unpack(
    form: QuantizationFormat, get_tensor: Callable[[str], torch.Tensor], name: str
) -> QuantizedWeight:
    """Return a linear layer's weight from a file's tensors.

    Args:
        form: what config.json says.
        get_tensor: raises KeyError for a name that the file does not hold.
        name: of the layer, without `.weight`.

    Raises:
        ModelLoadError: a tensor is missing, or not what the format wants it to be.
    """

    def tensor(part: str) -> torch.Tensor:
        try:
            return get_tensor(f"{name}.{part}")
        except KeyError:
            raise ModelLoadError(f"its files lack {name}.{part}") from None

    packed, scales, shape = tensor(PACKED), tensor(SCALE), tensor(SHAPE)
    if shape.dtype != torch.int64 or shape.shape != (2,) or int(shape.min()) < 1:
        raise ModelLoadError(f"its {name}.{SHAPE} is not two positive int64 numbers")
    # Nothing is made of the stated shape before the tensors agree with it.
    num_outputs, num_inputs = shape.tolist()
    _require(packed, f"{name}.{PACKED}", packed_shape(form, num_outputs, num_inputs), torch.int32)
    _require(scales, f"{name}.{SCALE}", scale_shape(form, num_outputs, num_inputs), *_SCALE_DTYPES)
    scales = scales.float()
    if not bool(((scales >= 0) & scales.isfinite()).all()):
        raise ModelLoadError(f"its {name}.{SCALE} holds a scale that is negative or not finite")
    return QuantizedWeight(
        bits=form.bits,
        values_OI=_unpacked(packed, form.bits, num_inputs),
        scales_OG=scales,
        group_size=form.group_size,
    )


def packed_shape(form: QuantizationFormat, num_outputs: int, num_inputs: int) -> list[int]:
    """Return the shape of a layer's packed integers."""
    return [num_outputs, -(-num_inputs * form.bits // _WORD_BITS)]


def scale_shape(form: QuantizationFormat, num_outputs: int, num_inputs: int) -> list[int]:
    """Return the shape of a layer's scales."""
    num_groups = 1 if form.group_size is None else -(-num_inputs // form.group_size)
    return [num_outputs, num_groups]


def _require(tensor: torch.Tensor, name: str, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes or [*tensor.shape] != [*shape]:
        said = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ModelLoadError(
            f"its {name} is {str(tensor.dtype).removeprefix('torch.')} {[*tensor.shape]}, but"
            f" {said} {[*shape]} is expected"
        )


def _unpacked(packed_OP: torch.Tensor, bits: int, num_inputs: int) -> torch.Tensor:
    """Return (O, I) int8."""
    unsigned = packed_OP.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], dim=-1).flatten(1)
    # Modulo 256 this is the subtraction, and stays in 8 bits.
    return (unsigned[:, :num_inputs] - (1 << (bits - 1))).view(torch.int8).contiguous()


def config_block(bits: int, group_size: int | None, ignored: Sequence[str]) -> dict[str, Any]:
    """Return `quantization_config` for config.json.

    Args:
        bits: of the integers, 4 or 8.
        group_size: inputs that share a scale; None: all of an output.
        ignored: the names of linear layers that are stored as they were.
    """
    return {
        "quant_method": _METHOD,
        "format": _LAYOUT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if group_size is None else "group",
                    "group_size": group_size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": sorted(ignored),
    }


def read_block(config: Mapping[str, Any]) -> QuantizationFormat | None:
    """Return what a config.json says of quantization; None: nothing.

    Raises:
        ModelLoadError: it says something that this format does not hold.
    """
    block = config.get("quantization_config")
    if block is None:
        return None
    if not isinstance(block, dict):
        raise ModelLoadError("its quantization_config is not an object")
    method = block.get("quant_method")
    if method != _METHOD:
        raise ModelLoadError(
            f"it is quantized by {method}; {_METHOD} with integers of 4 or 8 bits is what is"
            " supported (docs/quantized-format.md)"
        )
    _check_keys(
        block, "quantization_config", _BLOCK, meaningless={"global_compression_ratio", "version"}
    )
    ignored = block.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise ModelLoadError("its quantization_config.ignore is not a list of names")
    patterns = [name for name in ignored if name.startswith("re:")]
    if patterns:
        raise ModelLoadError(
            f"its quantization_config.ignore holds the pattern {patterns[0]!r}; only names of"
            " layers are supported"
        )
    bits, group_size = _read_group(block.get("config_groups"))
    return QuantizationFormat(bits=bits, group_size=group_size, ignored=frozenset(ignored))


# What must be said where something is said, by key; `...`: read by itself.
_BLOCK: dict[str, Any] = {
    "quant_method": (_METHOD,),
    "format": (_LAYOUT,),
    "quantization_status": ("compressed",),
    "config_groups": ...,
    "ignore": ...,
}
_GROUP: dict[str, Any] = {"targets": (["Linear"],), "weights": ..., "format": (None, _LAYOUT)}
_WEIGHTS: dict[str, Any] = {
    "num_bits": (4, 8),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("channel", "group"),
    "group_size": ...,
    "dynamic": (False,),
    "actorder": (None, False, "weight", "static"),  # an order of the work, not of what came of it
}


def _read_group(groups: object) -> tuple[int, int | None]:
    """Return bits and group size."""
    where = "quantization_config.config_groups"
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ModelLoadError(f"its {where} must hold exactly one group")
    (group,) = groups.values()
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ModelLoadError(f"its {where} says nothing of weights")
    weights = group["weights"]
    _check_keys(group, where, _GROUP)
    # How the scales were found says nothing about the result.
    found_by = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
    _check_keys(weights, f"{where}.weights", _WEIGHTS, meaningless=found_by)
    size = weights.get("group_size")
    if weights["strategy"] == "channel":
        if size not in (None, -1):
            raise ModelLoadError(f"its {where}.weights has group_size {size!r} without groups")
        return weights["num_bits"], None
    if type(size) is not int or size < 1:
        raise ModelLoadError(f"its {where}.weights has group_size {size!r}, not a positive number")
    return weights["num_bits"], size


def _check_keys(
    found: Mapping[str, Any],
    where: str,
    allowed: Mapping[str, Any],
    *,
    meaningless: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Refuse values that are not among the allowed, and keys that say something unknown."""
    for key, value in found.items():
        if key not in allowed and key not in meaningless and value not in (None, [], {}):
            raise ModelLoadError(f"its {where}.{key} is {value!r}, which is not supported")
    for key, values in allowed.items():
        if values is ...:
            continue
        value = found.get(key)
        # By type as well: 1 is no True.
        if not any(type(value) is type(one) and value == one for one in values):
            said = " or ".join(repr(one) for one in values if one is not None)
            raise ModelLoadError(f"its {where}.{key} is {value!r}; {said} is supported")
