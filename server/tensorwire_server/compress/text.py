"""The texts that a model is calibrated with and evaluated on, and that they are not the same.

A file is UTF-8; documents are separated by empty lines. What an encoder embeds is a line each.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tensorwire_server.compress.recipe import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_GAP = re.compile(r"\n(?:[ \t]*\n)+")
# Shorter ones ("Example:") stand in many texts by chance.
_TELLING_CHARS = 64
_MAX_FILE_BYTES = 1 << 30

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text file, read."""

    path: str
    documents: tuple[str, ...]
    sha256: str  # of the file

    @property
    def lines(self) -> list[str]:
        """Return all lines that are not empty."""
        stripped = (line.strip() for document in self.documents for line in document.splitlines())
        return [line for line in stripped if line]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """One example of a task: a text and the label that is right for it."""

    text: str
    label: str


def read_text(path: str, purpose: str) -> Text:
    """Return the text of a file.

    Args:
        purpose: what it is for, as in "calibration".

    Raises:
        RecipeError: it cannot be read, is no UTF-8, or holds no text.
    """
    content = _read(path, purpose)
    try:
        whole = content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the {purpose} text {path!r} is not UTF-8 (byte {error.start})"
        ) from error
    documents = tuple(text for part in _GAP.split(whole) if (text := part.strip("\n")).strip())
    if not documents:
        raise RecipeError(f"the {purpose} text {path!r} is empty; give a file with text in it")
    return Text(path=path, documents=documents, sha256=hashlib.sha256(content).hexdigest())


def read_labels(path: str) -> list[LabelledText]:
    """Return the examples of a JSON Lines file.

    Raises:
        RecipeError: a line is no object with the strings `text` and `label`, or all labels are one.
    """
    examples = []
    for number, line in enumerate(_read(path, "labels").splitlines(), 1):
        if not line.strip():
            continue
        try:
            example: Any = json.loads(line)
            text, label = example["text"], example["label"]
        except (ValueError, TypeError, KeyError):
            text = label = None
        if not (isinstance(text, str) and isinstance(label, str) and text and label):
            raise RecipeError(
                f'line {number} of {path!r} is not {{"text": "…", "label": "…"}} with two texts'
            )
        examples.append(LabelledText(text=text, label=label))
    if len({example.label for example in examples}) < 2:
        raise RecipeError(f"{path!r} must hold at least two different labels")
    return examples


def _read(path: str, purpose: str) -> bytes:
    try:
        file = Path(path).expanduser()
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise RecipeError(
                f"the {purpose} file {path!r} is larger than 1 GiB; take a part of it"
            )
        return file.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot read the {purpose} file {path!r}: {error.strerror}") from error


def refuse_shared(calibration: Text, evaluation: Text) -> None:
    """Make sure that nothing is judged on what it was fitted to.

    Raises:
        RecipeError: a document stands in both texts, whatever its white space.
    """
    known = {_digest(document) for document in _telling(calibration)}
    shared = [document for document in _telling(evaluation) if _digest(document) in known]
    if calibration.sha256 == evaluation.sha256 or shared:
        begin = " ".join((shared or evaluation.documents)[0].split())[:60]
        raise RecipeError(
            f"{max(len(shared), 1)} documents of the evaluation text {evaluation.path!r} stand in"
            f" the calibration text too, for example {begin!r}; take them from different texts"
        )


def _telling(text: Text) -> Iterator[str]:
    return (document for document in text.documents if len(document) >= _TELLING_CHARS)


def _digest(document: str) -> bytes:
    return hashlib.sha256(" ".join(document.split()).encode()).digest()


def cut_windows(ids: Sequence[int], window_tokens: int) -> list[list[int]]:
    """Return the ids in pieces of one length, and what is left over if it predicts anything."""
    starts = range(0, len(ids), window_tokens)
    windows = [list(ids[start : start + window_tokens]) for start in starts]
    return [window for window in windows if len(window) > 1]


def choose_some(items: Sequence[_Item], count: int, seed: int) -> list[_Item]:
    """Return so many of the items, in their order; the same seed chooses the same."""
    if len(items) <= count:
        return list(items)
    chosen = random.Random(seed).sample(range(len(items)), count)
    return [items[place] for place in sorted(chosen)]
