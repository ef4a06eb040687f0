"""The standing set: `tensorwire bench` on servers of its own, one result a row for the record.

A row that was INVALID is written too, as what it is. Each result also says under `server` how much
processor time each of the server's processes used for a request, and how many cores that were at
the measured rate: what is missing to 1 is what it had left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from serving import serving

RESULTS = Path(__file__).parent.resolve() / "results"
LOG = "requests.jsonl"
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
        words=("--task", "infer:echo", "--arrivals", "closed:256", "--verify", "--log", LOG),
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
               "--verify", "--log", LOG),
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
    out = f"{date}-{row.name}.json"
    with serving(*row.models) as served:
        print(f"== {row.name}", flush=True)
        before = _cpu_s(served.pid)
        ran = subprocess.run(
            [sys.executable, "-m", "tensorwire", "bench", "--address", served.address, *row.words,
             "--duration", duration, "--out", out],
            cwd=RESULTS,  # a result names the files of its run: as they are called here
            check=False,
        )  # fmt: skip
        used = {name: cpu_s - before[name] for name, cpu_s in _cpu_s(served.pid).items()}
    _note_server(RESULTS / out, used)
    (RESULTS / LOG).unlink(missing_ok=True)
    return ran.returncode


def _cpu_s(gateway: int) -> dict[str, float]:
    """Return the seconds of processor time of the gateway, and of each of its workers."""
    children = Path(f"/proc/{gateway}/task/{gateway}/children").read_text().split()
    names = {"gateway": gateway} | {f"worker {i}": int(pid) for i, pid in enumerate(children)}
    return {name: _cpu_s_of(pid) for name, pid in names.items()}


def _cpu_s_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _note_server(path: Path, used_s: dict[str, float]) -> None:
    if not path.exists():
        return
    result = json.loads(path.read_text())
    counts = [group["seconds"].get("ended", {}) for group in result["groups"].values()]
    num_ended = sum(sum(seconds.values()) for seconds in counts)
    if not num_ended:
        return
    per_s = sum(group["rates"]["requests_per_s"] for group in result["groups"].values())
    result["server"] = {
        name: {
            "us_per_request": round(cpu_s / num_ended * 1e6, 1),
            "cores": round(cpu_s / num_ended * per_s, 3),
        }
        for name, cpu_s in used_s.items()
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, used in result["server"].items():
        print(f"{name}: {used['us_per_request']} us per request, {used['cores']:.0%} of a core")


if __name__ == "__main__":
    sys.exit(main())
