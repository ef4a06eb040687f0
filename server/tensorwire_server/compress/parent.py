"""The model that is to be compressed: its modules in float32 on the CPU, and its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from tensorwire_server.engine.folder import checked_config, find_folder, read_sentence_folder
from tensorwire_server.engine.loading import (
    ModelLoadError,
    load_weights,
    silence_transformers,
)
from tensorwire_server.engine.tokenizing import load_wrapper

if TYPE_CHECKING:
    from pathlib import Path

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """What is compressed. The files are only read; the modules are changed in place."""

    folder: Path
    weights: Path  # the folder inside that holds config.json and the weights, or `folder` itself
    model: Any
    tokenizer: Any
    is_encoder: bool
    dtype: torch.dtype  # in which most of its weights are stored
    stored_names: frozenset[str]

    def window_tokens(self, most: int) -> int:
        """Return how many tokens of a text it reads at once, at most `most`."""
        stated = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(most, stated) if isinstance(stated, int) and stated > 0 else most

    def ids_of(self, documents: tuple[str, ...]) -> list[int]:
        """Return the tokens of documents one behind the other, each with the model's end."""
        end = self.tokenizer.eos_token_id
        tail = [] if end is None else [int(end)]
        encoded = self.tokenizer(list(documents), add_special_tokens=False)["input_ids"]
        return [token_id for ids in encoded for token_id in [*ids, *tail]]

    def ids_of_lines(self, lines: list[str], most: int) -> list[list[int]]:
        """Return each line's tokens as an encoder gets them."""
        encoded = self.tokenizer(lines, truncation=True, max_length=most)["input_ids"]
        return [list(ids) for ids in encoded]


def load_parent(name: str, revision: str | None = None) -> Parent:
    """Load a model for compressing.

    Raises:
        ModelLoadError: with one sentence; also where it is quantized already.
    """
    silence_transformers()
    try:
        return _load(find_folder(name, revision))
    except ModelLoadError as error:
        raise ModelLoadError(f"cannot compress {name!r}: {error}") from error.__cause__


def _load(folder: Path) -> Parent:
    is_encoder = (folder / "modules.json").is_file()
    weights = read_sentence_folder(folder).encoder if is_encoder else folder
    if "quantization_config" in checked_config(weights):
        raise ModelLoadError("it is quantized already; compress the model that it was made from")
    tokenizer = load_wrapper(weights)
    model = load_weights(AutoModel if is_encoder else AutoModelForCausalLM, weights, _CPU)
    dtype, names = _stored(weights)
    return Parent(
        folder=folder,
        weights=weights,
        model=model,
        tokenizer=tokenizer,
        is_encoder=is_encoder,
        dtype=dtype,
        stored_names=names,
    )


def _stored(folder: Path) -> tuple[torch.dtype, frozenset[str]]:
    """Return the number format of the largest tensor, and the names of all."""
    names: set[str] = set()
    largest, dtype = 0, torch.float32
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                names.add(name)
                shape = file.get_slice(name).get_shape()
                size = torch.Size(shape).numel()
                if size > largest:
                    largest, dtype = size, file.get_tensor(name).dtype
    return dtype, frozenset(names)
