"""The model that is to be compressed: its modules in float32 on the CPU, and its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from tensorwire_server.engine.folder import checked_config, find_folder, read_sentence_folder
from tensorwire_server.engine.fused.stored import weight_files
from tensorwire_server.engine.loading import (
    ModelLoadError,
    encoder_context,
    load_weights,
    served_context,
    silence_transformers,
)
from tensorwire_server.engine.tokenizing import TextTokenizer, load_wrapper

if TYPE_CHECKING:
    from pathlib import Path

    from tensorwire_server.engine.folder import SentenceFolder

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """What is compressed. The files are only read; the modules are changed in place."""

    folder: Path
    weights: Path  # the folder inside that holds config.json and the weights, or `folder` itself
    model: Any
    tokenizer: Any
    sentence: SentenceFolder | None  # of an encoder; None: it continues text
    context_tokens: int  # how many it reads at most when it is served
    dtype: torch.dtype  # in which most of its weights are stored
    stored_names: frozenset[str]

    @property
    def is_encoder(self) -> bool:
        """Say if it makes vectors of texts, instead of continuing them."""
        return self.sentence is not None

    def window_tokens(self, most: int) -> int:
        """Return how many tokens of a text it reads at once, at most `most`."""
        return min(most, self.context_tokens)

    @property
    def start_ids(self) -> list[int]:
        """What its tokenizer puts before every text, and it was trained to find there."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        served = self.tokenizer("a")["input_ids"]
        starts = range(len(served) - len(plain) + 1)
        at = next((i for i in starts if served[i : i + len(plain)] == plain), 0)
        return list(served[:at])

    def ids_of(self, documents: tuple[str, ...]) -> list[int]:
        """Return the tokens of documents one behind the other, each with the model's end."""
        end = self.tokenizer.eos_token_id
        tail = [] if end is None else [int(end)]
        encoded = self.tokenizer(list(documents), add_special_tokens=False)["input_ids"]
        return [token_id for ids in encoded for token_id in [*ids, *tail]]

    def ids_of_lines(self, lines: list[str], most: int) -> list[list[int]]:
        """Return each line's tokens as an encoder gets them when it is served."""
        assert self.sentence is not None, "this is a text model"
        tokenizer = TextTokenizer(
            self.tokenizer,
            max_tokens=self.window_tokens(most),
            prefix=self.sentence.prefix,
            lower_case=self.sentence.lower_case,
        )
        return [tokenizer.encode(line) for line in lines]


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
    sentence = read_sentence_folder(folder) if is_encoder else None
    weights = folder if sentence is None else sentence.encoder
    if "quantization_config" in checked_config(weights):
        raise ModelLoadError("it is quantized already; compress the model that it was made from")
    tokenizer = load_wrapper(weights)
    model = load_weights(AutoModel if is_encoder else AutoModelForCausalLM, weights, _CPU, None)
    if sentence is None:
        context = served_context(model.config.get_text_config(), tokenizer)
    else:
        context = encoder_context(model, tokenizer, sentence.max_tokens)
    dtype, names = _stored(weights)
    return Parent(
        folder=folder,
        weights=weights,
        model=model,
        tokenizer=tokenizer,
        sentence=sentence,
        context_tokens=context,
        dtype=dtype,
        stored_names=names,
    )


def _stored(folder: Path) -> tuple[torch.dtype, frozenset[str]]:
    """Return the number format of the largest tensor, and the names of all."""
    names: set[str] = set()
    largest, dtype = 0, torch.float32
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                names.add(name)
                shape = file.get_slice(name).get_shape()
                size = torch.Size(shape).numel()
                if size > largest:
                    largest, dtype = size, file.get_tensor(name).dtype
    return dtype, frozenset(names)
