"""What a model takes on disk, and how many of its weights are zero: read from the files themselves.

Nothing is taken from whoever wrote them, so that a report tells of what is there.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open

from tensorwire_server.engine.folder import architecture_of, read_json, read_sentence_folder
from tensorwire_server.engine.fused.stored import weight_files
from tensorwire_server.engine.quantized import PACKED, SCALE, SHAPE, read_block, unpack

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """One matrix of a block, as it lies in the files."""

    name: str  # of its module
    shape: tuple[int, ...]
    bits: int  # of a weight, scales not counted
    zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / self.parameters

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSize:
    """What the weights of a folder take."""

    file_bytes: int  # of the safetensors files
    parameters: int  # scales of integers not counted
    zeros: int
    matrices: tuple[StoredMatrix, ...]  # of the blocks, in order


def read_size(folder: Path) -> FolderSize:
    """Read all weights of a folder, one at a time.

    Raises:
        ModelLoadError: what config.json says of quantized weights is not what the files hold.
    """
    inner = read_sentence_folder(folder).encoder if (folder / "modules.json").is_file() else folder
    paths = weight_files(inner)
    with ExitStack() as stack:
        file_of: dict[str, Any] = {}
        for path in paths:
            file: Any = stack.enter_context(safe_open(path, framework="pt"))
            file_of |= dict.fromkeys(file.keys(), file)
        matrices: list[StoredMatrix] = []
        others: list[StoredMatrix] = []
        known = _names_of_model(inner)
        for matrix in _read(file_of, read_json(inner / "config.json"), known):
            in_block = len(matrix.shape) > 1 and block_of(matrix.name) is not None
            (matrices if in_block else others).append(matrix)
    return FolderSize(
        file_bytes=sum(path.stat().st_size for path in paths),
        parameters=sum(matrix.parameters for matrix in [*matrices, *others]),
        zeros=sum(matrix.zeros for matrix in [*matrices, *others]),
        matrices=tuple(sorted(matrices, key=_order)),
    )


def _names_of_model(folder: Path) -> frozenset[str]:
    """Return what the weights of the model may be called in its files.

    Old files hold buffers too (masks, positions), which no model of today reads.
    """
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    with torch.device("meta"):
        model = getattr(transformers, architecture_of(read_json(folder / "config.json")))(config)
    names = set(model.state_dict())
    # The inner model's files lack the beginning that the outer one's have.
    beginning = f"{model.base_model_prefix}."
    return frozenset(
        names | {name.removeprefix(beginning) for name in names} | {beginning + n for n in names}
    )


def _read(
    file_of: Mapping[str, Any], config: Mapping[str, Any], known: Container[str]
) -> Iterator[StoredMatrix]:
    form = read_block(config)

    def get_tensor(name: str) -> torch.Tensor:
        tensor: torch.Tensor = file_of[name].get_tensor(name)
        return tensor

    for name in file_of:
        module, _, part = name.rpartition(".")
        if form is not None and part in (SCALE, SHAPE):
            continue
        is_packed = form is not None and part == PACKED
        if (f"{module}.weight" if is_packed else name) not in known:
            continue
        if form is not None and is_packed:
            values, bits = unpack(form, get_tensor, module).values_OI, form.bits
        else:
            values = get_tensor(name)
            bits = 8 * values.itemsize
        yield StoredMatrix(
            name=module if part in ("weight", PACKED) else name,
            shape=tuple(values.shape),
            bits=bits,
            zeros=values.numel() - int(values.count_nonzero()),
        )


def block_of(name: str) -> int | None:
    """Return the number of the block that a module belongs to; None: to none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def kind_of(name: str) -> str:
    """Return what a module is within its block: its name behind the block's number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[at + 1 :])


def _order(matrix: StoredMatrix) -> tuple[int, str]:
    return block_of(matrix.name) or 0, matrix.name
