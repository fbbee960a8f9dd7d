"""What the front ends share: spectra of overlapping frames, and mel filters, with numpy alone.

Mel filters: TensorFlow `mel_ops.py` ("ddsp") or torchaudio `functional.py` (all others).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from mt3_runtime.errors import AudioError, BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from mt3_runtime.specs import FeatureSpec

_BAND = 32  # filters per product: neighbouring filters share bins, distant ones share none
_CHUNK = 64  # frames per transform: their spectra fit the cache
LOUDEST = 1e12  # samples: the power of what is louder may overflow float32


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
    if not (np.diff(edges) > 0).all():
        raise BundleError(f"{len(edges) - 2} mel filters do not fit their range in float32: export the bundle again")
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

    All matrices follow their source's float32 arithmetic step by step, because that is what the weights were
    trained with: exact arithmetic differs by up to 7e-5 per weight, up to 1e-3 in log-mel.

    Raises:
        BundleError: the filters are so narrow that float32 cannot tell their edges apart.
    """
    bins = np.linspace(0, spec.sample_rate / 2, spec.fft_length // 2 + 1).astype(np.float32)
    make = _ddsp_matrix if spec.frontend == "ddsp" else _torchaudio_matrix
    return make(spec, bins)


class MelFilters:
    """A mel matrix [fft_length // 2 + 1, bins], split into groups of filters with the only bins that they use."""

    def __init__(self, matrix: NDArray[np.float32]) -> None:
        self._bands = []
        for first in range(0, matrix.shape[1], _BAND):
            filters = slice(first, first + _BAND)
            used = np.flatnonzero(matrix[:, filters].any(axis=1))
            bins = slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)
            self._bands.append((bins, filters, np.ascontiguousarray(matrix[bins, filters])))

    def apply(self, spectra: NDArray[np.float32], result: NDArray[np.float32]) -> None:
        """Filter `spectra` [frames, fft_length // 2 + 1] into `result` [frames, bins]."""
        for bins, filters, weights in self._bands:
            np.matmul(spectra[:, bins], weights, out=result[:, filters])


class Frontend(ABC):
    """Features of segments, as the weights of one `FeatureSpec` expect them.

    The transform is float64: float32 buries the quiet bins beside a loud tone in rounding (log-mel off by up to
    2.2 for a sine) and saves little time. A segment's features never depend on the other segments of a call, and
    memory beyond the result does not grow with their number.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        turns = np.arange(spec.fft_length) / spec.fft_length
        self.spec = spec
        self._window = 0.5 - 0.5 * np.cos(2 * np.pi * turns)

    def __call__(self, segments: NDArray[np.float32], real_frames: Sequence[int]) -> NDArray[np.float32]:
        """Compute the features of every segment.

        Args:
            segments: [segments, segment_samples].
            real_frames: for each segment, its number of real frames; later frames become 0 in the result, after
                normalisation, as in training. Centred frames are all real.

        Returns:
            [segments, segment_frames, bins]

        Raises:
            AudioError: the two arguments do not fit the spec or each other, or samples are beyond all loudness.
        """
        self.check(segments, real_frames)
        spec = self.spec
        result = np.empty((len(segments), spec.segment_frames, spec.bins), np.float32)
        for samples, real, features in zip(segments, real_frames, result, strict=True):
            self._fill(samples, features)
            features[real:] = 0
        return result

    def check(self, segments: NDArray[np.float32], real_frames: Sequence[int]) -> None:
        """Refuse what has no features.

        Raises:
            AudioError: see `__call__`.
        """
        spec = self.spec
        if segments.ndim != 2 or segments.shape[1] != spec.segment_samples:
            raise AudioError(f"segments are {segments.shape}, not [n, {spec.segment_samples}]: cut with iter_segments")
        if len(real_frames) != len(segments):
            raise AudioError(f"{len(segments)} segments but {len(real_frames)} frame counts: give one for each")
        fewest, most = spec.segment_frames * spec.centred, spec.segment_frames
        if not all(fewest <= real <= most for real in real_frames):
            raise AudioError(f"real frames are outside {fewest} to {most}: take them from iter_segments")
        peak = max(segments.max(initial=0), -segments.min(initial=0))
        if not peak <= LOUDEST:
            raise AudioError(f"samples reach {peak:.0e}, which is no sound: scale the audio to -1..1")

    @abstractmethod
    def _fill(self, samples: NDArray[np.float32], features: NDArray[np.float32]) -> None:
        """Write the features of one segment [segment_samples] into `features` [segment_frames, bins]."""

    def _magnitudes(self, padded: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Magnitudes of the frames of `padded`, [chunk, fft_length // 2 + 1] at a time, with the chunk's frames."""
        spec = self.spec
        frames = np.lib.stride_tricks.sliding_window_view(padded, spec.fft_length)
        frames = frames[:: spec.hop_length][: spec.segment_frames]
        for first in range(0, len(frames), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            yield chunk, np.abs(np.fft.rfft(frames[chunk] * self._window)).astype(np.float32)
