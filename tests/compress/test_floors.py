"""What becomes of floors."""

from __future__ import annotations

import pytest
from tensorwire_server.compress.floors import is_close, judge
from tensorwire_server.compress.quality import Quality
from tensorwire_server.compress.recipe import parse_floors

from .samples import encoder_report, text_report

TEXT, EMBEDDING = text_report().quality, encoder_report().quality


@pytest.mark.parametrize(
    ("quality", "floor", "limit", "found", "is_met"),
    [
        (TEXT, "ppl=1.10x", 1.1 * 12.3456, 13.4567, True),
        (TEXT, "ppl=1.08x", 1.08 * 12.3456, 13.4567, False),
        (TEXT, "ppl=13.5", 13.5, 13.4567, True),
        (TEXT, "ppl=13.4", 13.4, 13.4567, False),
        (TEXT, "kl=0.05", 0.05, 0.04321, True),
        (TEXT, "kl=0.04", 0.04, 0.04321, False),
        (TEXT, "agreement=0.9", 0.9, 0.9112, True),
        (TEXT, "agreement=0.92x", 0.92, 0.9112, False),
        (EMBEDDING, "cosine=0.99", 0.99, 0.99512, True),
        (EMBEDDING, "cosine=0.999", 0.999, 0.99512, False),
        (EMBEDDING, "accuracy=0.95x", 0.95 * 0.81, 0.77, True),
        (EMBEDDING, "accuracy=0.8", 0.8, 0.77, False),
    ],
)
def test_a_floor_is_met_on_its_own_side_of_the_limit(
    quality: Quality, floor: str, limit: float, found: float, is_met: bool
) -> None:
    (judgement,) = judge(parse_floors([floor]), quality)
    assert judgement.limit == pytest.approx(limit)
    assert (judgement.found, judgement.is_met) == (found, is_met)


@pytest.mark.parametrize("floor", ["ppl=1.1x", "kl=1", "agreement=0.1", "cosine=0.1", "accuracy=1"])
def test_what_was_not_measured_is_not_good_enough(floor: str) -> None:
    (judgement,) = judge(parse_floors([floor]), Quality())
    assert (judgement.found, judgement.is_met) == (None, False)


def test_each_floor_is_judged() -> None:
    floors = parse_floors(["kl=0.05", "ppl=1.0x"])
    assert [judgement.is_met for judgement in judge(floors, TEXT)] == [True, False]


@pytest.mark.parametrize(
    ("quality", "floor", "is_unsure"),
    [
        (TEXT, "ppl=1.09x", True),  # by the ratio, whose interval is far narrower
        (TEXT, "ppl=1.10x", False),
        (TEXT, "ppl=13.0", True),
        (TEXT, "ppl=15", False),
        (TEXT, "kl=0.045", True),
        (TEXT, "agreement=0.9", False),
        (EMBEDDING, "cosine=0.995", True),
        (EMBEDDING, "accuracy=0.95x", True),
        (EMBEDDING, "accuracy=0.9x", False),
        (EMBEDDING, "accuracy=0.8", True),
        (Quality(), "ppl=1.1x", False),
    ],
)
def test_a_limit_within_the_interval_is_close(
    quality: Quality, floor: str, is_unsure: bool
) -> None:
    (judgement,) = judge(parse_floors([floor]), quality)
    assert is_close(judgement, quality) is is_unsure
