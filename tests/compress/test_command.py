"""`tensorwire compress` as its user has it: a process, sentences, exit codes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import models_zoo
import pytest
import torch
from tensorwire_server.compress.errors import is_out_of_memory

from .demo_text import CALIBRATION_UNITS, EVALUATION_UNITS, write_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "tensorwire", "compress", *map(str, words)]


def run(
    *words: object, preexec_fn: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},  # a typo is not looked up
        preexec_fn=preexec_fn,
    )


def sentence(ran: subprocess.CompletedProcess[str]) -> str:
    """Return the only line of an error."""
    lines = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    return lines[0]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    return (
        write_text(folder / "calibrate.txt", CALIBRATION_UNITS),
        write_text(folder / "evaluate.txt", EVALUATION_UNITS),
    )


def test_the_command_of_the_readme_compresses_and_says_what_it_did(
    tmp_path: Path, texts: tuple[str, str]
) -> None:
    out = tmp_path / "small"
    ran = run(
        *("demo", "--out", out, "--prune", "unstructured:0.5", "--method", "wanda"),
        *("--quantize", "int4", "--calibrate", texts[0], "--eval", texts[1]),
        *("--floor", "ppl=3x", "--no-speed"),
    )
    assert ran.returncode == 0, ran.stderr
    assert "perplexity" in ran.stdout
    assert f"tensorwire serve {out}" in ran.stdout
    report = json.loads((out / "compression" / "report.json").read_text())
    assert report["recipe"]["quantize"] == {"bits": 4, "rounding": "gptq", "group_size": 32}


def test_a_missed_floor_is_exit_code_4_with_the_report(
    tmp_path: Path, texts: tuple[str, str]
) -> None:
    ran = run(
        *("demo", "--out", tmp_path / "out", "--prune", "unstructured:0.9"),
        *("--eval", texts[1], "--floor", "ppl=1.1x", "--no-speed"),
    )
    assert ran.returncode == 4, ran.stderr
    assert sentence(ran) == "error: missed ppl=1.1x; nothing was written"
    assert "perplexity" in ran.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("demo", "--prune", "unstructured:1.2"), 2, "must lie between 0 and 1"),
        (("demo", "--prune", "tails:0.5"), 2, "prune 'tails' is not known; known are unstructured"),
        (("demo",), 2, "nothing to do; give prune"),
        (("demo", "--quantize", "int8", "--method", "wanda"), 2, "method wanda is of prune"),
        (("demo", "--quantize", "int5"), 2, "quantize must be int8 or int4, got 'int5'"),
        (("demo", "--prune", "heads:0.5"), 2, "give one with --calibrate FILE"),
        (("demo", "--quantize", "int8", "--floor", "ppl=1.1x"), 2, "give one with --eval FILE"),
        (("demo", "--quantize", "int8", "--calibrate", "EMPTY"), 2, "is empty; give a file"),
        (("demo", "--quantize", "int8", "--eval", "GONE"), 2, "No such file"),
        (("demo", "--quantize", "int8", "--recipe", "GONE"), 2, "cannot read the recipe"),
        (("./dmeo", "--quantize", "int8"), 2, "there is no folder"),
        (("dmeo", "--quantize", "int8"), 1, "cannot compress 'dmeo': there is no such folder"),
        (("oracle:", "--quantize", "int8"), 2, "'oracle:' has no weights; name a model's folder"),
        (("minilm", "--prune", "heads:0.5", "--calibrate", "TEXT"), 2, "heads"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    tmp_path: Path, texts: tuple[str, str], words: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "empty").write_text("\n")
    names = {"EMPTY": tmp_path / "empty", "GONE": tmp_path / "gone", "TEXT": texts[0]}
    ran = run(*(names.get(word, word) for word in words), "--out", tmp_path / "out", "--no-speed")
    assert said in sentence(ran)
    assert ran.returncode == code
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, texts: tuple[str, str]) -> None:
    """No file may grow beyond 1 MiB, which the system reports as it does a full disk."""
    limit = (1 << 20, 1 << 20)
    ran = run(
        *("demo", "--out", tmp_path / "out", "--prune", "unstructured:0.5", "--no-speed"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert "the disk is full" in sentence(ran)
    assert ran.returncode == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(
    tmp_path: Path, texts: tuple[str, str], number: signal.Signals
) -> None:
    process = subprocess.Popen(
        command(
            *(models_zoo.tiny_model("llama"), "--out", tmp_path / "out"),
            *("--prune", "unstructured:0.5", "--eval", texts[1], "--no-speed"),
        ),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("quality"):
            process.send_signal(number)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_known_whoever_says_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.int8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("cannot allocate memory"))
