"""The format of quantized weights: its bytes, its exactness, and what is refused by name."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.quantized import (
    QuantizedWeight,
    config_block,
    pack,
    read_block,
    round_scales,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Callable

# Neither the words nor the groups come out even everywhere.
SHAPES = [(3, 5, None), (7, 64, 32), (5, 37, 8), (4, 33, 16), (1, 1, None), (2, 24, 64)]


def some_weight(bits: int, num_outputs: int, num_inputs: int, size: int | None) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(num_inputs)
    lowest = -(1 << (bits - 1))
    num_groups = 1 if size is None else -(-num_inputs // size)
    values = torch.randint(lowest, -lowest, (num_outputs, num_inputs), generator=generator)
    values[0, 0], values[-1, -1] = lowest, -lowest - 1
    scales = torch.rand(num_outputs, num_groups, generator=generator)
    return QuantizedWeight(
        bits=bits,
        values_OI=values.to(torch.int8),
        scales_OG=round_scales(scales, bits),
        group_size=size,
    )


def read_back(weight: QuantizedWeight, tensors: dict[str, torch.Tensor]) -> QuantizedWeight:
    block = config_block(weight.bits, weight.group_size, ["lm_head"])
    form = read_block({"quantization_config": block})
    assert form is not None
    assert form.ignored == {"lm_head"}
    return unpack(form, tensors.__getitem__, "a.b")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_outputs", "num_inputs", "size"), SHAPES)
def test_what_is_packed_is_unpacked(
    bits: int, num_outputs: int, num_inputs: int, size: int | None
) -> None:
    weight = some_weight(bits, num_outputs, num_inputs, size)
    found = read_back(weight, pack("a.b", weight))
    assert torch.equal(found.values_OI, weight.values_OI)
    assert torch.equal(found.scales_OG, weight.scales_OG)
    scales = [
        [weight.scales_OG[o, i // (size or num_inputs)].item() for i in range(num_inputs)]
        for o in range(num_outputs)
    ]
    right = weight.values_OI.double() * torch.tensor(scales, dtype=torch.float64)
    assert torch.equal(found.dequantize().double(), right)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_larger_than_any_memory_takes_none(bits: int) -> None:
    """The size of groups is a number in a stranger's config.json; nothing bounds it."""
    weight = some_weight(bits, 3, 16, 10**15)
    found = read_back(weight, pack("a.b", weight)).dequantize()
    assert torch.equal(found, weight.values_OI * weight.scales_OG)


def test_the_bytes_are_those_of_the_page() -> None:
    nibbles = torch.tensor([[-8, -7, 0, 7, 1, -1, 2, -2, 3]], dtype=torch.int8)
    weight = QuantizedWeight(
        bits=4, values_OI=nibbles, scales_OG=torch.tensor([[0.5, 0.25]]), group_size=8
    )
    tensors = pack("a.b", weight)
    assert tensors["a.b.weight_packed"].tolist() == [[0x6A79F810, 0x0000000B]]
    assert tensors["a.b.weight_shape"].tolist() == [1, 9]
    assert tensors["a.b.weight_scale"].dtype is torch.float16
    assert [*tensors] == ["a.b.weight_packed", "a.b.weight_scale", "a.b.weight_shape"]
    octets = torch.tensor([[-128, -1, 0, 127, 5]], dtype=torch.int8)
    weight = QuantizedWeight(
        bits=8, values_OI=octets, scales_OG=torch.tensor([[0.5]]), group_size=None
    )
    tensors = pack("a.b", weight)
    assert tensors["a.b.weight_packed"].tolist() == [[0xFF807F00 - (1 << 32), 0x00000085]]
    assert tensors["a.b.weight_scale"].dtype is torch.float32


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("num_outputs", "num_inputs", "size"), SHAPES)
def test_the_words_are_those_of_compressed_tensors(
    bits: int, num_outputs: int, num_inputs: int, size: int | None
) -> None:
    weight = some_weight(bits, num_outputs, num_inputs, size)
    right = pack_to_int32(weight.values_OI, bits)
    assert torch.equal(pack("a.b", weight)["a.b.weight_packed"], right)


