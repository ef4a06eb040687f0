"""What lies in a folder's files, against a few independent lines."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import models_zoo
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tensorwire_server.compress.sizes import block_of, kind_of, read_size
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.quantized import QuantizedWeight, config_block, pack

from .demo_text import DEMO
from .pairs import MINILM

if TYPE_CHECKING:
    from pathlib import Path


def write_config(folder: Path, quantization: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=4, architectures=["LlamaForCausalLM"])
    said = config.to_dict() | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(said))


def test_what_lies_beside_the_weights_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert read_size(folder) == read_size(DEMO)


def test_masks_of_old_files_are_no_parameters(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    models_zoo.write_model(folder, "gpt2")
    before = read_size(folder)
    tensors = load_file(folder / "model.safetensors")
    # Files of the first transformers lack the outer model's beginning, and hold masks.
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{block}.attn.bias": torch.ones(1, 1, 8, 8) for block in range(3)}
    save_file(old | masks, folder / "model.safetensors", metadata={"format": "pt"})
    size = read_size(folder)
    assert (size.parameters, size.zeros) == (before.parameters, before.zeros)
    assert len(size.matrices) == len(before.matrices)


def test_a_folder_is_counted_as_its_files_are(pruned_demo: Path) -> None:
    size = read_size(pruned_demo)
    tensors = load_file(pruned_demo / "model.safetensors")
    assert size.file_bytes == (pruned_demo / "model.safetensors").stat().st_size
    assert size.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert size.zeros == sum(int((tensor == 0).sum()) for tensor in tensors.values())
    found = {matrix.name: matrix for matrix in size.matrices}
    projections = {name.removesuffix(".weight") for name in tensors if "_proj" in name}
    assert found.keys() == projections
    for name, matrix in found.items():
        weight = tensors[f"{name}.weight"]
        assert (matrix.shape, matrix.bits) == (tuple(weight.shape), 8 * weight.element_size())
        # Half of each was made zero; numbers of few bits may be as small as the median.
        assert (
            matrix.sparsity == float((weight == 0).double().mean()) == pytest.approx(0.5, abs=0.01)
        )


def test_the_blocks_are_in_order() -> None:
    blocks = [block_of(matrix.name) or 0 for matrix in read_size(DEMO).matrices]
    assert blocks == sorted(blocks)
    assert len(set(blocks)) > 1


def test_an_encoder_is_found_inside_its_folder() -> None:
    size = read_size(MINILM)
    assert size.parameters == pytest.approx(22.7e6, rel=0.01)
    assert len(size.matrices) == 6 * 6


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 8)])
def test_integers_are_counted_not_their_words(
    tmp_path: Path, bits: int, group_size: int | None
) -> None:
    values = torch.tensor([[0, 1, -1, 0, 2, 3, 0, 0, 5, 0, 7, -7], [1] * 12], dtype=torch.int8)
    groups = 1 if group_size is None else 2
    weight = QuantizedWeight(
        bits=bits, values_OI=values, scales_OG=torch.ones(2, groups), group_size=group_size
    )
    tensors = pack("model.layers.3.mlp.up_proj", weight) | {"model.norm.weight": torch.zeros(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    write_config(tmp_path, config_block(bits, group_size, ["lm_head"]))
    size = read_size(tmp_path)
    (matrix,) = size.matrices
    assert (matrix.name, matrix.shape, matrix.bits) == ("model.layers.3.mlp.up_proj", (2, 12), bits)
    assert matrix.zeros == 5
    assert (size.parameters, size.zeros) == (24 + 5, 5 + 5)


def test_files_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    weight = QuantizedWeight(
        bits=4, values_OI=torch.ones(2, 8, dtype=torch.int8), scales_OG=torch.ones(2, 1),
        group_size=8,
    )  # fmt: skip
    tensors = pack("model.layers.0.mlp.up_proj", weight)
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    write_config(tmp_path, config_block(4, 8, []))
    with pytest.raises(ModelLoadError, match=r"lack model\.layers\.0.mlp.up_proj.weight_scale"):
        read_size(tmp_path)


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.12.self_attn.q_proj", 12, "self_attn.q_proj"),
        ("transformer.h.0.attn.c_attn", 0, "attn.c_attn"),
        ("encoder.layer.3.attention.self.query", 3, "attention.self.query"),
        ("model.layers.1.mlp.experts.7.w1", 1, "mlp.experts.7.w1"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_names_tell_block_and_kind(name: str, block: int | None, kind: str) -> None:
    assert (block_of(name), kind_of(name)) == (block, kind)
