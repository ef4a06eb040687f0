"""What came of one request: times as they were seen, filled in by whoever sends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from tensorwire.loadtest.verifying import NO_FAULTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tensorwire.loadtest.verifying import Faults
    from tensorwire.loadtest.workloads import Ask

OK = "ok"
CANCELLED = "cancelled"  # by us, on purpose


@dataclass(slots=True)
class Outcome:
    """One request; times are monotonic seconds of the machine, the same in all its processes."""

    ask: Ask
    start: float  # of the run
    planned_s: (
        float  # after the start: as planned, to the last bit, whatever the clock's readings are
    )
    sent_at: float = 0.0
    ended_at: float = 0.0
    times: list[float] = field(default_factory=list)  # when each piece came
    counts: list[int] = field(default_factory=list)  # tokens in each piece
    tokens_in: int = 0
    status: str = OK  # or CANCELLED, or the error's code
    message: str = ""
    server_ms: Mapping[str, float] = field(default_factory=dict)  # the server's own breakdown
    faults: Faults = NO_FAULTS
    has_end: bool = True  # a stream's END, an answer or a refusal came: the server's last word

    @property
    def planned_at(self) -> float:
        """When it was due: latency counts from here."""
        return self.start + self.planned_s

    @property
    def tokens_out(self) -> int:
        """Tokens that came."""
        return sum(self.counts)

    @property
    def ttft_s(self) -> float | None:
        """From the planned send to the first piece."""
        return self.times[0] - self.planned_at if self.times else None

    @property
    def latency_s(self) -> float:
        """From the planned send to the end."""
        return self.ended_at - self.planned_at

    def gaps(self) -> list[float]:
        """Return the seconds between each two tokens: 0 between those that came together."""
        times, counts = self.times, self.counts
        gaps = [after - before for before, after in pairwise(times)]
        together = sum(counts) - len(counts)
        return gaps + [0.0] * together if together > 0 else gaps
