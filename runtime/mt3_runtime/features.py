"""Segments -> log-mel frames, with numpy alone.

Framing and `safe_log`: magenta/ddsp `spectral_ops.py`. Mel filters: TensorFlow `mel_ops.py` ("ddsp") or torchaudio
`functional.py` ("torchaudio"); normalisation: gudgud96/MR-MT3 `contrib/spectrograms.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mt3_runtime.errors import AudioError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mt3_runtime.specs import FeatureSpec

SILENCE = 1e-5  # what safe_log puts in place of a zero
NORM_FLOOR, NORM_CEILING = -12.0, 5.0  # log-mel values that normalisation maps to 0 and 1
_BAND = 32  # filters per product: neighbouring filters share bins, distant ones share none
_CHUNK = 64  # frames per transform: their spectra fit the cache


def _interpolate(first: np.float32, last: np.float32, count: int) -> NDArray[np.float32]:
    """Equal float32 steps up from `first`, the last one exact: how TensorFlow's linspace rounds."""
    points: NDArray[np.float32] = first + (last - first) / np.float32(count - 1) * np.arange(count, dtype=np.float32)
    points[-1] = last
    return points


def _interpolate_from_both_ends(first: float, last: float, count: int) -> NDArray[np.float32]:
    """Float32 steps up from `first` and down from `last`, rounded once each: how torch's linspace rounds."""
    start, end = np.float64(np.float32(first)), np.float64(np.float32(last))
    step = np.float64(np.float32((np.float32(last) - np.float32(first)) / np.float32(count - 1)))
    index = np.arange(count)
    return np.where(index < count // 2, start + step * index, end - step * (count - 1 - index)).astype(np.float32)


def _triangles(bins: NDArray[np.float32], edges: NDArray[np.float32]) -> NDArray[np.float32]:
    """Triangles between every three neighbouring `edges`, sampled at `bins`: [bins, filters]."""
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - low) / (centre - low)
    falling = (high - bins[:, None]) / (high - centre)
    return np.maximum(np.float32(0), np.minimum(rising, falling))


def _hertz_to_mel(hertz: NDArray[np.float32]) -> NDArray[np.float32]:
    ratio = np.float32(1) + hertz / np.float32(700)
    # The logarithm is rounded from float64, so that the matrix is the same on every processor.
    return np.float32(1127) * np.log(ratio.astype(np.float64)).astype(np.float32)


def _ddsp_matrix(spec: FeatureSpec, bins: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = _hertz_to_mel(np.array([spec.f_min, spec.f_max], np.float32))
    matrix = _triangles(_hertz_to_mel(bins), _interpolate(low, high, spec.bins + 2))
    matrix[0] = 0  # TensorFlow leaves the constant component out
    return matrix


def _torchaudio_matrix(spec: FeatureSpec, bins: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = (2595.0 * math.log10(1.0 + hertz / 700.0) for hertz in (spec.f_min, spec.f_max))
    mels = _interpolate_from_both_ends(low, high, spec.bins + 2) / np.float32(2595)
    powers = (10.0 ** mels.astype(np.float64)).astype(np.float32)
    return _triangles(bins, np.float32(700) * (powers - np.float32(1)))


def mel_matrix(spec: FeatureSpec) -> NDArray[np.float32]:
    """Weights from FFT bins to mel filters, without area normalisation: [fft_length // 2 + 1, bins].

    Both matrices follow their source's float32 arithmetic step by step, because that is what the weights were
    trained with: exact arithmetic differs by up to 7e-5 per weight, up to 1e-3 in log-mel.
    """
    bins = np.linspace(0, spec.sample_rate / 2, spec.fft_length // 2 + 1).astype(np.float32)
    return {"ddsp": _ddsp_matrix, "torchaudio": _torchaudio_matrix}[spec.frontend](spec, bins)


def _split(matrix: NDArray[np.float32]) -> list[tuple[slice, slice, NDArray[np.float32]]]:
    """Groups of neighbouring filters with the only bins that they use: (bins, filters, weights)."""
    bands = []
    for first in range(0, matrix.shape[1], _BAND):
        filters = slice(first, first + _BAND)
        used = np.flatnonzero(matrix[:, filters].any(axis=1))
        bins = slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)
        bands.append((bins, filters, np.ascontiguousarray(matrix[bins, filters])))
    return bands


class LogMel:
    """Log-mel features of segments, as the weights of one `FeatureSpec` expect them.

    The transform is float64: float32 buries the quiet bins beside a loud tone in rounding (log-mel off by up to
    2.2 for a sine) and saves only 0.2 ms of 2 ms per segment. A segment's features never depend on the other
    segments of a call, and memory beyond the result does not grow with their number.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        turns = np.arange(spec.fft_length) / spec.fft_length
        self._spec = spec
        self._window = 0.5 - 0.5 * np.cos(2 * np.pi * turns)
        self._bands = _split(mel_matrix(spec))

    def __call__(self, segments: NDArray[np.float32], real_frames: Sequence[int]) -> NDArray[np.float32]:
        """Compute the features of every segment.

        Args:
            segments: [segments, segment_samples].
            real_frames: for each segment, its number of real frames; later frames become 0 in the result, after
                normalisation, as in training.

        Returns:
            [segments, segment_frames, bins]

        Raises:
            AudioError: the two arguments do not fit the spec or each other.
        """
        spec = self._spec
        if segments.ndim != 2 or segments.shape[1] != spec.segment_samples:
            raise AudioError(f"segments are {segments.shape}, not [n, {spec.segment_samples}]: cut with iter_segments")
        if len(real_frames) != len(segments):
            raise AudioError(f"{len(segments)} segments but {len(real_frames)} frame counts: give one for each")
        if not all(0 <= real <= spec.segment_frames for real in real_frames):
            raise AudioError(f"real frames are outside 0 to {spec.segment_frames}: take them from iter_segments")
        result = np.empty((len(segments), spec.segment_frames, spec.bins), np.float32)
        for samples, real, features in zip(segments, real_frames, result, strict=True):
            self._fill(samples, features)
            features[real:] = 0
        return result

    def _fill(self, samples: NDArray[np.float32], features: NDArray[np.float32]) -> None:
        """Write the log-mel of one segment [segment_samples] into `features` [segment_frames, bins]."""
        frames = self._frames(samples)
        for first in range(0, len(frames), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            magnitudes = np.abs(np.fft.rfft(frames[chunk] * self._window)).astype(np.float32)  # [chunk, bins]
            for bins, filters, weights in self._bands:
                np.matmul(magnitudes[:, bins], weights, out=features[chunk, filters])
        # Not a floor: positive values below it keep their own logarithm.
        features[features <= 0] = SILENCE
        np.log(features, out=features)
        if self._spec.mel_norm:
            np.clip(features, NORM_FLOOR, NORM_CEILING, out=features)
            features -= np.float32(NORM_FLOOR)
            features /= np.float32(NORM_CEILING - NORM_FLOOR)

    def _frames(self, samples: NDArray[np.float32]) -> NDArray[np.float64]:
        """Overlapping frames of one segment, zeros after its end, no centring: [segment_frames, fft_length]."""
        spec = self._spec
        padded = np.zeros(spec.segment_samples + spec.fft_length, np.float64)
        padded[: spec.segment_samples] = samples
        frames = np.lib.stride_tricks.sliding_window_view(padded, spec.fft_length)
        return frames[:: spec.hop_length][: spec.segment_frames]


def feature_extractor(spec: FeatureSpec) -> LogMel:
    """What computes the features that `spec` describes."""
    return LogMel(spec)
