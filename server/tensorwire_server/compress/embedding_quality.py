"""How far a compressed encoder's vectors are from its parent's.

Letters: N texts, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tensorwire_server.compress.errors import MeasurementError
from tensorwire_server.compress.intervals import Bootstrap, Estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from tensorwire_server.engine.encoder import Encoder

    Vectors = NDArray[np.float64]

_TEXTS_AT_ONCE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingQuality:
    """Cosines between the vectors that parent and child make of the same texts."""

    num_texts: int
    mean: Estimate
    first_percentile: float
    least: float


def embed(
    encoder: Encoder, texts: Sequence[str], *, on_texts: Callable[[int], None] = lambda _: None
) -> Vectors:
    """Return the (N, D) vectors of texts.

    Args:
        on_texts: called with the number of texts that have been embedded since.

    Raises:
        MeasurementError: the model cannot embed one of them.
    """
    vectors: list[Vectors] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[start : start + _TEXTS_AT_ONCE]
        for outcome in encoder.run([encoder.tokenizer.encode(text) for text in some]):
            if isinstance(outcome, Exception):
                raise MeasurementError(f"a text cannot be embedded: {outcome}")
            vectors.append(outcome.astype(np.float64))
        on_texts(len(some))
    return np.stack(vectors)


def compare_vectors(before_ND: Vectors, after_ND: Vectors, *, seed: int) -> EmbeddingQuality:
    """Compare what parent and child make of the same texts.

    Raises:
        MeasurementError: their vectors have different sizes.
    """
    if before_ND.shape != after_ND.shape:
        raise MeasurementError("parent and child make vectors of different sizes")
    cosines_N = (unit(before_ND) * unit(after_ND)).sum(1)
    return EmbeddingQuality(
        num_texts=len(cosines_N),
        mean=Bootstrap(len(cosines_N), seed=seed).estimate(cosines_N),
        first_percentile=float(np.percentile(cosines_N, 1)),
        least=float(cosines_N.min()),
    )


def unit(vectors_ND: Vectors) -> Vectors:
    """Return vectors of length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    result: Vectors = vectors_ND / np.maximum(lengths, np.finfo(np.float64).tiny)
    return result
