"""The model that is to be compressed: its modules in float32 on the CPU, and its files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from tensorwire_server.compress.errors import is_out_of_memory
from tensorwire_server.engine.folder import (
    checked_config,
    find_folder,
    first_line,
    read_sentence_folder,
)
from tensorwire_server.engine.fused.stored import weight_files
from tensorwire_server.engine.loading import (
    ModelLoadError,
    encoder_context,
    load_weights,
    served_context,
    silence_transformers,
)
from tensorwire_server.engine.tokenizing import TextTokenizer, load_wrapper
from tensorwire_server.models.manifest import REPORT_FOLDER, SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tensorwire_server.engine.folder import SentenceFolder

_CPU = torch.device("cpu")
_WEIGHTS = ".safetensors"
_INDEX = ".index.json"
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")
# As safetensors writes them; what a file stores otherwise is written as float32.
_DTYPES = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}


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
    companions: tuple[Path, ...]  # files in `folder` that its child has as well: tokenizer, licence

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
    except Exception as error:  # whatever transformers and safetensors make of a bad folder
        if is_out_of_memory(error):
            raise
        raise ModelLoadError(f"cannot compress {name!r}: {first_line(error)}") from error


def _load(folder: Path) -> Parent:
    is_encoder = (folder / "modules.json").is_file()
    sentence = read_sentence_folder(folder) if is_encoder else None
    weights = folder if sentence is None else sentence.encoder
    if "quantization_config" in checked_config(weights):
        raise ModelLoadError("it is quantized already; compress the model that it was made from")
    tokenizer = load_wrapper(weights)
    companions = tuple(_companions(folder))
    model = load_weights(AutoModel if is_encoder else AutoModelForCausalLM, weights, _CPU, None)
    _refuse_not_finite(model)
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
        companions=companions,
    )


def _companions(folder: Path) -> Iterator[Path]:
    """Find what is neither weights nor their index, by names in the folder.

    Raises:
        ModelLoadError: one is a link to elsewhere; a model that somebody else made must not have
            files of this machine copied into what is handed on.
    """
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":  # the hub's cache: links to the files' contents
        homes.append(homes[0].parent.parent / "blobs")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or name.parts[0] == REPORT_FOLDER:
            continue
        if not path.is_file() or not _is_companion(path):
            continue
        if not any(path.resolve().is_relative_to(home) for home in homes):
            raise ModelLoadError(
                f"its {name} is a link that leads out of the folder; copy the file"
            )
        yield name


def _is_companion(path: Path) -> bool:
    if path.suffix == _WEIGHTS or path.name.endswith(_INDEX):
        return False
    return path.suffix in SUFFIXES or path.stem.upper() in _LICENCES


def _refuse_not_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ModelLoadError(f"its weight {name} holds what is no finite number")


def _stored(folder: Path) -> tuple[torch.dtype, frozenset[str]]:
    """Return the number format of the largest tensor, and the names of all."""
    names: set[str] = set()
    largest, dtype = 0, torch.float32
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                names.add(name)
                stored = file.get_slice(name)
                size = math.prod(stored.get_shape())
                if size > largest:
                    largest, dtype = size, _DTYPES.get(stored.get_dtype(), torch.float32)
    return dtype, frozenset(names)
