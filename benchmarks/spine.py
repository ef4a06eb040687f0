"""The spine's figures: tokens/s beside transformers `generate`, start time, memory.

Usage: python benchmarks/spine.py [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tensorwire_server
from rich.console import Console
from rich.table import Table
from serving import serving
from tensorwire import Client

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 32
NEW_TOKENS = 128
MODEL = Path(tensorwire_server.__file__).parent / "models" / "builtin" / "demo"
REFERENCE = Path(__file__).with_name("reference.py")
# What a worker has to do before it may say ready, and nothing else.
BARE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.inference_mode():
    model(torch.tensor([[1, 2, 3]]))
"""

console = Console()


class Reference:
    """transformers `generate` in a process of its own, with all cores, as the server's worker."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(REFERENCE), str(MODEL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def tokens_per_s(self, prompts: list[list[int]]) -> float:
        """Continue all prompts in one padded batch."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new": NEW_TOKENS}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return float(answer["tokens"] / answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def ours_tokens_per_s(client: Client, prompts: list[list[int]]) -> float:
    """Continue all prompts at once through the server."""
    began = time.perf_counter()
    made = client.generate("demo", prompts, max_new_tokens=NEW_TOKENS, temperature=0.0)
    seconds = time.perf_counter() - began
    return sum(len(generation.token_ids) for generation in made) / seconds


def measure_tokens(rounds: int) -> list[dict[str, Any]]:
    """Alternate both sides for each batch size."""
    rows = []
    reference = Reference()
    with serving("demo") as served, Client(served.address) as client:
        text = (MODEL / "README.md").read_text() * 4
        ids = client.tokenize("demo", text)
        prompts = [ids[i * 7 : i * 7 + PROMPT_TOKENS] for i in range(max(BATCHES))]
        for size in BATCHES:
            sides: tuple[list[float], list[float]] = ([], [])
            for round_ in range(rounds + 1):
                both = (
                    ours_tokens_per_s(client, prompts[:size]),
                    reference.tokens_per_s(prompts[:size]),
                )
                if round_:  # the first is the warm-up
                    for side, figure in zip(sides, both, strict=True):
                        side.append(figure)
            ratios = [ours / theirs for ours, theirs in zip(*sides, strict=True)]
            rows.append(
                {
                    "streams": size,
                    "ours": statistics.median(sides[0]),
                    "transformers": statistics.median(sides[1]),
                    "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                }
            )
    reference.close()
    return rows


def measure_start(rounds: int) -> dict[str, Any]:
    """Alternate the server's start with the bare script's whole run."""
    ours, bare = [], []
    for _ in range(rounds):
        with serving("demo") as served:
            ours.append(served.ready_after_s)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", BARE, str(MODEL)], check=True)
        bare.append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    return {
        "ready_s": statistics.median(ours),
        "bare_s": statistics.median(bare),
        "ratio": statistics.median(ratios),
    }


def measure_memory() -> dict[str, Any]:
    """Return resident MiB of a gateway with two models, and of their workers."""
    with serving("demo", "minilm") as served, Client(served.address) as client:
        client.generate("demo", "Return", max_new_tokens=8)
        client.embed("minilm", ["one sentence"])
        stats = client.stats()
    mib = {"gateway": stats["gateway"]["rss_bytes"] / 2**20}
    mib |= {name: worker["rss_bytes"] / 2**20 for name, worker in stats["workers"].items()}
    return mib


def main() -> None:
    """Measure, print one table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokens, start = measure_tokens(args.rounds), measure_start(args.rounds)
    memory = measure_memory()
    table = Table("streams", "ours tok/s", "transformers tok/s", "ratio [min..max]")
    for row in tokens:
        table.add_row(
            str(row["streams"]),
            f"{row['ours']:.0f}",
            f"{row['transformers']:.0f}",
            f"{row['ratio']:.2f} [{row['ratio_min']:.2f}..{row['ratio_max']:.2f}]",
        )
    console.print(table)
    console.print("start:", {k: round(v, 2) for k, v in start.items()})
    console.print("memory MiB:", {k: round(v, 1) for k, v in memory.items()})
    if args.json:
        results = {"tokens": tokens, "start": start, "memory_mib": memory}
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
