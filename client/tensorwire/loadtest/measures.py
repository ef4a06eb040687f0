"""What a run measured: counts and histograms, by group of requests and by window of time.

A request belongs to the window in which it was *planned*; those planned during the warm-up are
counted as such and measured in nothing. Throughput counts what happened in the measured time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorwire.loadtest.batches import count_batch, count_faults
from tensorwire.loadtest.histograms import Histogram, merged
from tensorwire.loadtest.slo import Slo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from tensorwire.loadtest.outcomes import Outcome
    from tensorwire.loadtest.verifying import Faults

NUM_WINDOWS = 10
# So much is counted at once, in pieces of streams: the loop stands still for under a millisecond.
_BATCH_SIZE = 8192
_OUTCOME_SIZE = 16  # a request without any piece, next to a piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """When a run begins and what of it is measured; monotonic seconds."""

    start: float
    warmup_s: float
    measured_s: float

    @property
    def total_s(self) -> float:
        """Warm-up and measured time together; rounded, since 0.1 and 0.2 are a little over 0.3."""
        return round(self.warmup_s + self.measured_s, 9)

    def is_measured(self, since_start: float) -> bool:
        """Say if a moment, in seconds after the start, lies in the measured time."""
        return self.warmup_s <= since_start < self.total_s

    def are_measured(self, since_start: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Say which moments, in seconds after the start, lie in the measured time."""
        return (self.warmup_s <= since_start) & (since_start < self.total_s)

    def windows(self, since_start: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the window that each measured moment lies in."""
        shares = (since_start - self.warmup_s) / self.measured_s
        return np.minimum((shares * NUM_WINDOWS).astype(np.int64), NUM_WINDOWS - 1)


@dataclass(slots=True)
class Group:
    """What is known of one group of requests."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    windows: dict[str, dict[int, Histogram]] = field(default_factory=dict)  # by metric and window
    seconds: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))

    def record(self, metric: str, window: int, seconds: NDArray[np.float64]) -> None:
        """Count durations."""
        self.windows.setdefault(metric, {}).setdefault(window, Histogram()).record(seconds)

    def whole(self, metric: str) -> Histogram:
        """Return a metric's histogram over all windows."""
        return merged(list(self.windows.get(metric, {}).values()))

    def add(self, other: Group) -> None:
        """Add what another process measured."""
        self.counts += other.counts
        self.errors += other.errors
        for metric, windows in other.windows.items():
            mine = self.windows.setdefault(metric, {})
            for window, histogram in windows.items():
                mine.setdefault(window, Histogram()).add(histogram)
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        return {
            "counts": dict(self.counts),
            "errors": dict(self.errors),
            "windows": {
                metric: {str(window): histogram.encode() for window, histogram in windows.items()}
                for metric, windows in self.windows.items()
            },
            "seconds": {
                name: {str(second): count for second, count in sorted(seconds.items())}
                for name, seconds in self.seconds.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Group:
        """Return what `to_json` wrote."""
        group = cls(counts=Counter(data["counts"]), errors=Counter(data["errors"]))
        for metric, windows in data["windows"].items():
            group.windows[metric] = {int(w): Histogram(encoded) for w, encoded in windows.items()}
        for name, seconds in data["seconds"].items():
            group.seconds[name] = Counter({int(s): count for s, count in seconds.items()})
        return group


class Measures:
    """Takes outcomes, and keeps what is to be known of them."""

    def __init__(self, span: Span, slo: Slo | None = None) -> None:
        self.span = span
        self._groups: dict[str, Group] = defaultdict(Group)
        self._slo = slo or Slo()
        self._waiting: dict[str, list[Outcome]] = defaultdict(list)
        self._num_waiting = 0

    @property
    def groups(self) -> dict[str, Group]:
        """What is known of each group, with all that was taken so far."""
        self._settle()
        return self._groups

    def take(self, outcome: Outcome) -> None:
        """Measure one request that has ended; it must not change any more."""
        self._waiting[outcome.ask.group].append(outcome)
        self._num_waiting += _OUTCOME_SIZE + len(outcome.times)
        if self._num_waiting >= _BATCH_SIZE:
            self._settle()

    def _settle(self) -> None:
        waiting, self._waiting, self._num_waiting = self._waiting, defaultdict(list), 0
        for name, outcomes in waiting.items():
            count_batch(self._groups[name], outcomes, self.span, self._slo)

    def take_unsent(self, group: str, planned_s: float) -> None:
        """Note a request that was due and was not sent, because too many were open."""
        if self.span.is_measured(planned_s):
            self._groups[group].counts.update(("planned", "unsent"))

    def take_faults(self, group: str, faults: Faults) -> None:
        """Count what was found wrong with one stream, once it was measured."""
        count_faults(self._groups[group], faults)

    def add(self, other: Measures) -> None:
        """Add what another process measured."""
        for name, group in other.groups.items():
            self._groups[name].add(group)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        return {name: group.to_json() for name, group in self.groups.items()}

    @classmethod
    def from_json(cls, span: Span, data: Mapping[str, Any]) -> Measures:
        """Return what `to_json` wrote."""
        measures = cls(span)
        for name, group in data.items():
            measures._groups[name] = Group.from_json(group)
        return measures
