"""Everything there is to say about one compression, as data, and as JSON both ways."""

# ruff: noqa: TC001 - msgspec looks at the annotations when it reads a report.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from tensorwire_server.compress.floors import Judgement
from tensorwire_server.compress.quality import Quality
from tensorwire_server.compress.recipe import Recipe
from tensorwire_server.compress.results import LayerError, Pruned
from tensorwire_server.compress.sizes import FolderSize
from tensorwire_server.compress.speed import Speed

FORMAT = 1  # of the JSON; a reader refuses any other


class ReportError(ValueError):
    """This is no report, or not one that can be read here; the message is one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """A model and the content hash of its files."""

    name: str
    revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedText:
    """A file that the recipe names, without where it lay."""

    use: str  # "calibration", "evaluation" or "labels"
    name: str
    sha256: str  # of the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was asked for, what came out, and how that was measured."""

    format: int = FORMAT
    date: str  # ISO 8601, UTC
    parent: NamedModel
    child: NamedModel
    recipe: Recipe  # its files by their names alone
    texts: tuple[NamedText, ...]  # those that the recipe names
    pruned: tuple[Pruned, ...]  # one for each removal of the recipe
    errors: tuple[LayerError, ...]  # empty without a calibration text
    size_before: FolderSize
    size_after: FolderSize
    quality: Quality
    speed: Speed | None  # None: not asked for
    floors: tuple[Judgement, ...]
    seconds: dict[str, float]  # by stage
    versions: dict[str, str]
    machine: dict[str, str]
    notes: tuple[str, ...] = ()  # see `honesty`

    @property
    def meets_floors(self) -> bool:
        """Say if the result is good enough."""
        return all(judgement.is_met for judgement in self.floors)

    @property
    def error_of(self) -> dict[str, float]:
        """The errors of layers by their names."""
        return {layer.name: layer.error for layer in self.errors}


def to_json(report: Report) -> bytes:
    """Return a report for a file; floats keep every digit."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1)


def from_json(content: bytes) -> Report:
    """Return the report of a file.

    Raises:
        ReportError: it is none, or of another format.
    """
    try:
        found: Any = msgspec.json.decode(content)
        number = found.get("format") if isinstance(found, dict) else None
        if number != FORMAT:
            raise ReportError(f"a report of format {FORMAT} is expected, not of {number!r}")
        return msgspec.json.decode(content, type=Report)
    except msgspec.MsgspecError as error:
        raise ReportError(f"this is no report of a compression: {error}") from error
