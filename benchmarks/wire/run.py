"""Our wire beside its peers: both sides of each row alternate, and the ratios are what counts.

Usage: make bench-wire, or PYTHONPATH=benchmarks python -m wire.run [--quick] [--only WORD ...]
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from wire.load import Figures, Job
from wire.report import Pairs, conditions, console, print_report
from wire.rows import CELLS, Goal, goals_of
from wire.sides import PEERS_PYTHON, Client, prepare, running

_TURNS = 2  # of each side in a round: A B A B
_QUICK_S = 0.1
_QUICK_TOKENS = 32


def measure(goals: list[Goal], rounds: int, *, quick: bool) -> list[Pairs]:
    """Let both sides of each goal alternate; the first round warms up and is thrown away."""
    pairs = [Pairs(goal) for goal in goals]
    # Goals with the same load and the same two sides are two views of one measurement.
    together: defaultdict[tuple[str, str, str], list[Pairs]] = defaultdict(list)
    for pair in pairs:
        together[pair.goal.cell, pair.goal.side, pair.goal.against].append(pair)
    sides = {side for goal in goals for side in (goal.side, goal.against)}
    with running(sides) as clients, console.status("") as status:
        for round_ in range(rounds + 1):
            for (cell, side, against), views in together.items():
                status.update(f"round {round_} of {rounds}: {cell}, {side} and {against}")
                job = _job(cell, quick=quick or round_ == 0)
                ours, theirs = alternate(clients[side], clients[against], job)
                for view in views if round_ else ():
                    view.ours.append(ours)
                    view.theirs.append(theirs)
    return pairs


def _job(cell: str, *, quick: bool) -> Job:
    job = CELLS[cell]
    if not quick:
        return job
    return replace(job, seconds=_QUICK_S, tokens=min(job.tokens, _QUICK_TOKENS))


def alternate(ours: Client, theirs: Client, job: Job) -> tuple[Figures, Figures]:
    """Do a job on both sides in turns."""
    turns = [(ours.do(job), theirs.do(job)) for _ in range(_TURNS)]
    return _merged([turn[0] for turn in turns]), _merged([turn[1] for turn in turns])


def _merged(turns: list[Figures]) -> Figures:
    return Figures(
        units=sum(turn.units for turn in turns),
        seconds=sum(turn.seconds for turn in turns),
        p50_us=fmean(turn.p50_us for turn in turns),
        p99_us=max(turn.p99_us for turn in turns),
        cpu_us={role: fmean(turn.cpu_us[role] for turn in turns) for role in turns[0].cpu_us},
    )


def draw(result: Path, picture: Path) -> None:
    """Draw the plot, if the peers' environment can."""
    script = Path(__file__).with_name("plot.py")
    done = subprocess.run([PEERS_PYTHON, script, result, picture], check=False)
    if done.returncode:
        print("no plot was drawn: is matplotlib installed?", file=sys.stderr)


def main() -> None:
    """Measure, print the table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short turns: does it work at all")
    parser.add_argument("--only", nargs="+", default=[], help="cells ('1x16') or sides ('mosec')")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="needs --json")
    args = parser.parse_args()
    if args.plot and not args.json:
        parser.error("--plot draws what --json has written: give both")
    # Ended by `timeout` or `kill`, the servers must be stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    goals = goals_of(args.only)
    if not goals:
        parser.error(f"no row is of {args.only}; there are {', '.join(CELLS)}")
    prepare()
    met = conditions()
    rows = [pair.summary() for pair in measure(goals, args.rounds, quick=args.quick)]
    print_report(rows)
    if args.json:
        result = {"conditions": met, "rounds": args.rounds, "quick": args.quick, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        draw(args.json, args.plot)


if __name__ == "__main__":
    main()
