"""What the rounds say: ratios against the goals, one table, JSON, and where we lose."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from wire.sides import PEERS_PYTHON

if TYPE_CHECKING:
    from wire.load import Figures
    from wire.rows import Goal

_PEER_PACKAGES = ("grpcio", "fastapi", "uvicorn", "aiohttp", "mosec", "msgpack", "uvloop")
_OUR_PACKAGES = ("numpy", "msgpack", "msgspec", "uvloop")
_VERDICTS = {True: "[green]met", False: "[red]MISSED", None: ""}

_MIN_WIDTH = 120  # where the output is no terminal, rich would squeeze the table into 80 columns

console = Console(width=max(Console().width, _MIN_WIDTH))


@dataclass(slots=True)
class Pairs:
    """The figures of one goal: a pair for each round."""

    goal: Goal
    ours: list[Figures] = field(default_factory=list)
    theirs: list[Figures] = field(default_factory=list)

    def ratios(self) -> list[float]:
        """Return ours / theirs for each round."""
        both = zip(self.ours, self.theirs, strict=True)
        return [self._figure(a) / self._figure(b) for a, b in both]

    def medians(self) -> tuple[float, float]:
        """Return the figure itself, ours and theirs."""
        ours, theirs = (
            statistics.median(map(self._figure, side)) for side in (self.ours, self.theirs)
        )
        return ours, theirs

    def _figure(self, figures: Figures) -> float:
        if self.goal.metric == "rate":
            return figures.units / figures.seconds
        return figures.p50_us

    def summary(self) -> dict[str, Any]:
        """Return the row of the table, as plain data."""
        ratios, (ours, theirs) = self.ratios(), self.medians()
        ratio = statistics.median(ratios)
        return {
            "cell": self.goal.cell,
            "side": self.goal.side,
            "metric": self.goal.metric,
            "against": self.goal.against,
            "ours": ours,
            "theirs": theirs,
            "ratio": ratio,
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "ratios": ratios,
            "more_is_better": self.goal.more_is_better,
            "hold": self.goal.hold,
            "aim": self.goal.aim,
            "met": self.goal.is_met(ratio),
            "loss": self.goal.is_loss(ratio),
            "cpu_us": {self.goal.side: cpu_us(self.ours), self.goal.against: cpu_us(self.theirs)},
            "p99_us": {
                self.goal.side: statistics.median(one.p99_us for one in self.ours),
                self.goal.against: statistics.median(one.p99_us for one in self.theirs),
            },
        }


def cpu_us(rounds: list[Figures]) -> dict[str, float]:
    """Return the median CPU microseconds of a unit, by role."""
    roles = rounds[0].cpu_us
    return {role: statistics.median(one.cpu_us[role] for one in rounds) for role in roles}


def print_report(rows: list[dict[str, Any]]) -> None:
    """Print the table of goals, the CPU of each side, and where we lose."""
    table = Table("load", "figure", "against", "ours", "theirs", "ratio (range)", "goal", "aim", "")
    for row in rows:
        table.add_row(
            row["cell"],
            {"rate": "per s", "p50_us": "p50 us"}[row["metric"]],
            row["against"],
            f"{row['ours']:,.0f}",
            f"{row['theirs']:,.0f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f})",
            _bound(row, "hold"),
            _bound(row, "aim"),
            _VERDICTS[row["met"]],
        )
    console.print(table)
    console.print(_cpu_table(rows))
    lost = [row for row in rows if row["loss"] or row["met"] is False]
    console.print("Where we lose:" if lost else "We lose nowhere in this run.")
    for row in lost:
        what = "worse than theirs" if row["loss"] else "below the goal"
        console.print(
            f"  {row['cell']} against {row['against']} ({row['metric']}):"
            f" {row['ratio']:.2f}, {what}"
        )


def _bound(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return ""
    return f"{'>=' if row['more_is_better'] else '<='} {row[name]:g}"


def _cpu_table(rows: list[dict[str, Any]]) -> Table:
    """Show the CPU of a request or token, once for each cell and side."""
    table = Table("load", "side", "client us", "server us", "", title="CPU for each unit")
    seen = set()
    for row in rows:
        for side, roles in row["cpu_us"].items():
            if not roles or (row["cell"], side) in seen:
                continue
            seen.add((row["cell"], side))
            served = {role: us for role, us in roles.items() if role != "client"}
            detail = ", ".join(f"{role} {us:.1f}" for role, us in served.items())
            table.add_row(
                row["cell"],
                side,
                f"{roles['client']:.1f}",
                f"{sum(served.values()):.1f}",
                detail if len(served) > 1 else "",
            )
    return table


def conditions() -> dict[str, Any]:
    """Return where and with what this was measured."""
    return {
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "load_1min": os.getloadavg()[0],
        },
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _OUR_PACKAGES},
        "peers": _peer_versions(),
        "commit": _git("rev-parse", "HEAD"),
        "is_modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _peer_versions() -> dict[str, str]:
    code = (
        "import sys, json; from importlib.metadata import version;"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    command = [str(PEERS_PYTHON), "-c", code, *_PEER_PACKAGES]
    versions: dict[str, str] = json.loads(subprocess.check_output(command))
    return versions


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
