"""Numbers that were measured on a sample of texts, and how far they can be trusted.

Every metric here is a ratio of sums over units (a sum of losses by a number of tokens), so one
bootstrap serves them all. Units are whole windows or texts, never tokens: neighbouring tokens tell
of each other, and an interval made from them would be far too narrow.

Letters: U units, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

# With fewer units the spread of resamples says little of the spread of samples.
MIN_UNITS = 8
_NUM_RESAMPLES = 2000
_PERCENTILES = (2.5, 97.5)
_LARGEST_EXPONENT = 700.0  # what a float can still hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number and its 95 % interval; without one where there were too few units to tell."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_bounded(self) -> bool:
        """Say if there is an interval."""
        return self.low is not None and self.high is not None

    def may_be(self, value: float) -> bool:
        """Say if `value` cannot be told from what was measured."""
        return self.low is None or self.high is None or self.low <= value <= self.high


def perplexity_of(loss: float) -> float:
    """Return e to the mean loss; a hopeless model gets a huge number, not an overflow."""
    return math.exp(min(loss, _LARGEST_EXPONENT))


class Bootstrap:
    """Percentile intervals from units drawn with replacement (Efron 1979).

    All estimates of one object share their draws: what is compared is compared on the same texts.
    """

    def __init__(self, num_units: int, *, seed: int) -> None:
        self._counts_RU: NDArray[np.float64] | None = None
        if num_units >= MIN_UNITS:
            share = np.full(num_units, 1 / num_units)
            draws = np.random.default_rng(seed).multinomial(num_units, share, _NUM_RESAMPLES)
            self._counts_RU = draws.astype(np.float64)

    def estimate(
        self,
        sums_U: ArrayLike,
        sizes_U: ArrayLike | None = None,
        *,
        become: Callable[[float], float] = float,
    ) -> Estimate:
        """Return `become(sum of sums / sum of sizes)` with its interval.

        Args:
            sums_U: what each unit adds, for example its losses.
            sizes_U: how much of it there is, for example tokens; None: one each.
            become: a monotonic function, for example from a mean loss to a perplexity.
        """
        sums = np.asarray(sums_U, dtype=np.float64)
        sizes = np.ones_like(sums) if sizes_U is None else np.asarray(sizes_U, dtype=np.float64)
        value = become(float(sums.sum() / sizes.sum()))
        if self._counts_RU is None:
            return Estimate(value=value)
        means_R = (self._counts_RU @ sums) / (self._counts_RU @ sizes)
        low, high = (become(float(mean)) for mean in np.percentile(means_R, _PERCENTILES))
        return Estimate(value=value, low=min(low, high), high=max(low, high))
