"""The tensors of a model's safetensors files by name, read one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.folder import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class StoredWeights:
    """What lies in a folder; a tensor takes memory only while somebody holds it."""

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / _INDEX, missing={}).get("weight_map", {})
        names = sorted({*index.values()}) or [_SINGLE]
        for name in names:
            if not isinstance(name, str) or "/" in name or not (folder / name).is_file():
                raise ModelLoadError(f"it has no {name}")
        self._file_of: dict[str, Any] = {}
        for name in names:
            file: Any = safe_open(folder / name, framework="pt")
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored.

        Raises:
            KeyError: there is none of that name.
        """
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def check(self, wanted: Mapping[str, torch.Tensor]) -> None:
        """Compare names and shapes with those of a model.

        Raises:
            ModelLoadError: a weight is missing, or has another shape.
        """
        missing = sorted(name for name in wanted if name not in self)
        if missing:
            raise ModelLoadError(f"its files lack {len(missing)} weights, for example {missing[0]}")
        for name, tensor in wanted.items():
            shape = self._file_of[name].get_slice(name).get_shape()
            if shape != [*tensor.shape]:
                raise ModelLoadError(
                    f"its weight {name} has shape {shape}, its config.json says {[*tensor.shape]}"
                )
