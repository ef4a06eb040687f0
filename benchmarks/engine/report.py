"""One table, the rows where we lose, and plain data."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

_MIN_WIDTH = 120  # where the output is no terminal, rich would squeeze the table into 80 columns

console = Console(width=max(Console().width, _MIN_WIDTH))


@dataclass(frozen=True, slots=True)
class Row:
    """Two sides at one number of streams; figures are tokens/s by round."""

    name: str
    streams: int
    ours: list[float]
    theirs: list[float]
    goal: float | None
    us_per_step: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return the row as plain data."""
        ratios = [a / b for a, b in zip(self.ours, self.theirs, strict=True)]
        ratio = statistics.median(ratios)
        return {
            "name": self.name,
            "streams": self.streams,
            "ours": statistics.median(self.ours),
            "theirs": statistics.median(self.theirs),
            "ratio": ratio,
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "goal": self.goal,
            "met": None if self.goal is None else ratio >= self.goal,
            "us_per_step": self.us_per_step,
        }


def print_rows(rows: list[Row], *, titles: bool = True) -> None:
    """Print a table; with titles also what falls short."""
    table = Table("what", "streams", "ours tok/s", "theirs", "ratio (range)", "goal", "us per step")
    table.show_header = titles
    said = [row.summary() for row in rows]
    for row in said:
        steps = " ".join(f"{name} {us:.0f}" for name, us in row["us_per_step"].items())
        verdict = {True: " [green]met", False: " [red]MISSED", None: ""}[row["met"]]
        table.add_row(
            row["name"],
            str(row["streams"]),
            f"{row['ours']:.1f}",
            f"{row['theirs']:.1f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f})",
            "" if row["goal"] is None else f"{row['goal']:.2f}{verdict}",
            steps,
        )
    console.print(table)
    if titles:
        slower = [f"{r['name']} at {r['streams']}" for r in said if r["ratio"] < 1]
        console.print("slower than the other side:", "; ".join(slower) or "nowhere")
