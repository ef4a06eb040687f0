"""How long prompts and outputs are. Pure: a source of chance comes in, whole numbers come out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tensorwire_protocol.errors import BadParams

from tensorwire.loadtest.units import parse_count, parse_named, parse_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LOGNORMAL = "lognormal:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Every length from `low` to `high` is as likely; equal ends make it fixed."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise BadParams(f"lengths must rise from at least 1, not {self.low}-{self.high}")

    def draw(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return so many lengths."""
        return random.integers(self.low, self.high, count, endpoint=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogNormal:
    """Most are short, a few are very long, as people's texts are; cut at `most`."""

    median: float
    sigma: float
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.median <= self.most:
            raise BadParams(f"a median must be from 1 to max={self.most}, not {self.median:g}")

    def draw(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return so many lengths."""
        drawn = random.lognormal(math.log(self.median), self.sigma, count)
        return np.clip(np.rint(drawn), 1, self.most).astype(np.int64)


Lengths = Uniform | LogNormal


def parse_lengths(text: str) -> Lengths:
    """Return what `64`, `16-256` or `lognormal:median=64,sigma=0.8,max=1024` means.

    Raises:
        BadParams: it is none of them.
    """
    if text.startswith(_LOGNORMAL):
        named = parse_named(text.removeprefix(_LOGNORMAL), ("median", "sigma", "max"))
        if "median" not in named:
            raise BadParams(f"{text!r} has no median=…")
        median = parse_number(named["median"])
        most = parse_count(named["max"]) if "max" in named else int(16 * median)
        return LogNormal(median=median, sigma=parse_number(named.get("sigma", "1")), most=most)
    low, _, high = text.partition("-")
    return Uniform(low=parse_count(low), high=parse_count(high or low))
