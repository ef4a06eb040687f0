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
    from collections.abc import Iterable, Sequence

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

    @property
    def needs_text(self) -> bool:
        """Say if importance is measured on a calibration text."""
        return self.structure is not Structure.UNSTRUCTURED or self.method is Method.WANDA


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Weights as integers, scaled by groups of one output's weights."""

    bits: int
    rounding: Rounding = Rounding.NEAREST
    group_size: int | None = None  # inputs that share a scale; None: all of an output

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RecipeError(f"quantize must be int8 or int4, got int{self.bits}")
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

    @property
    def bound(self) -> str:
        """Return the limit as it is written: `1.1x` where it is relative."""
        return f"{self.limit:g}{'x' if self.relative else ''}"

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


def parse_pruning(text: str, *, method: str, scope: str) -> Pruning:
    """Return what `unstructured:0.5` means.

    Raises:
        RecipeError: no such structure, method or scope, or no share.
    """
    name, _, share = text.partition(":")
    structure = Structure(_known(name, Structure, "prune"))
    try:
        target = float(share)
    except ValueError:
        raise RecipeError(
            f"prune {text!r} names no share; write for example {structure}:0.5"
        ) from None
    return Pruning(
        structure=structure,
        target=target,
        method=Method(_known(method, Method, "method")),
        scope=Scope(_known(scope, Scope, "scope")),
    )


def parse_quantization(
    text: str, *, rounding: str | None, group_size: int | None, is_calibrated: bool
) -> Quantization:
    """Return what `int4` means; unset rounding is GPTQ where there is a text to calibrate with.

    Raises:
        RecipeError: no such numbers or rounding.
    """
    bits = {"int8": 8, "int4": 4}.get(text)
    if bits is None:
        raise RecipeError(f"quantize must be int8 or int4, got {text!r}")
    if rounding is None:
        rounding = Rounding.GPTQ if is_calibrated else Rounding.NEAREST
    if bits == 4 and group_size is None:
        group_size = DEFAULT_GROUP_SIZE
    rounding = Rounding(_known(rounding, Rounding, "rounding"))
    return Quantization(bits=bits, rounding=rounding, group_size=group_size)


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
    try:
        content = tomllib.loads(toml)
        floors = content.pop("floors", {})
        _refuse_unknown_keys(content)
        recipe = msgspec.convert(content, Recipe)
        limits = parse_floors(f"{metric}={limit}" for metric, limit in dict(floors).items())
        return replace(recipe, floors=limits)
    except (ValueError, TypeError) as error:  # of tomllib and msgspec too
        raise RecipeError(str(error)) from error


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
