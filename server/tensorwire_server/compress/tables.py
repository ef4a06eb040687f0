"""A report's numbers as tables of words, for the terminal and the page alike. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorwire_server.compress.accuracy import Accuracy
    from tensorwire_server.compress.embedding_quality import EmbeddingQuality
    from tensorwire_server.compress.intervals import Estimate
    from tensorwire_server.compress.recipe import Pruning, Quantization
    from tensorwire_server.compress.report import Report
    from tensorwire_server.compress.sizes import FolderSize
    from tensorwire_server.compress.text_quality import Continuations, TextQuality

_BEFORE_AFTER = ("", "before", "after", "change")
_NONE = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under heads; the first column names what stands in the others."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def main_tables(report: Report) -> list[Table]:
    """Return what everybody wants to know; without what was not measured."""
    tables = [
        Table(title="Quality", heads=_BEFORE_AFTER, rows=tuple(_quality(report))),
        Table(title="Size", heads=_BEFORE_AFTER, rows=tuple(_size(report))),
        Table(title="Speed", heads=_BEFORE_AFTER, rows=tuple(_speed(report))),
        Table(
            title="Floors",
            heads=("", "limit", "found", ""),
            rows=tuple(
                (
                    str(judgement.floor),
                    f"{judgement.limit:.4g}",
                    "not measured" if judgement.found is None else f"{judgement.found:.4g}",
                    "met" if judgement.is_met else "missed",
                )
                for judgement in report.floors
            ),
        ),
        Table(
            title="Pruning",
            heads=("", "target", "achieved", "tensors"),
            rows=tuple(
                (
                    pruned.structure,
                    f"{pruned.target:.2%}",
                    f"{pruned.achieved:.2%}",
                    str(len(pruned.parameters)),
                )
                for pruned in report.pruned
            ),
        ),
    ]
    return [table for table in tables if table.rows]


def layer_table(report: Report) -> Table:
    """Return every matrix of the blocks, as it lies in the files."""
    return Table(
        title="Matrices of the blocks, as stored",
        heads=("", "shape", "bits", "zeros", "output error"),
        rows=tuple(
            (
                matrix.name,
                " x ".join(map(str, matrix.shape)),
                str(matrix.bits),
                f"{matrix.sparsity:.2%}",
                f"{report.error_of[matrix.name]:.4f}" if matrix.name in report.error_of else "-",
            )
            for matrix in report.size_after.matrices
        ),
    )


def fact_table(report: Report) -> Table:
    """Return how it was made, and where."""
    recipe = report.recipe
    facts = {
        "parent": f"{report.parent.name}@{report.parent.revision[:12]}",
        "result": f"{report.child.name}@{report.child.revision[:12]}",
        "prune": ", ".join(map(describe_pruning, recipe.prune)) or "-",
        "quantize": describe_quantization(recipe.quantize) if recipe.quantize else "-",
        **{text.use: f"{text.name} (SHA-256 {text.sha256[:12]}…)" for text in report.texts},
        "seed": str(recipe.seed),
        "date": told_date(report),
        **{f"{stage} took": f"{seconds:.1f} s" for stage, seconds in report.seconds.items()},
        **report.machine,
        **report.versions,
    }
    return Table(title="How this was made", heads=("", ""), rows=tuple(facts.items()))


def describe_pruning(pruning: Pruning) -> str:
    """Return what is removed in a few words."""
    how = (
        f" by {pruning.method}, per {pruning.scope}" if pruning.structure == "unstructured" else ""
    )
    return f"{pruning.structure} {pruning.target:g}{how}"


def describe_quantization(quantization: Quantization) -> str:
    """Return how weights become integers in a few words."""
    size = quantization.group_size
    groups = "one scale an output" if size is None else f"groups of {size}"
    return f"int{quantization.bits}, {quantization.rounding}, {groups}"


def told_date(report: Report) -> str:
    """Return when it was made, for people."""
    return f"{datetime.fromisoformat(report.date).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def short_bytes(count: float) -> str:
    """Return a number of bytes with three digits and a unit."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 999.5 * size
                else f"{count / size:.0f} {unit}"
            )
    return f"{count:.0f} B"


