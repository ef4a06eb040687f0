"""What is measured, against whom, and what was promised.

A cell is one kind of load that several sides do; a goal compares two sides of a cell. For a new
row add a cell and its goals here.
"""

from __future__ import annotations

from dataclasses import dataclass

from wire.load import Job

# Ours as a wheel with compiled modules gives it, and as it runs from the sources.
OURS, PURE, LIBRARY = "tensorwire", "tensorwire, not compiled", "protocol library"
GRPC, FASTAPI, MOSEC = "grpc.aio", "fastapi", "mosec"
RAW_C, BARE_GATEWAY, BARE_ECHO = "raw C", "bare socket, same gateway", "bare socket, raw echo"

# As large as fits one frame with its meta.
_TENSOR_BYTES = (1 << 20) - (16 << 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A ratio, `side` to `against`: `hold` is promised, `aim` hoped for; else it is shown."""

    cell: str
    against: str
    side: str = OURS
    metric: str = "rate"  # units/s, more is better; or "p50_us", less is better
    hold: float | None = None
    aim: float | None = None

    @property
    def more_is_better(self) -> bool:
        """Say which way the ratio should go."""
        return self.metric == "rate"

    def is_met(self, ratio: float) -> bool | None:
        """Say if a ratio keeps the promise; None if there is none."""
        if self.hold is None:
            return None
        return ratio >= self.hold if self.more_is_better else ratio <= self.hold

    def is_loss(self, ratio: float) -> bool:
        """Say if the other side is better."""
        return ratio < 1 if self.more_is_better else ratio > 1


CELLS: dict[str, Job] = {
    "1x1": Job(kind="text"),
    "1x16": Job(kind="text", depth=16),
    "1x256": Job(kind="text", depth=256),
    "64x1": Job(kind="text", connections=64),
    "1x16 array": Job(kind="array", depth=16),
    "1 MiB tensor": Job(kind="tensor", size_bytes=_TENSOR_BYTES),
    "64 MiB tensor": Job(kind="tensor", size_bytes=64 << 20, seconds=1.0),
    "64 streams": Job(kind="tokens", depth=64, tokens=128),
    "sync": Job(kind="blocking"),
}

GOALS: tuple[Goal, ...] = (
    Goal(cell="1x1", against=GRPC, hold=2, aim=2.5),
    Goal(cell="1x16", against=GRPC, hold=5, aim=6),
    Goal(cell="1x256", against=GRPC, hold=8, aim=12),
    Goal(cell="64x1", against=GRPC, hold=5, aim=6),
    Goal(cell="1x1", against=FASTAPI, hold=1.8),
    Goal(cell="1x16", against=FASTAPI, hold=3.5),
    Goal(cell="1x256", against=FASTAPI, hold=10),
    Goal(cell="64x1", against=FASTAPI, hold=4),
    Goal(cell="1x1", against=MOSEC, hold=2),
    Goal(cell="1x16", against=MOSEC, hold=4),
    Goal(cell="1x256", against=MOSEC, hold=10),
    Goal(cell="64x1", against=MOSEC, hold=3.5),
    Goal(cell="1x1", against=GRPC, metric="p50_us", hold=0.25),
    Goal(cell="1x1", against=PURE),
    Goal(cell="1x16", against=PURE),
    Goal(cell="1x256", against=PURE),
    Goal(cell="64x1", against=PURE),
    Goal(cell="1x16 array", against=GRPC),
    Goal(cell="1 MiB tensor", against=RAW_C, aim=0.7),
    Goal(cell="1 MiB tensor", against=GRPC, aim=3),
    Goal(cell="64 MiB tensor", against=RAW_C, hold=0.6),
    Goal(cell="64 MiB tensor", against=GRPC, hold=5),
    Goal(cell="64 MiB tensor", side=LIBRARY, against=RAW_C, hold=0.75),
    Goal(cell="64 streams", against=GRPC, hold=15),
    Goal(cell="sync", against=BARE_GATEWAY, metric="p50_us", hold=1.5, aim=1.25),
    Goal(cell="sync", against=BARE_ECHO, metric="p50_us"),
)


def goals_of(only: list[str]) -> list[Goal]:
    """Return the goals whose cell or side is one of the words; all, if there are none."""
    return [
        goal
        for goal in GOALS
        if not only or any(word in (goal.cell, goal.against, goal.side) for word in only)
    ]
