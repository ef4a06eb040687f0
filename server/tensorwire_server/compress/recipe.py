"""What is to be done to a model. Pure: from flags or TOML to a `Recipe`, or to one sentence.

A recipe travels in the output folder; the same recipe and parent give the same folder again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


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

    @classmethod
    def parse(cls, metric: str, limit: str) -> Floor:
        """Return the floor of `ppl=1.10x` (relative to the parent) or `cosine=0.99`.

        Raises:
            RecipeError: no such metric, or no number.
        """
        known = [choice.value for choice in Metric]
        if metric not in known:
            raise RecipeError(f"there is no floor for {metric!r}; known are {', '.join(known)}")
        text = limit.strip().removesuffix("x")
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 < number < float("inf"):
            raise RecipeError(
                f"the floor {metric}={limit} is no number above 0, or one with an x behind it"
                " (relative to the parent)"
            )
        return cls(metric=Metric(metric), limit=number, relative=limit.strip().endswith("x"))

    def __str__(self) -> str:
        return f"{self.metric}={self.limit:g}{'x' if self.relative else ''}"


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
    num_windows: int = 64  # of the calibration text
    window_tokens: int = 512  # at most; a shorter context holds less
    speed: bool = True  # measure tokens/s through a server

    def __post_init__(self) -> None:
        if not self.prune and self.quantize is None:
            raise RecipeError("nothing to do; give prune (unstructured:0.5) or quantize (int8)")
        if self.num_windows < 1 or self.window_tokens < 8:
            raise RecipeError("num_windows must be at least 1 and window_tokens at least 8")
        kinds = [pruning.structure for pruning in self.prune]
        if len(kinds) != len(set(kinds)):
            raise RecipeError(f"prune {max(kinds, key=kinds.count)} stands there twice")
        if self.calibrate is None and self.needs_text:
            raise RecipeError(
                "this recipe measures what is important on a text; give one with --calibrate FILE"
            )
        if self.floors and self.evaluate is None and self.labels is None:
            raise RecipeError(
                f"the floor {self.floors[0]} is measured on a text; give one with --eval FILE"
            )

    @property
    def needs_text(self) -> bool:
        """Say if a calibration text is needed."""
        gptq = self.quantize is not None and self.quantize.rounding is Rounding.GPTQ
        return gptq or any(pruning.needs_text for pruning in self.prune)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A recipe as it stands in TOML, where all that has a default may be left away."""

    prune: tuple[Pruning, ...] = ()
    quantize: Quantization | None = None
    calibrate: str | None = None
    evaluate: str | None = None
    labels: str | None = None
    floors: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    num_windows: int = 64
    window_tokens: int = 512
    speed: bool = True
