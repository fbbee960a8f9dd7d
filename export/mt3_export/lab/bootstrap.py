"""Means with 95 % intervals, by resampling: how much hangs on which clips happened to be in the set.

The percentile bootstrap of B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. With
fewer than about ten clips its intervals are too narrow, and where all values are equal they have no width: it knows
of no clip but those that were heard.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from mt3_export.lab.results import Estimate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

RESAMPLES, SEED = 2000, 8
QUANTILES = (0.025, 0.975)
SCORES, LOSSES = (0.0, 1.0), (-1.0, 1.0)  # what a score, and a difference of two scores, can be
BLOCK = 1 << 20  # counts held at a time, 8 MiB
KEPT = 512  # segments up to which all counts are kept: the same number of clips comes again and again


def estimate(values: Sequence[float], bounds: tuple[float, float] = SCORES) -> Estimate | None:
    """The mean of one value per clip; the same values in the same order always give the same interval.

    A single value says nothing of how far clips differ: its interval is all that a value can be.

    Args:
        values: One per clip; None is returned where there is none.
        bounds: The smallest and the largest value there can be.

    Raises:
        ValueError: a value is not finite.
    """
    return ratio_estimate(values, [1.0] * len(values), bounds)


def ratio_estimate(
    parts: Sequence[float], wholes: Sequence[float], bounds: tuple[float, float] = SCORES
) -> Estimate | None:
    """The sum of parts over the sum of wholes, as equal tokens of all tokens; what is drawn are segments (or clips).

    Args:
        parts: One per segment.
        wholes: One per segment, 0 or more; a segment of 0 has nothing to tell and is left out.
        bounds: The smallest and the largest ratio there can be.

    Raises:
        ValueError: a number is not finite, a whole is negative, or there are more of one than of the other.
    """
    both = np.array([parts, wholes], np.float64).reshape(2, -1)  # [2, segments]
    if not np.isfinite(both).all() or (both[1] < 0).any():
        raise ValueError("parts and wholes must be finite, and wholes not negative")
    both = both[:, both[1] > 0]
    count = both.shape[1]
    if not count:
        return None
    mean = float(both[0].sum() / both[1].sum())
    if count == 1:
        return Estimate(mean, *bounds)
    blocks = _kept_counts(count) if count <= KEPT else _counts(count)
    sums = np.concatenate([block @ both.T for block in blocks])  # [RESAMPLES, 2]
    ratios = sums[:, 0] / sums[:, 1]
    low, high = (float(value) for value in np.quantile(ratios, QUANTILES))
    return Estimate(mean, min(low, mean), max(high, mean))  # rounding alone can part them where all are equal


@lru_cache(maxsize=4)
def _kept_counts(count: int) -> tuple[NDArray[np.float64], ...]:
    return tuple(_counts(count))


def _counts(count: int) -> Iterator[NDArray[np.float64]]:
    """How often each segment is drawn in a resample, some resamples at a time: [resamples, count]."""
    rng = np.random.default_rng(SEED)
    step = max(1, BLOCK // count)
    for first in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - first)
        drawn = rng.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
