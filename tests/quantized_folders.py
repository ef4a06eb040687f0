"""Writes quantized folders, rounding to nearest: what is to be read back and served."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tensorwire_server.engine.quantized import (
    QuantizedWeight,
    config_block,
    pack,
    round_scales,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path


def nearest(weight_OI: torch.Tensor, bits: int, group_size: int | None) -> QuantizedWeight:
    """Round a matrix to the nearest integers, symmetric."""
    num_outputs, num_inputs = weight_OI.shape
    size = group_size or num_inputs
    groups_OGS = F.pad(weight_OI, (0, -num_inputs % size)).view(num_outputs, -1, size)
    largest = (1 << (bits - 1)) - 1
    scales_OG = round_scales(groups_OGS.abs().amax(-1) / largest, bits)
    values = (groups_OGS / scales_OG[..., None]).round().clamp(-largest, largest)
    return QuantizedWeight(
        bits=bits,
        values_OI=values.flatten(1)[:, :num_inputs].to(torch.int8),
        scales_OG=scales_OG,
        group_size=group_size,
    )


def quantize_folder(
    source: Path,
    folder: Path,
    *,
    bits: int,
    group_size: int | None = None,
    auto_class: Any = transformers.AutoModelForCausalLM,
    ignored: Collection[str] = ("lm_head",),
    round_weight: Callable[[torch.Tensor, int, int | None], QuantizedWeight] = nearest,
) -> dict[str, torch.Tensor]:
    """Write a folder's model with all linear layers quantized but the ignored.

    Returns:
        By name of the layer, the (O, I) float32 weights that its integers stand for.
    """
    shutil.copytree(source, folder, dirs_exist_ok=True)
    model = auto_class.from_pretrained(source, dtype=torch.float32)
    weights: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in ignored:
            weight = round_weight(module.weight.data, bits, group_size)
            meant[name] = weight.dequantize()
            weights |= pack(name, weight)
    kept = load_file(folder / "model.safetensors")
    weights |= {name: t for name, t in kept.items() if name.removesuffix(".weight") not in meant}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(
        folder / "config.json", quantization_config=config_block(bits, group_size, [*ignored])
    )
    return meant


def dequantized_folder(source: Path, folder: Path, meant: dict[str, torch.Tensor]) -> Path:
    """Write a folder's model with these weights, float32, as any other."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    weights = load_file(source / "model.safetensors")
    weights |= {f"{name}.weight": weight.contiguous() for name, weight in meant.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
