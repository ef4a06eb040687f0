"""The same prompts, by `tensorwire bench`, to our server and to those that others use on a CPU.

Usage: make bench-peers, or PYTHONPATH=benchmarks python -m engine.side_by_side [--model m2]

Every server runs alone, on all cores, and is started anew for its turn. All are greedy. Prompts
have the same text and, told by what each server counts, the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models import CACHE, SHAPES, model_folder
from engine.report import console
from rich.table import Table
from serving import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

_ENVIRONMENT = Path(__file__).parents[2] / ".cache" / "bench-peers"
_TO_GGUF = Path(__file__).with_name("peers") / "gguf_model.py"
_READY_S = 120.0
_MOST_STREAMS = 32
_PROMPT_CHARS, _NEW_TOKENS = 160, 128  # about 128 tokens of the demo's tokenizer
_ROOM_TOKENS = 512  # of a sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Where a side listens, and what it calls the model."""

    address: str
    model: str
    kind: str = "openai"


@contextmanager
def _ours(folder: Path, quantize: str) -> Iterator[Running]:
    words = (f"--model=m={folder}", f"--quantize={quantize}")
    with serving(*words) as served:
        yield Running(address=served.address, model="m", kind="tensorwire")


@contextmanager
def _llama_cpp(folder: Path, kind: str) -> Iterator[Running]:
    weights = folder / f"{kind}.gguf"
    if not weights.exists():
        convert = [_ENVIRONMENT / "bin" / "python", _TO_GGUF, folder, weights, kind]
        subprocess.run(list(map(str, convert)), check=True)
    port = _free_port()
    context = _MOST_STREAMS * _ROOM_TOKENS
    command = [
        _ENVIRONMENT / "bin" / "llama-server", "-m", weights, "--port", str(port), "--alias", "m",
        "-c", str(context), "--parallel", str(_MOST_STREAMS), "-t", str(os.cpu_count()),
        "-fa", "on", "--temp", "0", "--no-webui",
    ]  # fmt: skip
    with _process(command, port):
        yield Running(address=f"http://127.0.0.1:{port}/v1", model="m")


@contextmanager
def _transformers(folder: Path) -> Iterator[Running]:
    port = _free_port()
    command = [
        _ENVIRONMENT / "bin" / "transformers", "serve", str(folder), "--continuous-batching",
        "--dtype", "float32", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port),
        # Left alone, it takes nearly all memory for its cache.
        "--cb-num-blocks", str(_MOST_STREAMS * _ROOM_TOKENS // 256), "--cb-max-batch-tokens", "512",
    ]  # fmt: skip
    with _process(command, port):
        yield Running(address=f"http://127.0.0.1:{port}/v1", model=str(folder))


SIDES: dict[str, Callable[[Path], AbstractContextManager[Running]]] = {
    "tensorwire fp32": lambda folder: _ours(folder, "none"),
    "llama.cpp f32": lambda folder: _llama_cpp(folder, "f32"),
    "llama.cpp f16": lambda folder: _llama_cpp(folder, "f16"),
    "transformers serve fp32": _transformers,
    "tensorwire int8": lambda folder: _ours(folder, "int8"),
    "llama.cpp q8_0": lambda folder: _llama_cpp(folder, "q8_0"),
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _process(command: list[Any], port: int) -> Iterator[None]:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, port)
            yield
        except BaseException:
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace")[-4000:])
            raise
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _READY_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"{process.args!r} did not get ready")


def measure(side: Running, streams: int, seconds: float, seed: int) -> dict[str, float]:
    """Return what `tensorwire bench` says of one side."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [
            sys.executable, "-m", "tensorwire", "bench", "--kind", side.kind,
            "--address", side.address, "--task", f"generate:{side.model}",
            "--arrivals", f"closed:{streams}", "--connections", str(streams),
            "--prompt", str(_PROMPT_CHARS), "--output", str(_NEW_TOKENS), "--seed", str(seed),
            "--warmup", "3s", "--duration", f"{seconds:g}s", "--timeout", "120s", "--out", str(out),
        ]  # fmt: skip
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
        load = json.loads(out.read_text())["groups"]["load"]
    rates, metrics = load["rates"], load["metrics"]

    def percentile(metric: str, name: str) -> float:
        """Return milliseconds, NaN if nobody got so far."""
        value = metrics.get(metric, {"percentiles_ms": {}})["percentiles_ms"].get(name)
        return float("nan") if value is None else float(value)

    return {
        "tok/s": rates["tokens_out_per_s"],
        "ttft p50": percentile("ttft", "p50"),
        "itl p50": percentile("itl", "p50"),
        "itl p99": percentile("itl", "p99"),
        "failed": load["counts"].get("failed", 0),
        "prompt tokens": rates["tokens_in_per_s"] / (rates["requests_per_s"] or float("nan")),
    }


def main() -> None:
    """Alternate the sides, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*SHAPES], default="m2")
    parser.add_argument("--sides", nargs="+", choices=[*SIDES], default=[*SIDES])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, _MOST_STREAMS])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = model_folder(args.model)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for round_ in range(args.rounds):
        for name in args.sides:
            with SIDES[name](folder) as running:
                measure(
                    running, 1, 1.0, seed=1 << 20
                )  # whatever a server does at its first request
                for streams in args.streams:
                    said = measure(running, streams, args.seconds, seed=round_)
                    found.setdefault((name, streams), []).append(said)
                    console.print(f"{args.model} {name} at {streams}: {said}")
    rows = {
        key: {what: statistics.median(one[what] for one in rounds) for what in rounds[0]}
        for key, rounds in found.items()
    }
    _print(args.model, rows)
    if args.json:
        args.json.write_text(json.dumps([[*key, row] for key, row in rows.items()], indent=1))


def _print(model: str, rows: dict[tuple[str, int], dict[str, float]]) -> None:
    columns = [*next(iter(rows.values()))]
    table = Table("server", "streams", *columns, title=f"{model}, {CACHE.name}")
    for (name, streams), row in sorted(rows.items(), key=lambda item: item[0][1]):
        table.add_row(name, str(streams), *(f"{row[what]:.1f}" for what in columns))
    console.print(table)


if __name__ == "__main__":
    main()
