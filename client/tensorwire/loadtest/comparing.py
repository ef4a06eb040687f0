"""Two results side by side, and which differences are noise. Pure but for reading the files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorwire_protocol.errors import BadParams

from tensorwire.loadtest.sweep import CLOSE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_METRICS = ("ttft", "itl", "e2e")
_RATES = ("requests_per_s", "goodput_per_s", "tokens_out_per_s")
_FORMAT = 1
_PLACES = ("address", "kind", "log")  # of a plan: they say where, not what
# Two counts of arrivals differ by chance by about the root of their sum; twice that is rare.
_SIGMAS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of both results."""

    name: str
    first: float
    second: float
    noise: float | None  # a difference of the ratio's logarithm that chance alone explains
    more_is_better: bool

    @property
    def ratio(self) -> float | None:
        """The second to the first; None where the first is nothing."""
        return self.second / self.first if self.first > 0 else None

    @property
    def ratio_text(self) -> str:
        """The ratio for people."""
        return "-" if self.ratio is None else f"{self.ratio:.3f}"

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `noise`, `equal`, or `unknown`: nothing tells how much is noise."""
        if self.first == self.second:
            return "equal"
        if self.noise is None:
            return "unknown"
        if self.ratio and abs(math.log(self.ratio)) <= self.noise:
            return "noise"
        return "better" if (self.second > self.first) == self.more_is_better else "worse"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        return {**asdict(self), "ratio": self.ratio, "verdict": self.verdict}


def read_result(path: str) -> dict[str, Any]:
    """Return a result that `tensorwire bench --out` wrote.

    Raises:
        BadParams: it is none, or one of another format.
    """
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadParams(f"cannot read {path}: {error}") from error
    if (
        isinstance(result, dict)
        and result.get("format") == _FORMAT
        and {"groups", "plan"} <= result.keys()
    ):
        return result
    raise BadParams(f"{path} is no result of `tensorwire bench` (format {_FORMAT})")


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Row]:
    """Return the numbers that both results have."""
    rows = [*_compare_sweeps(first.get("sweep"), second.get("sweep"))]
    for name in first["groups"]:
        if name in second["groups"]:
            rows += _compare_groups(name, first["groups"][name], second["groups"][name])
    return rows


def differing_plans(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return in words what the two runs were asked to do differently."""
    plans = first["plan"], second["plan"]
    names = [name for name in plans[0] if name not in _PLACES]
    return [
        f"{name}: {plans[0][name]} in A, {plans[1].get(name)} in B"
        for name in names
        if plans[0][name] != plans[1].get(name)
    ]


def _compare_sweeps(
    first: Mapping[str, Any] | None, second: Mapping[str, Any] | None
) -> Iterator[Row]:
    if first is None or second is None:
        return
    rates = [sweep["highest_rate_per_s"] or 0.0 for sweep in (first, second)]
    # Each search stops when what was met and what was missed are so close.
    noise = math.log(CLOSE)
    yield Row(name="highest rate per s", first=rates[0], second=rates[1], noise=noise,
              more_is_better=True)  # fmt: skip


def _compare_groups(
    name: str, first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[Row]:
    for rate in _RATES:
        yield Row(
            name=f"{name} {rate}",
            first=first["rates"][rate],
            second=second["rates"][rate],
            noise=_count_noise(first, second),
            more_is_better=True,
        )
    for metric in _METRICS:
        if metric in first["metrics"] and metric in second["metrics"]:
            yield from _compare_metric(
                f"{name} {metric}", first["metrics"][metric], second["metrics"][metric]
            )


def _compare_metric(
    name: str, first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[Row]:
    for percentile, value in first["percentiles_ms"].items():
        other = second["percentiles_ms"].get(percentile)
        if value is None or other is None:
            continue
        halves = [_half_width(metric["intervals_ms"][percentile]) for metric in (first, second)]
        noise = None if None in halves else math.hypot(*(half or 0.0 for half in halves))
        yield Row(
            name=f"{name} {percentile} ms",
            first=value,
            second=other,
            noise=noise,
            more_is_better=False,
        )


def _half_width(interval: list[float] | None) -> float | None:
    """Return half of an interval, as a difference of logarithms."""
    if interval is None or interval[0] <= 0:
        return None
    return math.log(interval[1] / interval[0]) / 2


def _count_noise(first: Mapping[str, Any], second: Mapping[str, Any]) -> float | None:
    counts = [group["counts"].get("ok_in_time", 0) for group in (first, second)]
    if not all(counts):
        return None
    return _SIGMAS * math.sqrt(sum(1 / count for count in counts))
