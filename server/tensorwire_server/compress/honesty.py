"""What a report says against itself. Pure: from numbers to sentences.

Numbers that look better than they are cost whoever believes them more than bad ones.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from tensorwire_server.compress.floors import is_close
from tensorwire_server.compress.intervals import MIN_UNITS
from tensorwire_server.compress.recipe import Structure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tensorwire_server.compress.intervals import Estimate
    from tensorwire_server.compress.report import Report
    from tensorwire_server.compress.speed import Rate

# Of less text even a clear difference may be that text's own.
MIN_TOKENS = 10_000
MIN_SENTENCES = 100
MIN_LABELLED = 100


def find_notes(report: Report) -> tuple[str, ...]:
    """Return everything that has to be said about a report's numbers."""
    finders = (_missed, _close, _zeros, _int4, _unmeasured, _little_text, _no_difference, _speed)
    return tuple(chain.from_iterable(find(report) for find in finders))


def _missed(report: Report) -> Iterator[str]:
    for judgement in report.floors:
        if not judgement.is_met:
            found = "was not measured" if judgement.found is None else f"is {judgement.found:.4g}"
            yield (
                f"The floor {judgement.floor} was missed: {judgement.floor.metric} {found},"
                f" {judgement.limit:.4g} was the limit."
            )
    for pruned in report.pruned:
        if not pruned.met:
            yield (
                f"Pruning {pruned.structure} reached {pruned.achieved:.2%} instead of the"
                f" {pruned.target:.2%} that were asked for."
            )
        yield from pruned.notes


def _close(report: Report) -> Iterator[str]:
    for judgement in report.floors:
        if is_close(judgement, report.quality):
            verdict = "met" if judgement.is_met else "missed"
            yield (
                f"The floor {judgement.floor} was {verdict} by less than the interval of what was"
                " measured: another text might have judged otherwise."
            )


def _zeros(report: Report) -> Iterator[str]:
    recipe = report.recipe
    if not any(pruning.structure is Structure.UNSTRUCTURED for pruning in recipe.prune):
        return
    rates = report.speed.rates if report.speed is not None else ()
    if report.speed is None:
        speed = "speed was not measured, but is not expected to change"
    elif not any(min(rate.ratios) > 1 for rate in rates):
        speed = "nothing was measured to be faster"
    elif recipe.quantize is not None or len(recipe.prune) > 1:
        speed = "what was measured to be faster owes it to the other steps"
    else:
        speed = "what was measured to be faster does not owe it to them"
    yield (
        "The weights that were pruned are zeros in matrices that are as large as before, stored and"
        " multiplied like any other number: they make neither the files nor the memory smaller, and"
        f" {speed}."
    )


def _int4(report: Report) -> Iterator[str]:
    quantize = report.recipe.quantize
    if quantize is None or quantize.bits != 4:
        return
    files = "int4 weights take 4 bits in the files only; they are computed from 16 bits or more."
    if report.speed is None:
        yield f"{files} Memory and speed of the running model were not measured."
        return
    memory = report.speed.resident_bytes_after / report.speed.resident_bytes_before
    rate = report.speed.typical
    speed = "no difference in speed" if rate.is_same else f"{rate.ratio:.2f}x of its speed"
    yield (
        f"{files} The running model was measured to take {memory:.2f}x of its parent's memory, at"
        f" {speed} ({rate.name})."
    )


def _unmeasured(report: Report) -> Iterator[str]:
    quality = report.quality
    if quality.text is None and quality.embedding is None:
        yield "Quality was not measured on a text, because none was given (--eval FILE)."
    if quality.text is not None and quality.continuations is None:
        yield "Greedy answers were not compared, because the context leaves no room for them."
    if report.speed is None:
        why = "they were not asked for" if report.meets_floors else "a floor was missed before"
        yield f"Speed and memory were not measured, because {why}."
    if not report.errors and report.recipe.calibrate is None:
        yield (
            "The error of single layers was not measured, because no calibration text was given"
            " (--calibrate FILE)."
        )


def _little_text(report: Report) -> Iterator[str]:
    text, embedding, accuracy = (
        report.quality.text, report.quality.embedding, report.quality.accuracy
    )  # fmt: skip
    if text is not None and text.num_tokens < MIN_TOKENS:
        yield (
            f"The evaluation text is small: {text.num_tokens} tokens; from {MIN_TOKENS} on its"
            " numbers begin to tell of other texts."
        )
    if text is not None and text.num_windows < MIN_UNITS:
        yield (
            f"The evaluation text has {text.num_windows} windows, too few for intervals"
            f" ({MIN_UNITS} are needed)."
        )
    if embedding is not None and embedding.num_texts < MIN_SENTENCES:
        yield (
            f"Cosines come from {embedding.num_texts} sentences only; from {MIN_SENTENCES} on they"
            " begin to tell of other sentences."
        )
    if accuracy is not None and accuracy.num_texts < MIN_LABELLED:
        yield (
            f"Accuracy comes from {accuracy.num_texts} texts only: one more or less is"
            f" {1 / accuracy.num_texts:.1%}."
        )


def _no_difference(report: Report) -> Iterator[str]:
    text, accuracy = report.quality.text, report.quality.accuracy
    if text is not None and _hides(text.perplexity_ratio, 1.0):
        ratio = text.perplexity_ratio
        yield (
            f"The evaluation text cannot tell if perplexity changed at all: the ratio lies between"
            f" {ratio.low:.4f} and {ratio.high:.4f}."
        )
    if accuracy is not None and _hides(accuracy.difference, 0.0):
        yield (
            f"The {accuracy.num_texts} texts with labels cannot tell if accuracy changed at all:"
            f" by {accuracy.difference.low:+.1%} to {accuracy.difference.high:+.1%}."
        )


def _hides(estimate: Estimate, nothing: float) -> bool:
    return estimate.is_bounded and estimate.may_be(nothing)


def _speed(report: Report) -> Iterator[str]:
    rates = report.speed.rates if report.speed is not None else ()
    same = [rate for rate in rates if rate.is_same]
    slower = [rate for rate in rates if max(rate.ratios) < 1]
    if same:
        yield f"No difference in speed was seen in: {_listed(same)}."
    if slower:
        yield f"The result is slower than its parent in: {_listed(slower)}."


def _listed(rates: list[Rate]) -> str:
    return "; ".join(
        f"{rate.name} ({min(rate.ratios):.2f}x to {max(rate.ratios):.2f}x)" for rate in rates
    )
