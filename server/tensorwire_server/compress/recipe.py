"""What is to be done to a model. Pure: from flags or TOML to a `Recipe`, or to one sentence.

A recipe travels in the output folder; the same recipe and parent give the same folder again.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec
import tomli_w

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DEFAULT_GROUP_SIZE = 32


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message is one sentence for a person."""


class Structure(StrEnum):
    """What is removed."""

    UNSTRUCTURED = "unstructured"  # single weights become zero; shapes stay
    HEADS = "heads"  # attention heads, by groups that share keys and values
    NEURONS = "neurons"  # of the feed-forward part
    LAYERS = "layers"


class Method(StrEnum):
    """By what single weights are judged."""

    MAGNITUDE = "magnitude"
    WANDA = "wanda"  # magnitude times the norm of the input (Sun et al. 2023, arXiv:2306.11695)


class Scope(StrEnum):
    """Among which weights the least important are chosen."""

    LAYER = "layer"  # every matrix reaches the target by itself
    GLOBAL = "global"  # all of them together


class Rounding(StrEnum):
    """How weights become integers."""

    NEAREST = "nearest"
    GPTQ = "gptq"  # calibrated (Frantar et al. 2022, arXiv:2210.17323)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """One removal; `method` and `scope` are of single weights."""

    structure: Structure
    target: float  # the share that goes, between 0 and 1
    method: Method = Method.MAGNITUDE
    scope: Scope = Scope.LAYER

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise RecipeError(
                f"the target of prune {self.structure} must lie between 0 and 1 (the share that"
                f" goes), got {self.target:g}"
            )
        whole = self.structure is not Structure.UNSTRUCTURED
        if whole and (self.method, self.scope) != (Method.MAGNITUDE, Scope.LAYER):
            raise RecipeError(
                f"method and scope are of prune unstructured; prune {self.structure} has neither"
            )

    @property
    def needs_text(self) -> bool:
        """Say if importance is measured on a calibration text."""
        return self.structure is not Structure.UNSTRUCTURED or self.method is Method.WANDA


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Weights as integers, scaled by groups of one output's weights."""

    bits: int
    rounding: Rounding | None = None  # None: a recipe takes GPTQ if it has a calibration text
    group_size: int | None = None  # inputs that share a scale: 32 of int4, of int8 all (None)

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RecipeError(f"quantize must be int8 or int4, got int{self.bits}")
        if self.bits == 4 and self.group_size is None:
            object.__setattr__(self, "group_size", DEFAULT_GROUP_SIZE)
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise RecipeError(
                f"group_size must be a multiple of 8 from 8 on, got {self.group_size}"
            )
        if self.bits == 8 and self.group_size is not None:
            raise RecipeError(
                "int8 has one scale for each output; leave group_size away, or quantize to int4"
            )


