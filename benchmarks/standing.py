"""The standing set: `tensorwire bench` on servers of its own, one result a row for the record.

Each row is what one sentence in docs/benchmarking.md claims. A row that was INVALID is written too,
as what it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from serving import serving

RESULTS = Path(__file__).parent / "results"
_INVALID = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run."""

    name: str
    models: tuple[str, ...]
    words: tuple[str, ...]


ROWS = (
    Row(
        name="small-requests",
        models=("echo:",),
        words=("--task", "infer:echo", "--arrivals", "closed:256"),
    ),
    Row(
        name="small-requests-all-on",
        models=("echo:",),
        words=("--task", "infer:echo", "--arrivals", "closed:256", "--verify", "--log", "{log}"),
    ),
    Row(
        name="streams",
        models=("oracle:",),
        words=("--task", "generate:oracle", "--output", "128", "--arrivals", "closed:64"),
    ),
    Row(
        name="streams-all-on",
        models=("oracle:",),
        words=("--task", "generate:oracle", "--output", "128", "--arrivals", "closed:64",
               "--verify", "--log", "{log}"),
    ),
    Row(
        name="programme-20ms",
        models=("oracle:step_ms=20",),
        words=("--task", "generate:oracle", "--output", "8", "--arrivals", "constant:4"),
    ),
    Row(
        name="demo-poisson",
        models=("demo",),
        words=("--task", "generate:demo", "--arrivals", "poisson:2", "--bystander", "0.5"),
    ),
)  # fmt: skip


def main() -> int:
    """Run the rows; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--duration", default="10s")
    given = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    codes = [
        _run(row, given.duration) for row in ROWS if given.only is None or row.name in given.only
    ]
    return 1 if any(code not in (0, _INVALID) for code in codes) else 0


def _run(row: Row, duration: str) -> int:
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    out, log = RESULTS / f"{date}-{row.name}.json", RESULTS / "requests.jsonl"
    words = [word.format(log=log) for word in row.words]
    with serving(*row.models) as served:
        print(f"== {row.name}", flush=True)
        ran = subprocess.run(
            [sys.executable, "-m", "tensorwire", "bench", "--address", served.address, *words,
             "--duration", duration, "--out", str(out)],
            check=False,
        )  # fmt: skip
    log.unlink(missing_ok=True)
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
