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
    from collections.abc import Iterable, Iterator, Sequence

_GAP = re.compile(r"\n(?:[ \t]*\n)+")
# Shorter ones ("Example:") stand in many texts by chance; lines more often than documents.
_DOCUMENT_CHARS, _LINE_CHARS = 64, 32
_CHANCE_LINES, _CHANCE_SHARE = 1, 0.01  # so much of the lines may be shared
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
        return [line.strip() for line in _lines_of(self.documents)]


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


def refuse_shared(calibration: Text, judged: Sequence[str], what: str) -> None:
    """Make sure that nothing is judged on what it was fitted to.

    Args:
        judged: the documents of the other text.
        what: what that is, for the sentence of a refusal.

    Raises:
        RecipeError: a document stands in the calibration text, or more than a few lines do,
            whatever their white space.
    """
    known = _digests(calibration.lines, _LINE_CHARS)
    documents = _digests(judged, _DOCUMENT_CHARS)
    lines = _digests(_lines_of(judged), _LINE_CHARS)
    in_documents = documents.keys() & (_digests(calibration.documents, 0).keys() | known.keys())
    in_lines = lines.keys() & known.keys()
    if calibration.documents == tuple(judged):
        raise RecipeError(f"{what} is the calibration text; take them from different texts")
    if in_documents:
        shared, unit, of = [documents[digest] for digest in in_documents], "documents", documents
    elif len(in_lines) > max(_CHANCE_LINES, _CHANCE_SHARE * len(lines)):
        shared, unit, of = [lines[digest] for digest in in_lines], "lines", lines
    else:
        return
    raise RecipeError(
        f"{len(shared)} of {len(of)} {unit} of {what} stand in the calibration text too, for"
        f" example {min(shared)[:60]!r}; take them from different texts"
    )


def _digests(texts: Iterable[str], least_chars: int) -> dict[bytes, str]:
    """Return the texts that are long enough to tell something, by the digest of their words."""
    plain = (" ".join(text.split()) for text in texts)
    return {
        hashlib.sha256(text.encode()).digest(): text for text in plain if len(text) >= least_chars
    }


def _lines_of(documents: Iterable[str]) -> Iterator[str]:
    return (line for document in documents for line in document.splitlines() if line.strip())


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
