"""What the demo model is judged on it has neither learnt nor been calibrated with."""

from __future__ import annotations

import hashlib
from functools import cache

import corpus
import pytest
from tensorwire_server.compress.text import Text, refuse_shared

from .demo_text import (
    CALIBRATION_UNITS,
    EVALUATION_UNITS,
    telling_lines,
    training_texts,
    unlearnt_texts,
)

pytestmark = pytest.mark.slow  # the whole standard library is read


@cache
def learnt() -> frozenset[bytes]:
    return frozenset(digest(line) for text in training_texts() for line in telling_lines(text))


def digest(line: str) -> bytes:
    return hashlib.sha256(line.encode(errors="replace")).digest()


@pytest.mark.parametrize("units", [CALIBRATION_UNITS, EVALUATION_UNITS], ids=str)
def test_no_line_of_the_texts_was_learnt(units: tuple[str, ...]) -> None:
    texts = unlearnt_texts(units)
    assert len(learnt()) > 100_000
    assert not [line for text in texts for line in telling_lines(text) if digest(line) in learnt()]
    # Modules that were held out do quote others, so there was something to be left out.
    everything = [document.text for document in corpus.documents_of(units)]
    quoting = set(everything) - set(texts)
    assert 0 < len(quoting) < len(everything) / 4


def test_calibration_and_evaluation_share_nothing() -> None:
    calibration = Text(path="", documents=tuple(unlearnt_texts(CALIBRATION_UNITS)), sha256="")
    refuse_shared(calibration, unlearnt_texts(EVALUATION_UNITS), "the evaluation text")
