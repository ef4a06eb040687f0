"""Tokens/s through the whole server beside transformers `generate`; sides alternate in one run.

Usage: make bench-engine, or PYTHONPATH=benchmarks python -m engine.run [--models m1] [--bare]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.goals import GOALS
from engine.models import SHAPES, model_folder
from engine.report import Row, print_rows
from engine.sides import Served, bare_side, transformers_side
from serving import serving
from tensorwire import Client

if TYPE_CHECKING:
    from engine.sides import Side

PROMPT_TOKENS, NEW_TOKENS = 128, 128
STREAMS = (1, 8, 32)
_ROUNDS = 3
_LEAST_ROUNDS = 2
# Ids that every model and the demo's tokenizer know; none of them is special.
_IDS = range(300, 2000)


def measure(
    model: str, quantizations: list[str], streams: list[int], args: argparse.Namespace
) -> list[Row]:
    """Let all sides of a model alternate; the first round warms up."""
    folder = model_folder(model)
    rng = random.Random(1)
    rows = []
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {"transformers": transformers_side(folder)}
        threads = f"workers.threads={args.threads}"
        words = [f"--model={name}={folder}" for name in quantizations]
        settings = [f"--set=models.{name}.quantize={name}" for name in quantizations]
        served = stack.enter_context(serving(*words, *settings, f"--set={threads}"))
        client = stack.enter_context(Client(served.address))
        sides |= {name: Served(client, name) for name in quantizations}
        if args.bare:
            sides |= {f"bare {name}": bare_side(folder, "auto", name) for name in quantizations}
        for side in sides.values():
            if hasattr(side, "close"):
                stack.callback(side.close)
        for size in streams:
            figures = _alternate(sides, size, rng, args)
            for name in quantizations:
                goal = GOALS.get((model, name, size))
                row = Row(f"{model} {name}", size, figures[name], figures["transformers"], goal)
                rows.append(row)
                print_rows([row], titles=False)
                if args.bare:
                    rows.append(_beside_bare(model, name, size, figures, sides))
                    print_rows(rows[-1:], titles=False)
    return rows


def _beside_bare(
    model: str, name: str, size: int, figures: dict[str, list[float]], sides: dict[str, Any]
) -> Row:
    us_per_step = sides[f"bare {name}"].said["us_per_step"]
    goal = GOALS.get((model, f"bare {name}", size))
    bare = figures[f"bare {name}"]
    return Row(f"{model} {name}, server / engine", size, figures[name], bare, goal, us_per_step)


def _alternate(
    sides: dict[str, Side], size: int, rng: random.Random, args: argparse.Namespace
) -> dict[str, list[float]]:
    def prompts() -> list[list[int]]:
        """Return ones that no round had before, else ours would find them in its prefix cache."""
        return [rng.choices(_IDS, k=PROMPT_TOKENS) for _ in range(size)]

    figures: dict[str, list[float]] = {name: [] for name in sides}
    new_tokens = 16 if args.quick else NEW_TOKENS
    warming = prompts()
    for side in sides.values():
        side.tokens_per_s(warming, new_tokens)
    began = time.monotonic()
    for round_ in range(args.rounds):
        if round_ >= _LEAST_ROUNDS and time.monotonic() - began > args.seconds_per_row:
            break
        asked = prompts()
        for name, side in sides.items():
            figures[name].append(side.tokens_per_s(asked, new_tokens))
    return figures


def main() -> None:
    """Measure, print a table, say where we lose, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES], default=["m1", "m2", "m3"])
    parser.add_argument("--quantize", nargs="+", choices=["none", "int8"])
    parser.add_argument("--streams", nargs="+", type=int, default=list(STREAMS))
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--seconds-per-row", type=float, default=90.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--bare", action="store_true", help="also the engine without the server")
    parser.add_argument("--quick", action="store_true", help="16 new tokens: does it work at all?")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
    rows = []
    for model in args.models:
        # M1 is all overhead: 8 bits are no aim there.
        quantizations = args.quantize or (["none"] if model == "m1" else ["none", "int8"])
        rows += measure(model, quantizations, args.streams, args)
    print_rows(rows)
    if args.json:
        args.json.write_text(json.dumps([row.summary() for row in rows], indent=1))


if __name__ == "__main__":
    main()
