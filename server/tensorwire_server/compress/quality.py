"""What compression did to a model: parent and child, both loaded as they are served."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensorwire_server.compress.accuracy import (
    Accuracy,
    compare_hits,
    find_by_centroid,
    find_by_likelihood,
)
from tensorwire_server.compress.embedding_quality import EmbeddingQuality, compare_vectors, embed
from tensorwire_server.compress.errors import MeasurementError
from tensorwire_server.compress.text_quality import (
    Continuations,
    TextQuality,
    measure_continuations,
    measure_text,
)
from tensorwire_server.engine.encoder import Encoder
from tensorwire_server.engine.loading import load

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tensorwire_server.compress.blocks import OnProgress
    from tensorwire_server.engine.generator import Generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What was measured; the rest is None: there was no text for it, or it is not of this kind."""

    text: TextQuality | None = None
    continuations: Continuations | None = None
    embedding: EmbeddingQuality | None = None
    accuracy: Accuracy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What quality is measured on; text models need ids, encoders sentences."""

    windows: Sequence[Sequence[int]] = ()  # of ids, each 2 to the context's number of them
    prompts: Sequence[Sequence[int]] = ()  # of ids, to be continued
    sentences: Sequence[str] = ()
    labelled: Sequence[tuple[str, str]] = ()  # texts and their labels


def measure_quality(
    parent: Path,
    child: Path,
    material: Material,
    *,
    seed: int = 0,
    device: str = "auto",
    on_progress: OnProgress = lambda *_: None,
) -> Quality:
    """Load two folders and compare what they compute; both are in memory at once.

    Args:
        parent, child: folders of the same kind.
        material: what there is; what it lacks is not measured.
        seed: of the intervals.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        on_progress: called with how much is done, of how much, and what it is.

    Raises:
        ModelLoadError: a folder cannot be served.
        MeasurementError: what they compute cannot be compared.
    """
    before, after = load(parent, device=device), load(child, device=device)
    try:
        if isinstance(before, Encoder) and isinstance(after, Encoder):
            return _of_encoders(before, after, material, seed, on_progress)
        if isinstance(before, Encoder) or isinstance(after, Encoder):
            raise MeasurementError("parent and child are models of different kinds")
        return _of_generators(before, after, material, seed, on_progress)
    finally:
        del before, after
        gc.collect()  # models have circles; speed is measured next, beside two servers


class _Progress:
    """Counts what is done of a whole."""

    def __init__(self, report: OnProgress, total: int) -> None:
        self._report = report
        self._done, self._total = 0, total

    def add(self, what: str, count: int = 1) -> None:
        self._done += count
        self._report(self._done, self._total, what)


def _of_generators(
    before: Generator,
    after: Generator,
    material: Material,
    seed: int,
    report: OnProgress,
) -> Quality:
    windows, prompts, labelled = material.windows, material.prompts, material.labelled
    progress = _Progress(report, len(windows) + bool(prompts) + 2 * len(labelled))
    text, continuations, accuracy = None, None, None
    if windows:
        text = measure_text(
            before, after, windows, seed=seed, on_window=lambda: progress.add("perplexity")
        )
    if prompts:
        continuations = measure_continuations(before, after, prompts, seed=seed)
        progress.add("continuations")
    if labelled:
        hits = [
            find_by_likelihood(model, labelled, on_text=lambda: progress.add("accuracy"))
            for model in (before, after)
        ]
        accuracy = compare_hits(*hits, num_labels=_num_labels(labelled), seed=seed)
    return Quality(text=text, continuations=continuations, accuracy=accuracy)


def _of_encoders(
    before: Encoder,
    after: Encoder,
    material: Material,
    seed: int,
    report: OnProgress,
) -> Quality:
    sentences, labelled = material.sentences, material.labelled
    progress = _Progress(report, 2 * (len(sentences) + len(labelled)))
    embedding, accuracy = None, None
    if sentences:
        vectors = [
            embed(model, sentences, on_texts=lambda count: progress.add("cosine", count))
            for model in (before, after)
        ]
        embedding = compare_vectors(*vectors, seed=seed)
    if labelled:
        texts, labels = zip(*labelled, strict=True)
        hits = [
            find_by_centroid(
                embed(model, texts, on_texts=lambda count: progress.add("accuracy", count)), labels
            )
            for model in (before, after)
        ]
        accuracy = compare_hits(*hits, num_labels=_num_labels(labelled), seed=seed)
    return Quality(embedding=embedding, accuracy=accuracy)


def _num_labels(labelled: Sequence[tuple[str, str]]) -> int:
    return len({label for _, label in labelled})
