"""Segments -> frames of features: MT3's log-mel, and the choice of a front end.

Framing and `safe_log`: magenta/ddsp `spectral_ops.py`; normalisation: gudgud96/MR-MT3 `contrib/spectrograms.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mt3_runtime.mel import Frontend, MelFilters, mel_matrix
from mt3_runtime.yourmt3_features import YourMT3Mel, YourMT3Spectrum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mt3_runtime.specs import FeatureSpec

SILENCE = 1e-5  # what safe_log puts in place of a zero
NORM_FLOOR, NORM_CEILING = -12.0, 5.0  # log-mel values that normalisation maps to 0 and 1


class LogMel(Frontend):
    """MT3's log-mel of magnitudes: frames start at their time, with zeros after the segment's end."""

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__(spec)
        self._filters = MelFilters(mel_matrix(spec))

    def _fill(self, samples: NDArray[np.float32], features: NDArray[np.float32]) -> None:
        padded = np.zeros(self.spec.segment_samples + self.spec.fft_length, np.float64)
        padded[: self.spec.segment_samples] = samples
        for frames, magnitudes in self._magnitudes(padded):
            self._filters.apply(magnitudes, features[frames])
        # Not a floor: positive values below it keep their own logarithm.
        features[features <= 0] = SILENCE
        np.log(features, out=features)
        if self.spec.mel_norm:
            np.clip(features, NORM_FLOOR, NORM_CEILING, out=features)
            features -= np.float32(NORM_FLOOR)
            features /= np.float32(NORM_CEILING - NORM_FLOOR)


def feature_extractor(spec: FeatureSpec) -> Frontend:
    """What computes the features that `spec` describes."""
    others: dict[str, type[Frontend]] = {"yourmt3_mel": YourMT3Mel, "yourmt3_spectrum": YourMT3Spectrum}
    return others.get(spec.frontend, LogMel)(spec)
