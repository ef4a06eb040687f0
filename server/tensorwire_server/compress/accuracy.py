"""A task with labels: how often the right one is found, before and after.

A text model is asked which of the labels is the likeliest behind the text. An encoder has no such
question; there a text belongs to the label whose other texts lie nearest.

Letters: N texts, D embedding size, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from tensorwire_server.compress.embedding_quality import unit
from tensorwire_server.compress.errors import MeasurementError
from tensorwire_server.compress.intervals import Bootstrap, Estimate
from tensorwire_server.compress.scoring import num_equal, tail_log_probability

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from tensorwire_server.compress.embedding_quality import Vectors
    from tensorwire_server.engine.generator import Generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares of texts whose label was found; the difference is paired by text."""

    num_texts: int
    num_labels: int
    before: Estimate
    after: Estimate
    difference: Estimate  # after - before


def compare_hits(
    before_N: Sequence[bool], after_N: Sequence[bool], *, num_labels: int, seed: int
) -> Accuracy:
    """Return the accuracies of who found which labels."""
    before, after = np.asarray(before_N, dtype=float), np.asarray(after_N, dtype=float)
    bootstrap = Bootstrap(len(before), seed=seed)
    return Accuracy(
        num_texts=len(before),
        num_labels=num_labels,
        before=bootstrap.estimate(before),
        after=bootstrap.estimate(after),
        difference=bootstrap.estimate(after - before),
    )


def find_by_likelihood(
    generator: Generator,
    labelled: Sequence[tuple[str, str]],
    *,
    on_text: Callable[[], None] = lambda: None,
) -> list[bool]:
    """Say for each (text, label) if the label has the highest log-probability behind the text.

    Raises:
        MeasurementError: the model makes no finite numbers of a text.
    """
    labels = sorted({label for _, label in labelled})
    hits = []
    for text, label in labelled:
        scores = _score_labels(generator, text, labels)
        hits.append(labels[int(np.argmax(scores))] == label)
        on_text()
    return hits


def _score_labels(generator: Generator, text: str, labels: Sequence[str]) -> list[float]:
    joint = text if text[-1:].isspace() else f"{text} "
    wholes = _told_apart(
        generator, [generator.tokenizer.encode(f"{joint}{label}") for label in labels]
    )
    # A tokenizer may draw the border between text and label elsewhere than we do, and for each
    # label elsewhere: what is compared is all that comes behind what they share.
    num_shared = max(num_equal(*wholes), 1)
    tails = [whole[num_shared:] for whole in wholes]
    room = generator.card.context_tokens - max(map(len, tails))
    if room < 1:
        raise MeasurementError("a label is longer than the model's context")
    shared = wholes[0][:num_shared][-room:]  # of a text that is too long the end
    return [tail_log_probability(generator, [*shared, *tail], len(tail)) for tail in tails]


def _told_apart(generator: Generator, wholes: list[list[int]]) -> list[list[int]]:
    """Return texts none of which is the beginning of another.

    A beginning is never less likely than the whole: "1" would always win over "10". Where there is
    one, each text is asked for with the model's end behind it.
    """
    if not any(one == other[: len(one)] for one, other in pairwise(sorted(wholes))):
        return wholes
    if not generator.card.eos_ids:
        raise MeasurementError(
            "a label is the beginning of another one, and the model has no end token that could"
            " tell them apart; use other labels"
        )
    end = min(generator.card.eos_ids)
    return [[*whole, end] for whole in wholes]


def find_by_centroid(vectors_ND: Vectors, labels: Sequence[str]) -> list[bool]:
    """Say for each text if the mean of its label's other texts lies nearest, by cosine.

    A label with a single text is never found: nothing is left to find it by.
    """
    names, owner_N = np.unique(np.asarray(labels), return_inverse=True)
    vectors_ND = unit(vectors_ND)
    sums_LD = np.zeros((len(names), vectors_ND.shape[1]))
    np.add.at(sums_LD, owner_N, vectors_ND)
    hits: list[bool] = []
    for vector_D, owner in zip(vectors_ND, owner_N.tolist(), strict=True):
        others_LD = sums_LD.copy()
        others_LD[owner] -= vector_D
        cosines_L: NDArray[np.float64] = unit(others_LD) @ vector_D
        if (owner_N == owner).sum() == 1:
            cosines_L[owner] = -np.inf
        hits.append(int(cosines_L.argmax()) == owner)
    return hits
