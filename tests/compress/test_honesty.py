"""What a report says against itself: each sentence when it is true, and only then."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tensorwire_server.compress.floors import judge
from tensorwire_server.compress.honesty import MIN_TOKENS, find_notes
from tensorwire_server.compress.intervals import Estimate
from tensorwire_server.compress.quality import Quality
from tensorwire_server.compress.recipe import Quantization, Recipe, parse_floors

from .samples import encoder_report, rate, speed, text_quality, text_report, unstructured

if TYPE_CHECKING:
    from tensorwire_server.compress.report import Report

GOOD = text_report()
ENCODER = encoder_report()
MISSED = judge(parse_floors(["ppl=1.05x"]), GOOD.quality)
(PRUNED,) = GOOD.pruned
INT4 = Recipe(quantize=Quantization(bits=4))
SLOW = rate("decode, 8 streams", (100.0, 100.0), (80.0, 99.0))
SAME = rate("decode, 8 streams", (100.0, 100.0), (95.0, 101.0))


def with_text(**changes: object) -> Report:
    return replace(GOOD, quality=replace(GOOD.quality, text=text_quality(**changes)))


def with_accuracy(**changes: object) -> Report:
    assert ENCODER.quality.accuracy is not None
    accuracy = replace(ENCODER.quality.accuracy, **changes)  # type: ignore[arg-type]
    return replace(ENCODER, quality=replace(ENCODER.quality, accuracy=accuracy))


def with_sentences(count: int) -> Report:
    assert ENCODER.quality.embedding is not None
    embedding = replace(ENCODER.quality.embedding, num_texts=count)
    return replace(ENCODER, quality=replace(ENCODER.quality, embedding=embedding))


@pytest.mark.parametrize("report", [GOOD, ENCODER], ids=["text", "encoder"])
def test_good_numbers_have_nothing_said_against_them(report: Report) -> None:
    assert find_notes(report) == ()


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (replace(GOOD, floors=MISSED), "floor ppl=1.05x was missed: ppl is 13.46, 12.96 was the"),
        (
            replace(GOOD, floors=judge(parse_floors(["cosine=0.9"]), GOOD.quality)),
            "floor cosine=0.9 was missed: cosine was not measured",
        ),
        (
            replace(GOOD, pruned=(replace(PRUNED, achieved=0.2, met=False),)),
            "neurons reached 20.00% instead of the 25.00%",
        ),
        (replace(GOOD, pruned=(replace(PRUNED, notes=("Its own words.",)),)), "Its own words."),
        (replace(GOOD, recipe=unstructured()), "what was measured to be faster does not owe it"),
        (
            replace(GOOD, recipe=unstructured(quantize=Quantization(bits=8))),
            "neither the files nor the memory smaller, and what was measured to be faster owes it",
        ),
        (replace(GOOD, recipe=INT4), "0.81x of its parent's memory, at 1.48x of its speed (decode"),
        (
            replace(GOOD, quality=replace(GOOD.quality, continuations=None)),
            "Greedy answers were not compared",
        ),
        (
            replace(GOOD, floors=judge(parse_floors(["ppl=1.095x"]), GOOD.quality)),
            "floor ppl=1.095x was met by less than the interval of what was measured",
        ),
        (replace(GOOD, quality=Quality()), "Quality was not measured on a text"),
        (replace(GOOD, speed=None), "Speed and memory were not measured"),
        (replace(ENCODER, errors=()), "error of single layers was not measured"),
        (with_text(num_tokens=MIN_TOKENS - 1), "evaluation text is small: 9999 tokens"),
        (with_text(num_windows=7), "has 7 windows, too few for intervals"),
        (
            with_text(perplexity_ratio=Estimate(value=1.01, low=0.995, high=1.02)),
            "cannot tell if perplexity changed at all: the ratio lies between 0.9950 and 1.0200",
        ),
        (with_sentences(99), "Cosines come from 99 sentences only"),
        (with_accuracy(num_texts=50), "comes from 50 texts only: one more or less is 2.0%"),
        (
            with_accuracy(difference=Estimate(value=-0.01, low=-0.03, high=0.01)),
            "cannot tell if accuracy changed at all: by -3.0% to +1.0%",
        ),
        (
            replace(GOOD, speed=speed(rates=(SAME,))),
            "No difference in speed was seen in: decode, 8 streams (0.95x to 1.01x)",
        ),
        (
            replace(GOOD, speed=speed(rates=(SLOW,))),
            "slower than its parent in: decode, 8 streams (0.80x to 0.99x)",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_nothing_else(report: Report, said: str) -> None:
    (note,) = find_notes(report)
    assert said in note


def test_notes_on_speed_say_only_what_was_measured() -> None:
    nothing = replace(GOOD, speed=speed(rates=(SAME,)))
    zeros, _ = find_notes(replace(nothing, recipe=unstructured()))
    assert "and nothing was measured to be faster" in zeros
    int4, _ = find_notes(replace(nothing, recipe=INT4))
    assert "at no difference in speed (decode, 8 streams)" in int4
    unmeasured = replace(GOOD, speed=None)
    zeros, _ = find_notes(replace(unmeasured, recipe=unstructured()))
    assert "speed was not measured, but is not expected to change" in zeros
    int4, _ = find_notes(replace(unmeasured, recipe=INT4))
    assert "Memory and speed of the running model were not measured" in int4


def test_at_the_bounds_nothing_is_said() -> None:
    fine = with_text(
        num_tokens=MIN_TOKENS,
        num_windows=8,
        perplexity_ratio=Estimate(value=1.01, low=1.0001, high=1.02),
    )
    assert find_notes(fine) == ()
    assert find_notes(with_sentences(100)) == ()
    assert find_notes(with_accuracy(num_texts=100)) == ()
    # Where whole layers went there is no output left to compare, whatever text there was.
    assert find_notes(replace(GOOD, errors=())) == ()


def test_without_an_interval_no_doubt_is_made_up() -> None:
    (note,) = find_notes(with_text(num_windows=2, perplexity_ratio=Estimate(value=1.0)))
    assert "too few for intervals" in note


def test_everything_that_is_wrong_is_said() -> None:
    bad = replace(GOOD, floors=MISSED, recipe=unstructured(), speed=None, quality=Quality())
    notes = find_notes(bad)
    assert len(notes) == len({*notes}) == 4
