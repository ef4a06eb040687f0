"""What the demo model is measured against: xz, and a 5-gram model with the best smoothing known."""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

ORDER = 5


def xz_bits(text: bytes, *, after: bytes = b"") -> int:
    """Return what `xz -9e` needs for `text`, or needs more for it once it has packed `after`."""
    return 8 * (_xz_bytes(after + text) - (_xz_bytes(after) if after else 0))


def _xz_bytes(text: bytes) -> int:
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


class KneserNey:
    """Interpolated modified Kneser-Ney (Chen and Goodman, 1998), over bytes or over tokens.

    An n-gram is one integer, its ids the digits in base `num_symbols`: dividing by the base
    leaves the context, and the remainder by a power of it a shorter n-gram.
    """

    def __init__(self, ids: Sequence[int], *, num_symbols: int) -> None:
        if num_symbols**ORDER >= 2**63:
            raise ValueError(f"{num_symbols} symbols are too many for 64-bit {ORDER}-grams")
        self._num_symbols = num_symbols
        keys, counts = np.unique(_ngrams(ids, ORDER, num_symbols), return_counts=True)
        self._levels = [_Level.build(keys, counts, num_symbols)]
        for length in range(ORDER - 1, 0, -1):
            # Shorter n-grams count the different symbols seen before them, not how often.
            keys, counts = np.unique(keys % num_symbols**length, return_counts=True)
            self._levels.insert(0, _Level.build(keys, counts, num_symbols))

    def bits(self, ids: Sequence[int]) -> float:
        """Return the bits for all of `ids`, each given the four before it."""
        keys = _ngrams(ids, ORDER, self._num_symbols)
        probability = np.full(len(keys), 1 / self._num_symbols)
        for length, level in enumerate(self._levels, start=1):
            suffixes = keys % self._num_symbols**length
            probability = level.interpolate(suffixes, probability, self._num_symbols)
        return float(-np.log2(probability).sum())


def _ngrams(ids: Sequence[int], length: int, num_symbols: int) -> NDArray[np.int64]:
    # Symbol 0 ends a document on both levels, so it is what stands before the first.
    padded = np.concatenate([np.zeros(length - 1, np.int64), np.fromiter(ids, np.int64)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, length)
    powers = num_symbols ** np.arange(length - 1, -1, -1, dtype=np.int64)
    keys: NDArray[np.int64] = windows @ powers
    return keys


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Level:
    """The n-grams of one length; the first two arrays go together, and so do the last three."""

    keys: NDArray[np.int64]  # sorted
    discounted: NDArray[np.float64]  # counts less their discounts
    contexts: NDArray[np.int64]  # sorted
    totals: NDArray[np.float64]  # counts of all that follows a context
    reserved: NDArray[np.float64]  # the part of them that the discounts set free

    @classmethod
    def build(cls, keys: NDArray[np.int64], counts: NDArray[np.int64], num_symbols: int) -> _Level:
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        contexts, starts = np.unique(keys // num_symbols, return_index=True)
        return cls(
            keys=keys,
            discounted=counts - discounts,
            contexts=contexts,
            totals=np.add.reduceat(counts, starts).astype(np.float64),
            reserved=np.add.reduceat(discounts, starts),
        )

    def interpolate(
        self, keys: NDArray[np.int64], shorter: NDArray[np.float64], num_symbols: int
    ) -> NDArray[np.float64]:
        """Mix this level's estimate for each of `keys` with that of the shorter n-grams."""
        total = _look_up(self.contexts, self.totals, keys // num_symbols)
        reserved = _look_up(self.contexts, self.reserved, keys // num_symbols)
        own = _look_up(self.keys, self.discounted, keys)
        known = total > 0
        mixed = (own + reserved * shorter) / np.where(known, total, 1.0)
        return np.where(known, mixed, shorter)


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what to take off a count of 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (int((counts == value).sum()) for value in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):  # single bytes: too few of them are rare
        return np.array([0.0, 0.5, 0.5, 0.5])
    scale = n1 / (n1 + 2 * n2)
    return np.array(
        [0.0, 1 - 2 * scale * n2 / n1, 2 - 3 * scale * n3 / n2, 3 - 4 * scale * n4 / n3]
    )


def _look_up(
    keys: NDArray[np.int64], values: NDArray[np.float64], wanted: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the value of each wanted key, 0 where it is missing."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0.0)
