"""Cosines between the vectors of a child and of its parent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from tensorwire_server.compress.embedding_quality import compare_vectors, embed
from tensorwire_server.compress.errors import MeasurementError

if TYPE_CHECKING:
    from tensorwire_server.engine.encoder import Encoder

SENTENCES = [
    f"The {what} is {how}."
    for what in ("cat", "server", "sky", "text", "list")
    for how in ("grey", "slow", "long", "new", "full", "small", "old", "here")
]


def test_texts_are_embedded_in_their_order_however_many_there_are(minilm: Encoder) -> None:
    counted: list[int] = []
    vectors = embed(minilm, SENTENCES, on_texts=counted.append)
    assert vectors.shape == (len(SENTENCES), minilm.card.embedding_size)
    assert sum(counted) == len(SENTENCES)
    for place in (0, 31, 32, 39):
        (alone,) = minilm.run([minilm.tokenizer.encode(SENTENCES[place])])
        # In other company rows are summed in another order.
        np.testing.assert_allclose(vectors[place], alone, atol=1e-6)


def test_a_text_that_cannot_be_embedded_is_told(minilm: Encoder) -> None:
    class Failing:
        tokenizer = minilm.tokenizer

        def run(self, items: list[list[int]]) -> list[object]:
            return [ValueError("the embedding is not finite") for _ in items]

    with pytest.raises(MeasurementError, match="cannot be embedded: the embedding is not finite"):
        embed(Failing(), ["a"])  # type: ignore[arg-type]


def test_cosines_are_as_by_hand() -> None:
    before = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    after = np.array([[5.0, 0.0], [1.0, 1.0], [4.0, 3.0]])
    quality = compare_vectors(before, after, seed=0)
    cosines = [1.0, np.sqrt(0.5), 0.96]
    assert quality.num_texts == 3
    assert quality.mean.value == pytest.approx(np.mean(cosines))
    assert not quality.mean.is_bounded
    assert quality.least == pytest.approx(np.sqrt(0.5))
    assert quality.first_percentile == pytest.approx(np.percentile(cosines, 1))


def test_the_same_vectors_are_alike_and_none_is_not() -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 5))
    same = compare_vectors(vectors, vectors, seed=0)
    assert same.least == pytest.approx(1.0)
    assert same.mean.low == pytest.approx(1.0)
    assert compare_vectors(vectors, 0 * vectors, seed=0).mean.value == 0.0


def test_vectors_of_other_sizes_are_refused() -> None:
    with pytest.raises(MeasurementError, match="different sizes"):
        compare_vectors(np.ones((2, 3)), np.ones((2, 4)), seed=0)
