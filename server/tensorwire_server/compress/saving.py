"""The folder that comes out: made beside its place, moved there whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tensorwire_server.engine.quantized import config_block, pack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tensorwire_server.compress.parent import Parent
    from tensorwire_server.compress.recipe import Quantization
    from tensorwire_server.engine.quantized import QuantizedWeight

# What the report and its recipe lie in; no part of what a model answers (`models/manifest.py`).
REPORT_FOLDER = "compression"
_PARTIAL = ".partial"
# Weights in any form, which the new ones replace, and the card, which is the parent's.
_LEFT_OUT = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".onnx",
    ".md",
)


class OutputError(Exception):
    """The result cannot be written; the message is one sentence for a person."""


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `out` if the block ends well, else it goes.

    Raises:
        OutputError: `out` is there already, or the disk does not take what is written.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(out)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=_PARTIAL, dir=out.parent))
        lock = _locked(partial)
    except OSError as error:
        raise _explained(error, out) from error
    assert lock is not None  # the name is new
    try:
        yield partial
        _write_through(partial)
        partial.chmod(0o755)
        refuse_existing(out)
        partial.rename(out)
    except OSError as error:
        raise _explained(error, out) from error
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Make sure that nothing would be replaced.

    Raises:
        OutputError: there is something.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{str(out)!r} is there already; name a folder that is not")


def _locked(folder: Path) -> int | None:
    """Return a descriptor that says that this process works here; None: another one does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_left_behind(out: Path) -> None:
    """Remove what an earlier run could not, because it was killed."""
    for folder in out.parent.glob(f".{out.name}.*{_PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):
            lock = _locked(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _write_through(folder: Path) -> None:
    """Have everything on the disk before it gets its name."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explained(error: OSError, out: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"the disk is full; {str(out)!r} was not written, make room and try again"
        )
    return OutputError(f"cannot write {str(out)!r}: {error.strerror or error}")


def write_model(
    parent: Parent,
    quantized: Mapping[str, QuantizedWeight],
    quantization: Quantization | None,
    folder: Path,
) -> None:
    """Write a model's folder: weights, config, and everything else as its parent has it.

    Args:
        quantized: by module name, for the matrices that are stored as integers.
        quantization: how they were made; None where there are none.
    """
    place = folder / parent.weights.relative_to(parent.folder)
    _copy_companions(parent, folder)
    parent.model.config.dtype = parent.dtype
    try:
        parent.model.save_pretrained(place, state_dict=_stored_form(parent, quantized))
    except Exception as error:
        # safetensors has an error of its own for what the disk says.
        if "No space left" in str(error) or "File too large" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    if quantization is not None:
        config = json.loads((place / "config.json").read_bytes())
        config["quantization_config"] = config_block(
            quantization.bits, quantization.group_size, ignored=_unquantized(parent, quantized)
        )
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (place / "config.json").write_text(text, encoding="utf-8")


def _copy_companions(parent: Parent, folder: Path) -> None:
    """Copy tokenizer, generation config, templates, pooling: what is neither weights nor config."""
    for source in sorted(parent.folder.rglob("*")):
        name = source.relative_to(parent.folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not source.is_file() or hidden or name.parts[0] == REPORT_FOLDER:
            continue
        if source.suffix in _LEFT_OUT or source.name.endswith(".index.json"):
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _stored_form(
    parent: Parent, quantized: Mapping[str, QuantizedWeight]
) -> dict[str, torch.Tensor]:
    """Return what the file holds: the parent's number format, and integers."""
    has_pooler = any("pooler." in name for name in parent.stored_names)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in parent.model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in quantized and name.endswith(".weight"):
            tensors |= pack(module, quantized[module])
        elif "pooler." not in name or has_pooler:  # else transformers has drawn it at random
            tensors[name] = tensor.to(parent.dtype) if tensor.is_floating_point() else tensor
    return tensors


def _unquantized(parent: Parent, quantized: Mapping[str, QuantizedWeight]) -> list[str]:
    """Return the linear modules that stay as they are."""
    modules: Any = parent.model.named_modules()
    linears = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    return [name for name in linears if name not in quantized]
