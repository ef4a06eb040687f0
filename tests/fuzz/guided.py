"""The same inputs under atheris (libFuzzer), which keeps those that reach new code.

A process of its own, started by `python -m fuzz`: libFuzzer ends its process when it is done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["tensorwire_protocol"]):
    from .cases import Case
    from .conversations import converse
    from .mutations import mutate
    from .running import Runner
    from .tally import Tally

_FRESH, _BLIND = 0.2, 0.05  # of the inputs: a new conversation; libFuzzer's own changes
_NUM_SEEDS = 200
_MAX_BYTES = 64 * 1024


def change(data: bytes, max_size: int, seed: int) -> bytes:
    """Return another input: libFuzzer's hook."""
    rng = Random(seed)
    chance = rng.random()
    if chance < _BLIND:
        blind: bytes = atheris.Mutate(data, max_size)
        return blind
    case = converse(rng) if chance < _BLIND + _FRESH else Case.from_bytes(data)
    mutate(case, rng)
    changed = case.to_bytes()
    return changed if len(changed) <= max_size else data[:max_size]


def main() -> None:
    """Fuzz for so many seconds: `guided SECONDS SEED FINDINGS CORPUS RESULT`."""
    seconds, seed, findings, corpus, result = sys.argv[1:]
    tally = Tally()
    runner = Runner(tally, Path(findings))
    rng = Random(int(seed))
    for i in range(_NUM_SEEDS):
        (Path(corpus) / f"seed{i}").write_bytes(converse(rng).to_bytes())

    def one_input(data: bytes) -> None:
        runner.run(Case.from_bytes(data))
        if tally.executions % 256 == 0:
            _write(result, tally, runner)

    options = [f"-max_total_time={float(seconds):.0f}", f"-seed={seed}", f"-max_len={_MAX_BYTES}"]
    arguments = [sys.argv[0], corpus, *options, "-verbosity=0", "-print_final_stats=0"]
    atheris.Setup(arguments, one_input, custom_mutator=change)
    atheris.Fuzz()


def _write(path: str, tally: Tally, runner: Runner) -> None:
    Path(path).write_text(json.dumps({"tally": tally.to_json(), "findings": runner.findings}))


if __name__ == "__main__":
    main()
