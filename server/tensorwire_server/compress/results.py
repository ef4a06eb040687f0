"""What pruning and quantizing did, for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorwire_server.engine.quantized import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedParameter:
    """One parameter that pruning looked at."""

    name: str  # in the model that this pruning got: after layers went, by their new numbers
    before: tuple[int, ...]  # its shape
    after: tuple[int, ...]  # its first dimension is 0 where all of it went
    zeros: int  # in what is left


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """How far a linear layer's outputs are from what it gave before it was changed.

    Both see the calibration text as the compressed model before them passes it on.
    """

    name: str
    error: float  # ||Wx - W'x|| / ||Wx||


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What a pruning achieved, and over exactly which parameters."""

    structure: str
    target: float
    achieved: float  # zeros of all weights, or removed of all heads, neurons or layers
    met: bool
    parameters: tuple[PrunedParameter, ...]
    errors: tuple[LayerError, ...] = ()  # none without a text, or where layers went
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What quantizing made of the linear layers, by their names."""

    weights: dict[str, QuantizedWeight]
    errors: tuple[LayerError, ...] = ()  # none without a text
