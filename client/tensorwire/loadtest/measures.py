"""What a run measured: counts and histograms, by group of requests and by window of time.

A request belongs to the window in which it was *planned*; those planned during the warm-up are
counted as such and measured in nothing. Throughput counts what happened in the measured time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensorwire.loadtest.histograms import Histogram, merged
from tensorwire.loadtest.outcomes import CANCELLED, OK
from tensorwire.loadtest.slo import Slo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorwire.loadtest.outcomes import Outcome

CLIENT_METRICS = ("ttft", "itl", "e2e")
NUM_WINDOWS = 10
_FLUSH_AT = 65_536  # values waiting: a histogram takes many at once for what few cost
FAULTS = ("lost", "repeated", "swapped", "foreign", "caught")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """When a run begins and what of it is measured; monotonic seconds."""

    start: float
    warmup_s: float
    measured_s: float

    @property
    def total_s(self) -> float:
        """Warm-up and measured time together."""
        return self.warmup_s + self.measured_s

    def is_measured(self, moment: float) -> bool:
        """Say if a moment lies in the measured time."""
        return self.warmup_s <= moment - self.start < self.total_s

    def window(self, moment: float) -> int:
        """Return the window that a measured moment lies in."""
        since = moment - self.start - self.warmup_s
        return min(int(since / self.measured_s * NUM_WINDOWS), NUM_WINDOWS - 1)


@dataclass(slots=True)
class Group:
    """What is known of one group of requests."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    windows: dict[str, dict[int, Histogram]] = field(default_factory=dict)  # by metric and window
    seconds: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    _waiting: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def take(self, metric: str, window: int, values: list[float]) -> None:
        """Keep durations in seconds."""
        waiting = self._waiting[metric, window]
        waiting += values
        if len(waiting) >= _FLUSH_AT:
            self._flush_one(metric, window)

    def _flush_one(self, metric: str, window: int) -> None:
        values = self._waiting.pop((metric, window))
        by_window = self.windows.setdefault(metric, {})
        by_window.setdefault(window, Histogram()).record(values)

    def flush(self) -> None:
        """Count what still waits."""
        for metric, window in tuple(self._waiting):
            self._flush_one(metric, window)

    def whole(self, metric: str) -> Histogram:
        """Return a metric's histogram over all windows."""
        self.flush()
        return merged(list(self.windows.get(metric, {}).values()))

    def add(self, other: Group) -> None:
        """Add what another process measured."""
        self.flush()
        other.flush()
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
        self.flush()
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
        self.groups: dict[str, Group] = defaultdict(Group)
        self._slo = slo or Slo()

    def take(self, outcome: Outcome) -> None:
        """Measure one request that has ended."""
        group = self.groups[outcome.ask.group]
        self._note_seconds(group, outcome)
        if not self.span.is_measured(outcome.planned_at):
            group.counts["warmup"] += 1
            return
        _count(group, outcome)
        if outcome.status == OK:
            group.counts["good"] += self._slo.is_good(outcome)
            self._measure(group, outcome)

    def take_unsent(self, group: str, moment: float) -> None:
        """Note a request that was due and was not sent, because too many were open."""
        if self.span.is_measured(moment):
            self.groups[group].counts.update(("planned", "unsent"))

    def _measure(self, group: Group, outcome: Outcome) -> None:
        window = self.span.window(outcome.planned_at)
        group.take("lag", window, [outcome.sent_at - outcome.planned_at])
        group.take("e2e", window, [outcome.latency_s])
        if outcome.times:
            group.take("ttft", window, [outcome.times[0] - outcome.planned_at])
            group.take("itl", window, outcome.gaps())
        for name, value in outcome.server_ms.items():
            group.take(f"server.{name.removesuffix('_ms')}", window, [value / 1000])

    def _note_seconds(self, group: Group, outcome: Outcome) -> None:
        start, seconds = self.span.start, group.seconds
        ended = int(outcome.ended_at - start)
        seconds["planned"][int(outcome.planned_at - start)] += 1
        seconds["ended"][ended] += 1
        if outcome.status not in (OK, CANCELLED):
            seconds["failed"][ended] += 1
        if self.span.is_measured(outcome.ended_at):
            group.counts["ended_in_time"] += 1
            group.counts["ok_in_time"] += outcome.status == OK
            group.counts["tokens_in_in_time"] += outcome.tokens_in
        tokens, measured = seconds["tokens"], 0
        first, last = start + self.span.warmup_s, start + self.span.total_s
        for moment, count in zip(outcome.times, outcome.counts, strict=True):
            tokens[int(moment - start)] += count
            if first <= moment < last:
                measured += count
        group.counts["tokens_out_in_time"] += measured

    def add(self, other: Measures) -> None:
        """Add what another process measured."""
        for name, group in other.groups.items():
            self.groups[name].add(group)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        return {name: group.to_json() for name, group in self.groups.items()}

    @classmethod
    def from_json(cls, span: Span, data: Mapping[str, Any]) -> Measures:
        """Return what `to_json` wrote."""
        measures = cls(span)
        for name, group in data.items():
            measures.groups[name] = Group.from_json(group)
        return measures


def _count(group: Group, outcome: Outcome) -> None:
    counts, faults = group.counts, outcome.faults
    counts["planned"] += 1
    counts["tokens_in"] += outcome.tokens_in
    counts["tokens_out"] += outcome.tokens_out
    if outcome.status == OK:
        counts["ok"] += 1
    elif outcome.status == CANCELLED:
        counts["cancelled"] += 1
    else:
        counts["failed"] += 1
        group.errors[outcome.status] += 1
    counts["without_end"] += not outcome.has_end
    if faults.total:
        counts["wrong_streams"] += 1
        for name in FAULTS:
            counts[name] += getattr(faults, name)
