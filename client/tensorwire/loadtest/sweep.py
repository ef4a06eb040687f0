"""The search for the highest rate that still meets an objective. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import BadParams

from tensorwire.loadtest.units import parse_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CLOSE = 1.05  # rates that near are not told apart
_STEP = 2.0


@dataclass(slots=True, kw_only=True)
class RateSearch:
    """Doubles the rate until the objective is missed, then halves the distance (in ratios)."""

    low_per_s: float
    high_per_s: float
    best_per_s: float | None = field(init=False, default=None)  # met
    _missed_per_s: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not 0 < self.low_per_s <= self.high_per_s:
            raise BadParams(
                "a sweep goes from a rate above 0 upwards, "
                f"not {self.low_per_s:g}-{self.high_per_s:g}"
            )

    def next_rate(self) -> float | None:
        """Return the rate to try next; None: it is found."""
        best, missed = self.best_per_s, self._missed_per_s
        if best is None:
            return self.low_per_s if missed is None else None
        if missed is None:
            return None if best >= self.high_per_s else min(best * _STEP, self.high_per_s)
        return None if missed / best <= CLOSE else float((missed * best) ** 0.5)

    def tell(self, rate_per_s: float, *, is_met: bool) -> None:
        """Note how a rate did."""
        if is_met:
            self.best_per_s = max(rate_per_s, self.best_per_s or 0.0)
        else:
            self._missed_per_s = min(rate_per_s, self._missed_per_s or rate_per_s)


def parse_sweep(text: str) -> RateSearch:
    """Return the search that `10-400` means.

    Raises:
        BadParams: it means none.
    """
    low, _, high = text.partition("-")
    return RateSearch(low_per_s=parse_number(low), high_per_s=parse_number(high))


def point(rate_per_s: float, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a sweep keeps of one of its runs."""
    load = result["groups"].get("load", {"rates": {}, "metrics": {}})
    return {
        "rate_per_s": rate_per_s,
        "met": result["slo"]["met"],
        "valid": result["valid"],
        "broken": result["slo"]["broken"],
        "goodput_per_s": load["rates"].get("goodput_per_s", 0.0),
        "percentiles_ms": {
            metric: load["metrics"][metric]["percentiles_ms"]
            for metric in ("ttft", "itl", "e2e")
            if metric in load["metrics"]
        },
    }


def summarize(
    search: RateSearch, points: Sequence[Mapping[str, Any]], best: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a sweep as a result: its best run, with every point and the rate that was found.

    A rate at which the load tester was the limit counts as missed, and makes the whole sweep
    invalid: the limit that was found may be ours.
    """
    invalid = [point for point in points if not point["valid"]]
    return {
        **best,
        "valid": not invalid,
        "reasons": [
            f"at {point['rate_per_s']:.6g}/s the load tester was the limit" for point in invalid
        ],
        "slo": {**best["slo"], "met": search.best_per_s is not None},
        "sweep": {"highest_rate_per_s": search.best_per_s, "points": list(points)},
    }
