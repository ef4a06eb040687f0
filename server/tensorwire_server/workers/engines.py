"""From a source to an engine that has computed. Torch is imported here, by name, or not at all."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorwire_server.scheduling.work import Row, Sampling, StepPlan
from tensorwire_server.workers.echo import EchoEngine
from tensorwire_server.workers.oracle import OracleEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_server.scheduling.work import ModelCard
    from tensorwire_server.workers.spec import WorkerSpec


class FirstForwardFailed(Exception):
    """The model was loaded and does not compute."""


def load_engine(spec: WorkerSpec, on_phase: Callable[[str], object]) -> Any:
    """Return the `GenerateEngine` or `ArrayEngine` that `spec.source` names.

    Args:
        on_phase: is told what takes the time.

    Raises:
        Exception: whatever the engine says; `reason_of` makes it one sentence.
    """
    if spec.source.startswith("echo:"):
        return EchoEngine(spec.source)
    if spec.source.startswith("oracle:"):
        return OracleEngine(spec.source)
    on_phase("importing torch")
    loading = importlib.import_module("tensorwire_server.engine.loading")
    on_phase("loading weights")
    return loading.load(
        spec.source,
        device=spec.device,
        revision=spec.revision,
        context_tokens=spec.context_tokens,
        backend=spec.backend,
        quantize=spec.quantize,
    )


def prove(engine: Any) -> None:
    """Run one forward pass: only what has computed is called ready.

    Raises:
        FirstForwardFailed: the engine gave a failure for an answer.
    """
    tasks = engine.card.tasks
    if "generate" in tasks:
        _prove_generate(engine)
    else:
        item = engine.tokenizer.encode("ready") if "embed" in tasks else {"ready": np.zeros(1)}
        outcome = engine.run([item])[0]
        if isinstance(outcome, Exception):
            raise FirstForwardFailed(f"its first forward pass failed: {outcome}")


def _prove_generate(engine: Any) -> None:
    greedy = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)
    row = Row(sequence_id=0, token_ids=(0,), start=0, pages=(0,), sample=True, sampling=greedy)
    result = engine.step(StepPlan(rows=(row,), released=()))
    engine.step(StepPlan(rows=(), released=(0,)))
    if result.failed:
        raise FirstForwardFailed(f"its first forward pass failed: {result.failed[0]}")


def card_map(card: ModelCard) -> dict[str, Any]:
    """Return a model's card as a heartbeat carries it."""
    return {
        "tasks": sorted(card.tasks),
        "architecture": card.architecture,
        "backend": card.backend,
        "quantization": card.quantization,
        "parameters": card.parameters,
        "context_tokens": card.context_tokens,
        "vocab_size": card.vocab_size,
        "eos_ids": sorted(card.eos_ids),
        "embedding_size": card.embedding_size,
        "defaults": dict(card.defaults),
    }


def reason_of(error: BaseException) -> str:
    """Return one sentence on why a model cannot be served."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name!r} is not installed; pip install 'tensorwire[server]'"
    text = " ".join(str(error).split())
    if type(error).__name__ in ("ModelLoadError", "FirstForwardFailed", "ValueError") and text:
        return text[:500]
    return f"{type(error).__name__}: {text}"[:500]
