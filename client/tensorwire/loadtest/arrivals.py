"""When requests are sent. Pure: a seed comes in, planned times come out.

Closed: N users, each sends its next request when the last one was answered. A slow server is then
asked less, so a closed loop hides how it would fare with visitors who do not wait for each other.
Open: requests are due at times that were planned beforehand, whatever the server does.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tensorwire_protocol.errors import BadParams

from tensorwire.loadtest.units import parse_count, parse_named, parse_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

_BLOCK = 1024  # gaps drawn together, for what two cost that are drawn alone
_BURSTS_CV = "4"
_HOW = "closed:USERS, constant:RATE, poisson:RATE, bursts:RATE[,cv=4] or ramp:FROM-TO"


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """So many users, each waiting for its answer."""

    users: int

    def __post_init__(self) -> None:
        if self.users < 1:
            raise BadParams(f"a closed loop needs at least 1 user, not {self.users}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """Independent gaps of one distribution: `cv` 0 is a metronome, 1 is Poisson, more is bursts.

    With a coefficient of variation other than 0 and 1 the gaps have a gamma distribution.
    """

    rate_per_s: float
    cv: float

    def __post_init__(self) -> None:
        if not self.rate_per_s > 0:
            raise BadParams(f"a rate must be above 0 per second, not {self.rate_per_s:g}")

    def offsets(self, seed: int, duration_s: float) -> Iterator[float]:
        """Yield the planned times, in seconds from the start, before `duration_s`."""
        times: Iterator[float]
        if self.cv == 0:
            times = (i / self.rate_per_s for i in itertools.count())
        else:
            times = itertools.accumulate(self._gaps(np.random.default_rng((seed, 1))))
        return itertools.takewhile(lambda time: time < duration_s, times)

    def _gaps(self, random: np.random.Generator) -> Iterator[float]:
        shape = 1 / self.cv**2
        while True:
            block: NDArray[np.float64] = random.gamma(shape, 1 / (shape * self.rate_per_s), _BLOCK)
            yield from block.tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp:
    """Poisson arrivals whose rate grows (or falls) evenly over the whole run."""

    from_per_s: float
    to_per_s: float

    def __post_init__(self) -> None:
        if not self.from_per_s + self.to_per_s > 0:
            raise BadParams("a ramp must have a rate above 0 at one of its ends")

    @property
    def rate_per_s(self) -> float:
        """The mean rate."""
        return (self.from_per_s + self.to_per_s) / 2

    def offsets(self, seed: int, duration_s: float) -> Iterator[float]:
        """Yield the planned times, in seconds from the start, before `duration_s`."""
        random = np.random.default_rng((seed, 1))
        total = self.rate_per_s * duration_s
        slope = (self.to_per_s - self.from_per_s) / duration_s
        due = 0.0  # of the arrivals that the rate promises; the time is where it promises so many
        while True:
            for gap in random.exponential(1.0, _BLOCK).tolist():
                due += gap
                if due >= total:
                    return
                root = math.sqrt(max(self.from_per_s**2 + 2 * slope * due, 0.0))
                yield 2 * due / (self.from_per_s + root)


Open = Steady | Ramp
Arrivals = Closed | Open


def _bursts(rest: str) -> Arrivals:
    rate, _, options = rest.partition(",")
    cv = parse_named(options, ("cv",)).get("cv", _BURSTS_CV)
    return Steady(rate_per_s=parse_number(rate), cv=parse_number(cv))


def _ramp(rest: str) -> Arrivals:
    low, _, high = rest.partition("-")
    return Ramp(from_per_s=parse_number(low), to_per_s=parse_number(high))


_KINDS: dict[str, Callable[[str], Arrivals]] = {
    "closed": lambda rest: Closed(users=parse_count(rest)),
    "constant": lambda rest: Steady(rate_per_s=parse_number(rest), cv=0),
    "poisson": lambda rest: Steady(rate_per_s=parse_number(rest), cv=1),
    "bursts": _bursts,
    "ramp": _ramp,
}


def parse_arrivals(text: str) -> Arrivals:
    """Return what `poisson:50` and its like mean.

    Raises:
        BadParams: it is none of them.
    """
    kind, _, rest = text.partition(":")
    if kind not in _KINDS or not rest:
        raise BadParams(f"{text!r} says no arrivals: write {_HOW}")
    return _KINDS[kind](rest)
