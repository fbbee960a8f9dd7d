"""How large the numbers of an array are: counts by size, and the size that hardly any exceeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mt3_runtime.arrays import FloatArray

# A bin is an exponent and the first 8 bits of a float32's mantissa. Bins are the same whatever there is to count, so
# that counts are whole numbers, which can be added up in any order.
SHIFT = 15
BINS = 0x7F800000 >> SHIFT  # up to infinity
SIGN = 0x7FFFFFFF  # all bits of a float32 but that one


class Histogram:
    """Counts of absolute values, in bins that are at most 1/256 wider than their lower edge."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)

    def add(self, array: FloatArray) -> bool:
        """Count every number of a float32 array; False, and nothing is counted, if one is not finite."""
        if not np.isfinite(array).all():
            return False
        bits = np.ascontiguousarray(array, np.float32).view(np.int32).ravel() & SIGN
        np.add.at(self.counts, bits >> SHIFT, 1)
        return True

    def threshold(self, share: float) -> float | None:
        """The upper edge of the first bin that has `share` of all numbers in and below it; None for zeros alone.

        Zeros (and denormals beside them) do not count: they fit any range.
        """
        total = np.cumsum(self.counts[1:])
        if not total[-1]:
            return None
        place = int(np.searchsorted(total, share * total[-1])) + 1
        return float(np.array((place + 1) << SHIFT, np.int32).view(np.float32))
