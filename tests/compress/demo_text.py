"""What the demo model was not trained on, as windows of token ids; and how well it predicts them.

The standard library's modules that its training held out, in two halves: to calibrate with, and to
evaluate on.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corpus
import tensorwire_server.models
import torch
from tensorwire_server.compress.text import choose_some, cut_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO = Path(tensorwire_server.models.__file__).parent / "builtin" / "demo"
# All of them are held out; `test_demo_quality.py` makes sure.
CALIBRATION_UNITS = ("socket", "sqlite3", "bz2", "lzma")
EVALUATION_UNITS = ("importlib", "ipaddress", "urllib2")


def load_demo() -> Any:
    """Return the demo model as compression gets it: float32, on the CPU."""
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).requires_grad_(False)


@cache
def unlearnt_texts(units: tuple[str, ...]) -> list[str]:
    """Return what modules say, without the documents of which a line stands in training text.

    The standard library repeats itself: a module that was held out may quote one that was not.
    """
    texts = [document.text for document in corpus.documents_of(units)]
    lines = {line for text in texts for line in telling_lines(text)}
    learnt = {line for text in training_texts() for line in lines.intersection(telling_lines(text))}
    return [text for text in texts if learnt.isdisjoint(telling_lines(text))]


def training_texts() -> Iterator[str]:
    """Yield everything that the demo model may have learnt from: whole files, and what has none."""
    for path, module in corpus.source_files():
        if not corpus.is_held_out(corpus.unit_of(module)):
            yield path.read_text(encoding="utf-8", errors="replace")
    for document in corpus.documents_without_source():
        if not corpus.is_held_out(document.unit):
            yield document.text


def telling_lines(text: str) -> set[str]:
    """Return the lines that say something, without what marks comments and docstrings."""
    lines = (line.strip(" \t#\"'") for line in text.splitlines())
    return {line for line in lines if len(line) >= 32}


def write_text(path: Path, units: tuple[str, ...], num_documents: int = 120) -> str:
    """Write what modules hold first as a user's text file: documents between empty lines."""
    documents = ("\n".join(line for line in text.splitlines() if line.strip())
                 for text in unlearnt_texts(units)[:num_documents])  # fmt: skip
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return str(path)


def calibration_windows(seed: int, count: int = 16) -> list[torch.Tensor]:
    """Return int64 (1, 256) each; another seed takes others."""
    windows = choose_some(_windows(CALIBRATION_UNITS), count, seed)
    return [torch.tensor([window]) for window in windows]


def perplexity(model: Any, count: int = 48) -> float:
    """Return it over evenly spaced windows of the evaluation half."""
    windows = _windows(EVALUATION_UNITS)
    chosen = torch.tensor(windows[:: len(windows) // count][:count])
    with torch.no_grad():
        logits = model(input_ids=chosen, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())
    return math.exp(loss)


@cache
def _windows(units: tuple[str, ...]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    texts = unlearnt_texts(units)
    end = tokenizer.eos_token_id
    ids = [one for encoded in tokenizer(texts)["input_ids"] for one in [*encoded, end]]
    return [window for window in cut_windows(ids, 256) if len(window) == 256]
