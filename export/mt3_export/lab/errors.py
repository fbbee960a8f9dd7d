"""How far arrays are from fp32's, summed up over many of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mt3_runtime.arrays import FloatArray


class ErrorSums:
    """Differences of pairs of arrays; numbers that are not finite are counted, and taken for 0."""

    def __init__(self) -> None:
        self.max = self.peak = 0.0
        self.non_finite = 0
        self._count = 0
        self._difference = self._wanted = self._found = self._product = 0.0

    def add(self, wanted: FloatArray, found: FloatArray) -> None:
        """One more array, and what it should be; both of one shape."""
        finite = np.isfinite(found)
        self.non_finite += int(found.size - finite.sum())
        a, b = wanted.astype(np.float64).ravel(), np.where(finite, found, 0).astype(np.float64).ravel()
        if not a.size:
            return
        difference = b - a
        self.max = max(self.max, float(np.abs(difference).max()))
        self.peak = max(self.peak, float(np.abs(a).max()))
        self._count += a.size
        self._difference += float(difference @ difference)
        self._wanted += float(a @ a)
        self._found += float(b @ b)
        self._product += float(a @ b)

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of what is wanted; 1 where all that is wanted is 0, and it is not."""
        if not self._wanted:
            return float(self._difference > 0)
        return math.sqrt(self._difference / self._wanted)

    @property
    def cosine(self) -> float:
        """Of the angle between what is wanted and what was found; 1 where both are zero."""
        norms = math.sqrt(self._wanted * self._found)
        return min(1.0, max(-1.0, self._product / norms)) if norms else float(not (self._wanted or self._found))

    @property
    def psnr_db(self) -> float | None:
        """Peak of what is wanted over the root mean square difference, in dB; None if there is no difference."""
        if not self._difference or not self.peak:
            return None
        return 20 * math.log10(self.peak) - 10 * math.log10(self._difference / self._count)
