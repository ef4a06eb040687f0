"""Which back end runs an architecture.

`any` runs transformers' own modules and so every architecture that goes through its attention
interface. `fused` knows some families by heart and runs them faster. Where both could, `auto` takes
`fused`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tensorwire_server.engine.errors import ModelLoadError
from tensorwire_server.engine.fused.families import FAMILIES


class Backend(StrEnum):
    """What computes a model's steps."""

    ANY = "any"
    FUSED = "fused"


class Quantization(StrEnum):
    """In which numbers weights are kept: stored so, or rounded to at load."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"  # only stored so


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a model is going to run."""

    backend: Backend
    quantization: Quantization
    rounds_to_int8: bool  # at load, what is stored as numbers
    may_fall_back: bool  # to `any`, where `fused` turns out not to do


def choose(architecture: str, *, asked: str, quantize: str, stored: str = "none") -> Choice:
    """Return what runs an architecture.

    Args:
        architecture: the class that config.json names.
        asked: `auto`, `any` or `fused`.
        quantize: `none` or `int8`.
        stored: how the folder's weights are quantized; `none`, `int8` or `int4`.

    Raises:
        ModelLoadError: what was asked for cannot be had.
    """
    quantization = Quantization(quantize)
    knows = architecture in FAMILIES
    if quantization is not Quantization.NONE and asked == Backend.ANY:
        raise ModelLoadError(f"quantization {quantization} needs the back end fused, not any")
    needed = asked == Backend.FUSED or quantization is not Quantization.NONE
    if needed and not knows:
        what = "the back end fused" if asked == Backend.FUSED else f"quantization {quantization}"
        raise ModelLoadError(
            f"{what} does not know its architecture {architecture}; known are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if stored != "none":
        if quantization not in (Quantization.NONE, stored):
            raise ModelLoadError(
                f"its weights are stored as {stored}; quantizing them again would only lose more,"
                " so leave --quantize away"
            )
        quantization = Quantization(stored)
    backend = Backend.FUSED if knows and asked != Backend.ANY else Backend.ANY
    return Choice(
        backend=backend,
        quantization=quantization,
        rounds_to_int8=quantize == Quantization.INT8,
        may_fall_back=not needed,
    )
