"""A model's folder: where it is, what its JSON files say, and what is refused before any weight.

What a folder could make us run (pickled weights, code of its own) ends here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from tensorwire_server.engine.encoder import POOLING_MODES, EmbeddingRecipe
from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.quantized import read_block

_HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_HUB_IGNORED = ("onnx/*", "openvino/*")
_EXECUTABLE_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_folder(name: str, revision: str | None) -> Path:
    """Return an existing folder, or fetch what is needed of a hub repository."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError("it is a file, not a model folder")
    if name.startswith((".", "/", "~", "\\")) or name.count("/") > 1:
        raise ModelLoadError("there is no such folder")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_HUB_PATTERNS),
                ignore_patterns=list(_HUB_IGNORED),
            )
        )
    except Exception as error:
        # The hub's own errors are paragraphs; the log has them.
        raise ModelLoadError(
            "there is no such folder, and the Hugging Face hub cannot be reached or has no model"
            " of that name"
        ) from error


def checked_config(folder: Path) -> dict[str, Any]:
    """Return config.json after refusing what would need foreign code or other weights."""
    config: dict[str, Any] = read_json(folder / "config.json")
    if "auto_map" in config:
        raise ModelLoadError("it needs Python code of its own (auto_map), which is never run here")
    read_block(config)
    if config.get("is_encoder_decoder"):
        raise ModelLoadError("it is an encoder-decoder model, which is not supported")
    if not any(folder.glob("*.safetensors")):
        executable = sorted(
            path.name for path in folder.iterdir() if path.suffix in _EXECUTABLE_WEIGHTS
        )
        if executable:
            raise ModelLoadError(
                f"its weights are in {executable[0]}, a format that can run code; "
                "only safetensors are loaded"
            )
        raise ModelLoadError("it has no weights (*.safetensors)")
    return config


def architecture_of(config: dict[str, Any]) -> str:
    """Return the class that config.json names first."""
    architectures = config.get("architectures") or []
    if not architectures:
        raise ModelLoadError("its config.json names no architecture")
    return str(architectures[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceFolder:
    """What a sentence-transformers folder says of itself."""

    encoder: Path  # the transformers model inside
    recipe: EmbeddingRecipe
    max_tokens: int | None
    lower_case: bool
    prefix: str  # stands before every text


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Return what modules.json and its companions ask for.

    Raises:
        ModelLoadError: a module or a setting is not supported.
    """
    modules = _read_modules(folder)
    encoder = folder / modules["Transformer"]
    settings = read_json(encoder / "sentence_bert_config.json", missing={})
    return SentenceFolder(
        encoder=encoder,
        recipe=EmbeddingRecipe(
            pooling=_pooling_modes(folder / modules["Pooling"]), normalize="Normalize" in modules
        ),
        max_tokens=settings.get("max_seq_length"),
        lower_case=bool(settings.get("do_lower_case")),
        prefix=_default_prompt(folder),
    )


def _read_modules(folder: Path) -> dict[str, str]:
    """Return the path of each module of a sentence-transformers folder by its class's name."""
    modules: dict[str, str] = {}
    for entry in read_json(folder / "modules.json", kind=list):
        name = str(entry["type"]).rpartition(".")[2]
        if name in modules or name not in ("Transformer", "Pooling", "Normalize"):
            raise ModelLoadError(
                f"its modules.json asks for {name}, but only one Transformer, one Pooling "
                "and one Normalize are supported"
            )
        path = Path(str(entry["path"]))
        if path.is_absolute() or ".." in path.parts:
            raise ModelLoadError(f"its modules.json points outside of the folder ({path})")
        modules[name] = str(path)
    order = list(modules)
    if order not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelLoadError(
            f"its modules.json says {', '.join(order) or 'nothing'}, but Transformer, Pooling "
            "and perhaps Normalize are expected"
        )
    return modules


def _pooling_modes(folder: Path) -> tuple[str, ...]:
    config = read_json(folder / "config.json")
    if config.get("include_prompt") is False:
        raise ModelLoadError("its pooling leaves out the prompt, which is not supported")
    modes = config.get("pooling_mode")
    if modes is None:  # folders written before sentence-transformers 5.4
        legacy = {
            mode: f"pooling_mode_{mode}_tokens" for mode in ("mean", "max", "weightedmean")
        } | {
            "cls": "pooling_mode_cls_token",
            "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
            "lasttoken": "pooling_mode_lasttoken",
        }
        # Their order decides how several are put side by side.
        modes = [mode for mode in POOLING_MODES if config.get(legacy[mode])] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    unknown = [mode for mode in modes if mode not in POOLING_MODES]
    if unknown:
        raise ModelLoadError(f"its pooling mode {unknown[0]!r} is not supported")
    return modes


def _default_prompt(folder: Path) -> str:
    config = read_json(folder / "config_sentence_transformers.json", missing={})
    name = config.get("default_prompt_name")
    return "" if name is None else str(config.get("prompts", {}).get(name) or "")


def read_json(path: Path, *, kind: type = dict, missing: Any = None) -> Any:
    """Return a JSON file's content; `missing` instead of a refusal where there is no file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if missing is None:
            raise ModelLoadError(f"it has no {path.name}") from None
        return missing
    except ValueError as error:
        raise ModelLoadError(f"its {path.name} is not JSON: {error}") from error
    if not isinstance(content, kind):
        raise ModelLoadError(f"its {path.name} holds no {kind.__name__}")
    return content


def first_line(error: Exception) -> str:
    """Return what a foreign error says, short enough for one sentence."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
