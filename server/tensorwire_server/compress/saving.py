"""The folder that comes out: made beside its place, moved there whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tensorwire_server.compress.interrupts import held_interrupts
from tensorwire_server.engine.fused.stored import linear_layers
from tensorwire_server.engine.quantized import config_block, pack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from tensorwire_server.compress.parent import Parent
    from tensorwire_server.compress.recipe import Quantization
    from tensorwire_server.engine.quantized import QuantizedWeight

_PARTIAL = ".partial"


class OutputError(Exception):
    """The result cannot be written; the message is one sentence for a person."""


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `out` if the block ends well, else it goes.

    Raises:
        OutputError: `out` cannot be made.
    """
    out = Path(os.path.abspath(out))
    check_place(out)
    lock = None
    partial = _new_name(out)  # known before it is there: no interrupt finds a folder without a name
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_behind(out)
            while (lock := _claim(partial)) is None:
                partial = _new_name(out)
        yield partial
        with writing(out):
            _write_through(partial)
            partial.chmod(0o755)
            check_place(out)
            partial.rename(out)
    finally:
        with (
            held_interrupts()
        ):  # a second Ctrl-C would leave what the first one had begun to remove
            shutil.rmtree(partial, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def check_place(out: Path) -> None:
    """Make sure that a folder can be made here, and that nothing would be replaced.

    Raises:
        OutputError: something stands in the way.
    """
    with writing(out):
        # A link, too: the folder would take its place, and not that of what it points to.
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise OutputError(f"{str(out)!r} is there already; name a folder that is not")
        above = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise OutputError(f"cannot write {str(out)!r}: {str(above)!r} is no folder")


def refuse_inside(out: Path, parent: Path) -> None:
    """Make sure that the parent's folder stays as it is.

    Raises:
        OutputError: `out` lies in it.
    """
    if out.resolve().is_relative_to(parent.resolve()):
        raise OutputError(
            f"{str(out)!r} lies in the folder of the model itself, which is only read;"
            " name a folder outside of it"
        )


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Translate what the disk says in the block.

    Raises:
        OutputError: it does not take what is written for `out`.
    """
    try:
        yield
    except OSError as error:
        raise _explained(error, out) from error


def _new_name(out: Path) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}{_PARTIAL}")


def _claim(folder: Path) -> int | None:
    """Make a folder and lock it; None: another process took it for left behind before that."""
    folder.mkdir(0o700)
    with contextlib.suppress(FileNotFoundError):
        lock = _locked(folder)
        if lock is not None and folder.is_dir():
            return lock
        if lock is not None:
            os.close(lock)
    return None


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
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*{_PARTIAL}"):
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
        unquantized = sorted(linear_layers(parent.model) - quantized.keys())
        config["quantization_config"] = config_block(
            quantization.bits, quantization.group_size, ignored=unquantized
        )
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (place / "config.json").write_text(text, encoding="utf-8")


def _copy_companions(parent: Parent, folder: Path) -> None:
    for name in parent.companions:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(parent.folder / name, target)


def _stored_form(
    parent: Parent, quantized: Mapping[str, QuantizedWeight]
) -> dict[str, torch.Tensor]:
    """Return what the file holds: the parent's number format, and integers."""
    has_pooler = any("pooler." in name for name in parent.stored_names)
    tensors: dict[str, torch.Tensor] = {}
    # Tied weights have to stay one: those that share memory are stored once.
    converted: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for name, tensor in parent.model.state_dict().items():
        module = name.removesuffix(".weight")
        if module in quantized and name.endswith(".weight"):
            tensors |= pack(module, quantized[module])
        elif "pooler." not in name or has_pooler:  # else transformers has drawn it at random
            key = tensor.data_ptr(), tensor.shape
            if key not in converted:
                is_number = tensor.is_floating_point()
                converted[key] = tensor.to(parent.dtype) if is_number else tensor
            tensors[name] = converted[key]
    return tensors