def _quality(report: Report) -> Iterator[tuple[str, ...]]:
    quality = report.quality
    if quality.text is not None:
        yield from _text_rows(quality.text)
    if quality.continuations is not None:
        yield _continuation_row(quality.continuations)
    if quality.embedding is not None:
        yield from _embedding_rows(quality.embedding)
    if quality.accuracy is not None:
        yield _accuracy_row(quality.accuracy)


def _text_rows(text: TextQuality) -> Iterator[tuple[str, ...]]:
    yield (
        f"perplexity ({text.num_tokens} tokens)",
        told(text.perplexity_before, ".3f"),
        told(text.perplexity_after, ".3f"),
        told(text.perplexity_ratio, ".4f", "x"),
    )
    yield "KL divergence, nats a token", _NONE, told(text.kl, ".5f"), _NONE
    yield "same likeliest next token", _NONE, told(text.agreement, ".2%"), _NONE


def _continuation_row(continuations: Continuations) -> tuple[str, ...]:
    return (
        f"greedy answers alike ({continuations.num_prompts} prompts)",
        _NONE,
        told(continuations.agreement, ".2%"),
        _NONE,
    )


def _embedding_rows(embedding: EmbeddingQuality) -> Iterator[tuple[str, ...]]:
    name = f"cosine to the parent ({embedding.num_texts} texts)"
    yield f"{name}, mean", _NONE, told(embedding.mean, ".5f"), _NONE
    yield f"{name}, 1st percentile", _NONE, f"{embedding.first_percentile:.5f}", _NONE
    yield f"{name}, least", _NONE, f"{embedding.least:.5f}", _NONE


def _accuracy_row(accuracy: Accuracy) -> tuple[str, ...]:
    return (
        f"accuracy ({accuracy.num_texts} texts, {accuracy.num_labels} labels)",
        told(accuracy.before, ".1%"),
        told(accuracy.after, ".1%"),
        told(accuracy.difference, "+.1%"),
    )


def told(estimate: Estimate, form: str, unit: str = "") -> str:
    """Return an estimate with its interval."""
    value = f"{estimate.value:{form}}{unit}"
    if not estimate.is_bounded:
        return value
    return f"{value} ({estimate.low:{form}} to {estimate.high:{form}})"


def _size(report: Report) -> Iterator[tuple[str, ...]]:
    before, after = report.size_before, report.size_after
    yield (
        "weight files",
        short_bytes(before.file_bytes),
        short_bytes(after.file_bytes),
        _ratio(after.file_bytes, before.file_bytes),
    )
    yield (
        "parameters",
        f"{before.parameters:,}",
        f"{after.parameters:,}",
        _ratio(after.parameters, before.parameters),
    )
    yield "zeros in the blocks' matrices", _sparsity(before), _sparsity(after), _NONE
    if report.speed is not None:
        memory = report.speed.resident_bytes_before, report.speed.resident_bytes_after
        yield (
            "memory of the worker, libraries included",
            *map(short_bytes, memory),
            _ratio(memory[1], memory[0]),
        )


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.3f}x"


def _sparsity(size: FolderSize) -> str:
    total = sum(matrix.parameters for matrix in size.matrices)
    return f"{sum(matrix.zeros for matrix in size.matrices) / max(total, 1):.2%}"


def _speed(report: Report) -> Iterator[tuple[str, ...]]:
    for rate in report.speed.rates if report.speed is not None else ():
        yield (
            f"{rate.name} ({rate.unit})",
            f"{statistics.median(rate.before):.4g}",
            f"{statistics.median(rate.after):.4g}",
            f"{rate.ratio:.2f}x ({min(rate.ratios):.2f} to {max(rate.ratios):.2f})",
        )