class Metric(StrEnum):
    """What a floor can be set for, and whether more of it is better."""

    PERPLEXITY = "ppl"
    KL = "kl"
    AGREEMENT = "agreement"
    COSINE = "cosine"
    ACCURACY = "accuracy"

    @property
    def more_is_better(self) -> bool:
        """Say on which side of the limit the result must be."""
        return self not in (Metric.PERPLEXITY, Metric.KL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The least quality; below it nothing is written."""

    metric: Metric
    limit: float
    relative: bool = False  # to the parent's

    def __post_init__(self) -> None:
        if self.relative and self.metric is Metric.KL:
            raise RecipeError(
                "the floor kl is no number of the parent's, and so cannot be relative to it; write"
                " for example kl=0.1"
            )
        # A parent agrees with itself wholly; only its accuracy leaves room above.
        may_pass = self.relative and self.metric is Metric.ACCURACY
        if self.metric.more_is_better and self.limit > 1 and not may_pass:
            raise RecipeError(
                f"the floor {self} can never be met: {self.metric} is at most 1; write for example"
                f" {self.metric}=0.95"
            )

    @property
    def bound(self) -> str:
        """Return the limit as it is written: `1.1x` where it is relative."""
        return f"{self.limit:.12g}{'x' if self.relative else ''}"

    def __str__(self) -> str:
        return f"{self.metric}={self.bound}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what comes out.

    Files are text (UTF-8); documents in them are separated by empty lines.
    """

    prune: tuple[Pruning, ...] = ()
    quantize: Quantization | None = None
    calibrate: str | None = None
    evaluate: str | None = None
    labels: str | None = None  # JSON Lines of {"text": …, "label": …}
    floors: tuple[Floor, ...] = ()
    seed: int = 0  # chooses the calibration windows
    num_windows: int = 64  # of the calibration text; of the evaluation text twice as many
    window_tokens: int = 512  # at most; a shorter context holds less
    speed: bool = True  # measure tokens/s through a server

    def __post_init__(self) -> None:
        if not self.prune and self.quantize is None:
            raise RecipeError("nothing to do; give prune (unstructured:0.5) or quantize (int8)")
        if self.num_windows < 1 or self.window_tokens < 8:
            raise RecipeError("num_windows must be at least 1 and window_tokens at least 8")
        if self.seed < 0:
            raise RecipeError(f"seed must be 0 or more, got {self.seed}")
        if self.quantize is not None and self.quantize.rounding is None:
            rounding = Rounding.NEAREST if self.calibrate is None else Rounding.GPTQ
            quantize = replace(self.quantize, rounding=rounding)
            object.__setattr__(self, "quantize", quantize)
        _refuse_twice([pruning.structure for pruning in self.prune], "prune")
        if self.calibrate is None and self.needs_text:
            raise RecipeError(
                "this recipe measures what is important on a text; give one with --calibrate FILE"
            )
        for floor in self.floors:
            labelled = floor.metric is Metric.ACCURACY
            if (self.labels if labelled else self.evaluate) is None:
                flag = "--labels" if labelled else "--eval"
                raise RecipeError(
                    f"the floor {floor} is measured on a text; give one with {flag} FILE"
                )

    @property
    def needs_text(self) -> bool:
        """Say if a calibration text is needed."""
        gptq = self.quantize is not None and self.quantize.rounding is Rounding.GPTQ
        return gptq or any(pruning.needs_text for pruning in self.prune)


def parse_pruning(text: str) -> dict[str, Any]:
    """Return the table that `unstructured:0.5` stands for.

    Raises:
        RecipeError: no such structure, or no share.
    """
    name, _, share = text.partition(":")
    structure = _known(name, Structure, "prune")
    try:
        return {"structure": structure, "target": float(share)}
    except ValueError:
        raise RecipeError(
            f"prune {text!r} names no share; write for example {structure}:0.5"
        ) from None


def parse_quantization(text: str) -> dict[str, Any]:
    """Return the table that `int4` stands for.

    Raises:
        RecipeError: no such numbers.
    """
    bits = {"int8": 8, "int4": 4}.get(text)
    if bits is None:
        raise RecipeError(f"quantize must be int8 or int4, got {text!r}")
    return {"bits": bits}


def refine(
    tables: dict[str, Any],
    *,
    method: str | None = None,
    scope: str | None = None,
    rounding: str | None = None,
    group_size: int | None = None,
) -> None:
    """Write flags of a step into the tables of a recipe that have such steps.

    Raises:
        RecipeError: there is no such choice, or no step that it could be of.
    """
    of_weights = [
        table for table in _tables(tables.get("prune"))
        if table.get("structure") == Structure.UNSTRUCTURED
    ]  # fmt: skip
    quantize = [tables["quantize"]] if isinstance(tables.get("quantize"), dict) else []
    if method is not None:
        _set(of_weights, "method", _known(method, Method, "method"), "prune unstructured")
    if scope is not None:
        _set(of_weights, "scope", _known(scope, Scope, "scope"), "prune unstructured")
    if rounding is not None:
        _set(quantize, "rounding", _known(rounding, Rounding, "rounding"), "quantize")
    if group_size is not None:
        _set(quantize, "group_size", group_size, "quantize")


def _set(steps: Sequence[dict[str, Any]], key: str, value: str | int, owner: str) -> None:
    if not steps:
        raise RecipeError(f"{key} {value} is of {owner}, which this recipe does not ask for")
    for step in steps:
        step[key] = value


def parse_floors(texts: Iterable[str]) -> tuple[Floor, ...]:
    """Return the floors of `ppl=1.10x`, `cosine=0.99`, each metric at most once.

    Raises:
        RecipeError: a text is no floor, or a metric comes twice.
    """
    floors = tuple(_parse_floor(text) for text in texts)
    _refuse_twice([floor.metric for floor in floors], "the floor")
    return floors


def _parse_floor(text: str) -> Floor:
    metric, _, limit = text.partition("=")
    metric, limit = metric.strip(), limit.strip()
    _known(metric, Metric, "floor")
    try:
        number = float(limit.removesuffix("x"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise RecipeError(
            f"the floor {text!r} is neither a number above 0, as in {metric}=0.9, nor one with an x"
            f" behind it (relative to the parent), as in {metric}=1.1x"
        )
    return Floor(metric=Metric(metric), limit=number, relative=limit.endswith("x"))


def parse_recipe(toml: str) -> Recipe:
    """Return the recipe of a TOML text.

    Raises:
        RecipeError: it is no TOML, or a key or value is not allowed.
    """
    return make_recipe(parse_tables(toml))


def parse_tables(toml: str) -> dict[str, Any]:
    """Return what a TOML text says, before it has to be a whole recipe.

    Raises:
        RecipeError: it is no TOML, or a key is not known.
    """
    try:
        content = tomllib.loads(toml)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(str(error)) from error
    _refuse_unknown_keys(content)
    return content


def make_recipe(tables: Mapping[str, Any]) -> Recipe:
    """Return the recipe that a text and flags have come to.

    Raises:
        RecipeError: a value is not allowed.
    """
    content = dict(tables)
    floors = content.pop("floors", {})
    if not isinstance(floors, dict):
        raise RecipeError("floors must be a table of limits: [floors], and below it ppl = '1.1x'")
    limits = parse_floors(f"{metric}={limit}" for metric, limit in floors.items())
    try:
        return msgspec.convert({**content, "floors": limits}, Recipe)
    except msgspec.ValidationError as error:
        # What a dataclass refuses says already where it stands.
        own = error.__cause__
        raise RecipeError(str(own if isinstance(own, RecipeError) else error)) from error


def write_recipe(recipe: Recipe) -> str:
    """Return the TOML of a recipe, which `parse_recipe` reads."""
    content: dict[str, Any] = msgspec.to_builtins(recipe)
    content["floors"] = {floor.metric.value: floor.bound for floor in recipe.floors}
    return tomli_w.dumps(_without_none(content))


def _without_none(content: Any) -> Any:
    """Leave away what is unset: TOML has no word for it."""
    if isinstance(content, dict):
        return {key: _without_none(value) for key, value in content.items() if value is not None}
    return [_without_none(item) for item in content] if isinstance(content, list) else content


def _refuse_unknown_keys(content: dict[str, Any]) -> None:
    tables: list[tuple[str, Any, type[Any]]] = [("", content, Recipe)]
    tables += [("prune.", table, Pruning) for table in _tables(content.get("prune"))]
    tables += [("quantize.", content.get("quantize"), Quantization)]
    for prefix, table, kind in tables:
        known = [item.name for item in fields(kind)]
        for key in table if isinstance(table, dict) else ():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise RecipeError(f"there is no key {prefix}{key}; {hint}")


def _tables(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _known(text: str, choices: type[StrEnum], what: str) -> str:
    known = [choice.value for choice in choices]
    if text not in known:
        raise RecipeError(f"{what} {text!r} is not known; known are {', '.join(known)}")
    return text


def _refuse_twice(values: Sequence[str], what: str) -> None:
    for value in set(values):
        if values.count(value) > 1:
            raise RecipeError(f"{what} {value} stands there twice")