@given(st.floats(min_value=0, max_value=8160, width=32))
def test_four_bits_times_their_scale_are_exact_in_float16(scale: float) -> None:
    (rounded,) = round_scales(torch.tensor([scale]), 4)
    values = torch.arange(-8, 8)
    products = values.double() * rounded.double()
    assert torch.equal(products.half().double(), products)
    assert torch.equal((values.half() * rounded.half()).double(), products)
    assert 0 < rounded <= 8160
    assert abs(rounded.item() - scale) <= max(scale * 2**-8, 2**-24)


@given(st.floats(min_value=0, max_value=2.0**99, width=32))
def test_eight_bits_times_their_scale_are_exact_in_float32(scale: float) -> None:
    (rounded,) = round_scales(torch.tensor([scale]), 8)
    values = torch.arange(-128, 128)
    products = values.double() * rounded.double()
    assert torch.equal((values.float() * rounded).double(), products)
    assert rounded > 0
    assert abs(rounded.item() - scale) <= max(scale * 2**-16, 2.0**-100)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), 8161.0])
def test_scales_that_the_format_does_not_hold_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scales of int4 must be 0 to 8160"):
        round_scales(torch.tensor([0.5, scale]), 4)


def test_scales_that_were_not_rounded_are_not_written() -> None:
    values = torch.ones(1, 8, dtype=torch.int8)
    weight = QuantizedWeight(
        bits=4, values_OI=values, scales_OG=torch.tensor([[0.1]]), group_size=None
    )
    with pytest.raises(ValueError, match=r"the scales of a\.b are not rounded"):
        pack("a.b", weight)


def test_scales_of_16_bits_from_elsewhere_are_read() -> None:
    weight = some_weight(4, 3, 16, 8)
    tensors = pack("a.b", weight)
    tensors["a.b.weight_scale"] = tensors["a.b.weight_scale"].bfloat16()
    assert torch.equal(read_back(weight, tensors).scales_OG, weight.scales_OG)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weight_packed": None}, "its files lack a.b.weight_packed"),
        ({"weight_scale": None}, "its files lack a.b.weight_scale"),
        ({"weight_shape": None}, "its files lack a.b.weight_shape"),
        (
            {"weight_packed": torch.zeros(3, 5, dtype=torch.int32)},
            "its a.b.weight_packed is int32 [3, 5], but int32 [3, 2] is expected",
        ),
        (
            {"weight_packed": torch.zeros(3, 2)},
            "its a.b.weight_packed is float32 [3, 2], but int32 [3, 2] is expected",
        ),
        (
            {"weight_scale": torch.ones(3, 1)},
            "its a.b.weight_scale is float32 [3, 1], but float16 or bfloat16 or float32 [3, 2]",
        ),
        ({"weight_scale": torch.tensor([[1.0, float("nan")]] * 3)}, "negative or not finite"),
        ({"weight_scale": torch.tensor([[1.0, -1.0]] * 3)}, "negative or not finite"),
        ({"weight_shape": torch.tensor([3, 16, 1])}, "is not two positive int64 numbers"),
        ({"weight_shape": torch.tensor([3.0, 16.0])}, "is not two positive int64 numbers"),
        ({"weight_shape": torch.tensor([-3, 16])}, "is not two positive int64 numbers"),
        ({"weight_shape": torch.tensor([1 << 40, 1 << 40])}, "[1099511627776, 137438953472] is"),
    ],
)
def test_tensors_that_are_not_what_they_should_be_are_refused(
    changes: dict[str, torch.Tensor | None], sentence: str
) -> None:
    weight = some_weight(4, 3, 16, 8)
    tensors: dict[str, Any] = pack("a.b", weight) | {f"a.b.{k}": v for k, v in changes.items()}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(ModelLoadError) as caught:
        read_back(weight, present)
    assert sentence in str(caught.value)


