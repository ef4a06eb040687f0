"""The tensors of a model's safetensors files by name, read one at a time.

A weight that is stored as integers has the name that it would have as numbers, and is made into
these when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.folder import read_json
from tensorwire_server.engine.quantized import (
    PACKED,
    PARTS,
    SCALE,
    QuantizationFormat,
    QuantizedWeight,
    packed_shape,
    scale_shape,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def linear_layers(model: torch.nn.Module) -> set[str]:
    """Return the names of a model's linear layers."""
    modules = model.named_modules()
    return {name for name, module in modules if isinstance(module, torch.nn.Linear)}


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a folder's weights are read from; others may lie beside them.

    Raises:
        ModelLoadError: one is missing.
    """
    index = read_json(folder / _INDEX, missing={}).get("weight_map", {})
    names = sorted({*index.values()}) or [_SINGLE]
    for name in names:
        if not isinstance(name, str) or "/" in name or not (folder / name).is_file():
            raise ModelLoadError(f"it has no {name}")
    return [folder / name for name in names]


class StoredWeights:
    """What lies in a folder; a tensor takes memory only while somebody holds it."""

    def __init__(self, folder: Path, quantization: QuantizationFormat | None = None) -> None:
        self._file_of: dict[str, Any] = {}
        for path in weight_files(folder):
            file: Any = safe_open(path, framework="pt")
            self._file_of |= dict.fromkeys(file.keys(), file)
        self._quantization = quantization
        self._layers: frozenset[str] = frozenset()  # whose weights are stored as integers
        if quantization is not None:
            packed = [name for name in self._file_of if name.endswith(f".{PACKED}")]
            self._layers = frozenset(name.removesuffix(f".{PACKED}") for name in packed)
            if not self._layers:
                raise ModelLoadError(
                    "its config.json says that it is quantized, but its files hold no"
                    f" {PACKED} of any layer"
                )

    @property
    def has_int8_layers(self) -> bool:
        """Say if weights are stored as 8-bit integers with one scale for each output."""
        said = self._quantization
        return said is not None and said.bits == 8 and said.group_size is None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of or self._layer_of(name) is not None

    def __iter__(self) -> Iterator[str]:
        """Go through the names of all tensors; the parts of a quantized weight are one."""
        parts = {f"{layer}.{part}" for layer in self._layers for part in PARTS}
        yield from (name for name in self._file_of if name not in parts)
        yield from (f"{layer}.weight" for layer in self._layers)

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored, or float32 where that is in integers.

        Raises:
            KeyError: there is none of that name.
            ModelLoadError: what it consists of is not what it should be.
        """
        quantized = self.quantized(name)
        return self._stored(name) if quantized is None else quantized.dequantize()

    def quantized(self, name: str) -> QuantizedWeight | None:
        """Return a weight's integers; None: it is stored as numbers.

        Raises:
            ModelLoadError: what it consists of is not what it should be.
        """
        layer = self._layer_of(name)
        if layer is None or self._quantization is None:
            return None
        return unpack(self._quantization, self._stored, layer)

    def check(self, wanted: Mapping[str, torch.Tensor], linear: Collection[str]) -> None:
        """Compare names and shapes with those of a model.

        Args:
            wanted: what the model needs, by name.
            linear: the names of its linear layers.

        Raises:
            ModelLoadError: a weight is missing, or has another shape.
        """
        missing = sorted(name for name in wanted if name not in self)
        if missing:
            raise ModelLoadError(f"its files lack {len(missing)} weights, for example {missing[0]}")
        self.check_layers({name for name in linear if f"{name}.weight" in wanted})
        for name, tensor in wanted.items():
            self._check_shape(name, [*tensor.shape])

    def check_layers(self, linear: Collection[str]) -> None:
        """See that exactly those layers are stored as integers of which config.json says so.

        Args:
            linear: the names of the model's linear layers.

        Raises:
            ModelLoadError: it is not so.
        """
        if self._quantization is None:
            return
        said = {name for name in linear if name not in self._quantization.ignored}
        for name in sorted(self._layers - said):
            why = "its config.json says otherwise" if name in linear else "it is no linear layer"
            raise ModelLoadError(f"its {name} is stored as integers, but {why}")
        for name in sorted(said - self._layers):
            raise ModelLoadError(
                f"its config.json says that {name} is stored as integers, but its files lack"
                f" {name}.{PACKED}"
            )

    def layers_of(self, model: Any) -> dict[str, str]:
        """Return by module name under which name the files hold a linear layer of the model.

        A model within a larger one, or the other way round, has another beginning there. A layer
        that has no weight of its own (a tied head) is left out.
        """
        beginning = f"{model.base_model_prefix}."
        found = {}
        for name in linear_layers(model):
            for here in (name, beginning + name, name.removeprefix(beginning)):
                if f"{here}.weight" in self:
                    found[name] = here
                    break
        return found

    def _check_shape(self, name: str, wanted: list[int]) -> None:
        layer = self._layer_of(name)
        shapes = {name: wanted}
        if layer is not None and self._quantization is not None:
            shapes = {
                f"{layer}.{PACKED}": packed_shape(self._quantization, *wanted),
                f"{layer}.{SCALE}": scale_shape(self._quantization, *wanted),
            }
        for part, expected in shapes.items():
            if part not in self._file_of:
                raise ModelLoadError(f"its files lack {part}")
            shape = self._file_of[part].get_slice(part).get_shape()
            if shape != expected:
                raise ModelLoadError(
                    f"its weight {part} has shape {shape}, its config.json says {expected}"
                )

    def _layer_of(self, name: str) -> str | None:
        """Return the layer whose weight this is, if that is stored as integers."""
        layer = name.removesuffix(".weight")
        return layer if layer != name and layer in self._layers else None

    def _stored(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor
