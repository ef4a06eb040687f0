"""Service level objectives: what a run, and each of its requests, must keep."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorwire_protocol.errors import BadParams

from tensorwire.loadtest.outcomes import OK
from tensorwire.loadtest.units import parse_seconds, parse_share

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorwire.loadtest.outcomes import Outcome

_BOUND = re.compile(r"(ttft|itl|e2e)_p([0-9]+(?:\.[0-9]+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """So many percent of a metric's values are at most so long."""

    metric: str  # ttft, itl or e2e
    percent: float
    most_s: float

    def __str__(self) -> str:
        return f"{self.metric}_p{self.percent:g}={self.most_s * 1000:g}ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Bounds, and the share of requests that may fail."""

    bounds: tuple[Bound, ...] = ()
    errors: float = 0.01

    def is_good(self, outcome: Outcome) -> bool:
        """Say if one request kept every bound: it counts for the goodput."""
        return outcome.status == OK and all(_keeps(outcome, bound) for bound in self.bounds)

    def broken(self, found_s: Mapping[Bound, float | None], errors: float) -> list[str]:
        """Return in words what a run broke, from its percentiles and its share of errors."""
        words = [f"{errors:.2%} errors, at most {self.errors:.2%}"] if errors > self.errors else []
        for bound in self.bounds:
            value = found_s[bound]
            if value is None:
                words.append(f"{bound}: nothing was measured")
            elif value > bound.most_s:
                words.append(f"{bound}: was {value * 1000:.4g}ms")
        return words


def _keeps(outcome: Outcome, bound: Bound) -> bool:
    if bound.metric == "e2e":
        return outcome.latency_s <= bound.most_s
    if bound.metric == "ttft":
        first_s = outcome.ttft_s
        return first_s is None or first_s <= bound.most_s
    gaps = outcome.gaps()
    num_long = sum(gap > bound.most_s for gap in gaps)
    return num_long <= math.floor(len(gaps) * (1 - bound.percent / 100) + 1e-9)


def parse_slo(text: str) -> Slo:
    """Return what `ttft_p99=500ms,itl_p99=50ms,errors=1%` means.

    Raises:
        BadParams: it is no such list.
    """
    bounds: list[Bound] = []
    errors = Slo().errors
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name == "errors":
            errors = parse_share(value)
            continue
        found = _BOUND.fullmatch(name)
        if found is None or not 0 < float(found[2]) < 100:
            raise BadParams(
                f"{part!r} is no objective: write ttft_p99=500ms, itl_, e2e_ or errors="
            )
        bound = Bound(metric=found[1], percent=float(found[2]), most_s=parse_seconds(value))
        bounds.append(bound)
    return Slo(bounds=tuple(bounds), errors=errors)
