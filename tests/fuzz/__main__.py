"""Fuzz the protocol: `make fuzz MINUTES=10`, or `make fuzz FUZZ_ARGS='--reproduce FILE'`.

Half of the time goes to mutations of valid conversations, half to the same under atheris, which
keeps what reached new code; without atheris all goes to the first. What atheris kept runs here
once more, so that `coverage run` around this process sees what it reached.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from .cases import Case
from .conversations import converse
from .mutations import clone, mutate
from .running import Runner
from .tally import Tally
from .targets import check_case
from .trial import Trial, check_cuts, check_memory

_FOLDER = Path(".cache/fuzz/findings")
_UNTOUCHED = 0.03  # of the inputs: valid conversations must stay so
_CHILDREN = 12  # mutations of one conversation


def mutation_loop(runner: Runner, rng: Random, until: float) -> None:
    """Run mutated conversations until a moment of the monotonic clock."""
    while time.monotonic() < until:
        run_family(runner, rng)


def run_family(runner: Runner, rng: Random) -> None:
    """Run one conversation's mutations."""
    parent = converse(rng)
    for _ in range(_CHILDREN):
        child = clone(parent)
        if rng.random() > _UNTOUCHED:
            mutate(child, rng)
        runner.run(child)


def run_guided(
    seconds: float, seed: int, folder: Path, corpus: Path
) -> tuple[Tally, dict[str, str]]:
    """Let atheris fuzz in a process of its own; return what it reached and found."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [sys.executable, "-m", "fuzz.guided", str(seconds), str(seed), str(folder)]
        subprocess.run([*command, str(corpus), result.name], check=True)
        data = json.loads(Path(result.name).read_text())
    return Tally.from_json(data["tally"]), data["findings"]


def reproduce(path: Path) -> None:
    """Run a kept case; what it breaks comes out as an exception."""
    case = Case.from_bytes(path.read_bytes())
    print(f"{case.role.value}, login {case.login}, codec {case.codec}", end="")
    print(f", features {case.has_features}, tight limits {case.is_tight}")
    for step in case.steps:
        print(f"  {step.what.name:6} {step.data.hex()}")
    Trial(case, Tally()).run()
    check_case(case)
    check_cuts(case)
    check_memory(case)
    print("nothing is wrong")


def main() -> None:
    """Fuzz for a while and say what was reached."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Fuzz the protocol package.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="the same inputs again, of the first half")
    parser.add_argument("--findings", type=Path, default=_FOLDER)
    parser.add_argument("--reproduce", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.reproduce:
        reproduce(args.reproduce)
        return
    seed = Random().getrandbits(32) if args.seed is None else args.seed
    is_guided = importlib.util.find_spec("atheris") is not None
    seconds = args.minutes * 60 / (1 + is_guided)
    tally, rng = Tally(), Random(seed)
    runner = Runner(tally, args.findings)
    mutation_loop(runner, rng, time.monotonic() + seconds)
    findings = runner.findings
    by = Counter({"mutation": tally.executions})
    if is_guided:
        with tempfile.TemporaryDirectory() as corpus:
            guided, found = run_guided(seconds, seed, args.findings, Path(corpus))
            by["atheris"] = guided.executions
            tally.add(guided)
            findings |= found
            replayed = Runner(Tally(), None)
            for path in Path(corpus).iterdir():
                replayed.run(Case.from_bytes(path.read_bytes()))
    print(f"seed                {seed}")
    print("fuzzers             " + ", ".join(f"{name} {n}" for name, n in by.items()))
    if not is_guided:
        print("                    atheris is not installed: mutations alone")
    print(tally.report())
    print(f"findings            {len(findings)}")
    for where, what in findings.items():
        print(f"  {where}: {what}")
    sys.exit(1 if findings or tally.not_reached() else 0)


if __name__ == "__main__":
    main()