def test_compressed_tensors_understands_the_block() -> None:
    block = config_block(4, 32, ["lm_head"])
    theirs = QuantizationConfig.model_validate(block)
    (scheme,) = theirs.config_groups.values()
    assert not isinstance(scheme, list)
    assert scheme.weights is not None
    assert (scheme.weights.num_bits, scheme.weights.group_size) == (4, 32)
    # And what it writes of the same is read here.
    assert read_block({"quantization_config": theirs.model_dump(mode="json")}) == read_block(
        {"quantization_config": block}
    )


def test_a_config_without_a_block_says_nothing_of_quantization() -> None:
    assert read_block({"model_type": "llama"}) is None
    assert read_block({"quantization_config": None}) is None


def in_block(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda block: block.update(changes)


def in_group(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda block: block["config_groups"]["group_0"].update(changes)


def in_weights(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda block: block["config_groups"]["group_0"]["weights"].update(changes)


EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (in_block(quant_method="gptq"), "it is quantized by gptq; compressed-tensors with"),
        (in_block(quant_method="awq"), "it is quantized by awq;"),
        (in_block(quant_method="bitsandbytes"), "it is quantized by bitsandbytes;"),
        (in_block(quant_method=None), "it is quantized by None;"),
        (in_block(format="marlin-24"), ".format is 'marlin-24'; 'pack-quantized' is supported"),
        (in_block(quantization_status="frozen"), ".quantization_status is 'frozen'; 'compressed'"),
        (in_block(kv_cache_scheme=EIGHT_BITS), ".kv_cache_scheme is {'num_bits': 8"),
        (in_block(sparsity_config={"format": "dense"}), ".sparsity_config is {"),
        (in_block(transform_config={"x": 1}), ".transform_config is {'x': 1}, which is not"),
        (in_block(anything_new=0), ".anything_new is 0, which is not supported"),
        (in_block(ignore="lm_head"), ".ignore is not a list of names"),
        (in_block(ignore=["re:.*head"]), ".ignore holds the pattern 're:.*head'; only names"),
        (in_block(config_groups={}), "must hold exactly one group"),
        (in_block(config_groups={"a": {}, "b": {}}), "must hold exactly one group"),
        (in_block(config_groups={"W4A16": ["Linear"]}), "says nothing of weights"),
        (in_group(weights=None), "says nothing of weights"),
        (in_group(targets=["Linear", "Embedding"]), ".targets is ['Linear', 'Embedding']; ['Lin"),
        (in_group(input_activations=EIGHT_BITS), ".input_activations is {'num_bits': 8"),
        (in_group(output_activations=EIGHT_BITS), ".output_activations is {'num_bits': 8"),
        (in_weights(symmetric=False), ".weights.symmetric is False; True is supported"),
        (in_weights(symmetric=1), ".weights.symmetric is 1; True is supported"),
        (in_weights(num_bits=3), ".weights.num_bits is 3; 4 or 8 is supported"),
        (in_weights(num_bits=True), ".weights.num_bits is True; 4 or 8 is supported"),
        (in_weights(type="float"), ".weights.type is 'float'; 'int' is supported"),
        (in_weights(dynamic=True), ".weights.dynamic is True; False is supported"),
        (in_weights(strategy="block"), ".weights.strategy is 'block'; 'channel' or 'group'"),
        (in_weights(actorder="group"), ".weights.actorder is 'group'"),
        (in_weights(block_structure=[2, 4]), ".weights.block_structure is [2, 4], which is not"),
        (in_weights(group_size=0), "group_size 0, not a positive number"),
        (in_weights(group_size=None), "group_size None, not a positive number"),
        (in_weights(group_size=True), "group_size True, not a positive number"),
        (in_weights(strategy="channel"), "group_size 32 without groups"),
    ],
)
def test_a_block_that_says_something_else_is_refused_by_name(
    change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    block = copy.deepcopy(config_block(4, 32, ["lm_head"]))
    change(block)
    with pytest.raises(ModelLoadError) as caught:
        read_block({"quantization_config": block})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_block_that_is_no_object_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="quantization_config is not an object"):
        read_block({"quantization_config": ["gptq"]})
