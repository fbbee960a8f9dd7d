"""Segments -> YourMT3's two spectrograms, with numpy alone.

The arithmetic follows YourMT3 `model/spectrogram.py`, `model/ops.py` and torchaudio's `Spectrogram`: frames centred
on their time, the segment reflected at both ends, every segment scaled by its own range.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from mt3_runtime.mel import Frontend, MelFilters, mel_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mt3_runtime.specs import FeatureSpec

OFFSET = 1e-5  # added before the logarithm
LEAST_RANGE = 0.008  # added to a segment's range, in natural logarithms: silence stays finite


def scale_by_range(features: NDArray[np.float32]) -> None:
    """Turn one segment's powers or magnitudes [frames, bins] into their logarithms, scaled to 0..1, in place."""
    # ln(x + OFFSET) less the constant ln(OFFSET), which the smallest value takes away again: near silence, where all
    # that counts is x / OFFSET, the sum and its logarithm would be rounded 15 times as coarsely.
    features *= np.float32(1 / OFFSET)
    features += np.float32(1)
    np.log(features, out=features)
    features -= features.min()
    features /= features.max() + np.float32(LEAST_RANGE)


class _CentredFrontend(Frontend):
    """Spectra of a reflected segment, scaled by its range."""

    def _fill(self, samples: NDArray[np.float32], features: NDArray[np.float32]) -> None:
        before = self.spec.fft_length // 2
        padded = np.pad(samples.astype(np.float64), (before, self.spec.fft_length - before), mode="reflect")
        for frames, magnitudes in self._magnitudes(padded):
            self._project(magnitudes, features[frames])
        scale_by_range(features)

    @abstractmethod
    def _project(self, magnitudes: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        """Bring `magnitudes` [frames, fft_length // 2 + 1], which may be lost, into `result` [frames, bins]."""


class YourMT3Mel(_CentredFrontend):
    """Log-mel of powers: what YMT3+ reads."""

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__(spec)
        self._filters = MelFilters(mel_matrix(spec))

    def _project(self, magnitudes: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        self._filters.apply(np.square(magnitudes, out=magnitudes), result)


class YourMT3Spectrum(_CentredFrontend):
    """Log of magnitudes without the constant component: what the YPTF models read."""

    def _project(self, magnitudes: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        result[:] = magnitudes[:, 1:]
