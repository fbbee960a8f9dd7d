"""Audio -> segments: fixed windows of samples, each with its start time and its number of real frames.

The arithmetic follows kunato/mt3-pytorch and gudgud96/MR-MT3 `inference.py`, and for centred frames YourMT3's
`utils/audio.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mt3_runtime.errors import AudioError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from mt3_runtime.specs import FeatureSpec, VocabularySpec


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One window of audio.

    `samples` [segment_samples] is read-only and zero after the end of the audio; `frames` counts the real frames,
    the rest of the segment is padding. `start` and `max_time` (the start of the next segment, None for the last)
    are in seconds.
    """

    index: int
    samples: NDArray[np.float32]  # [segment_samples]
    frames: int
    start: float
    max_time: float | None


def frame_count(samples: int, features: FeatureSpec) -> int:
    """Frames of audio of `samples` samples, padded to whole hops.

    A whole hop of zeros is added when the length is a multiple of the hop already, as training did.
    """
    return samples // features.hop_length + 1


def segment_count(samples: int, features: FeatureSpec) -> int:
    """Segments of audio of `samples` samples; at least one, even for no samples at all.

    YourMT3 adds no segment of zeros where the audio ends with a segment.
    """
    if features.centred:
        return max(1, -(-samples // features.segment_samples))
    return -(-frame_count(samples, features) // features.segment_frames)


def segment_start(index: int, features: FeatureSpec, vocabulary: VocabularySpec) -> float:
    """Start of segment `index` in seconds, on the grid of shift steps; YourMT3's starts are on no grid.

    The float64 remainder is part of the definition: where a start falls on the grid exactly, it often comes out
    one step below (segment 15 starts at 30.71 s, not 30.72 s), and the weights' own pipeline shares that.
    """
    if features.centred:
        return features.segment_samples * index / features.sample_rate
    frames_per_second = features.sample_rate / features.hop_length
    seconds = index * features.segment_frames / frames_per_second
    return seconds - seconds % (1 / vocabulary.steps_per_second)


def iter_segments(audio: NDArray[np.float32], features: FeatureSpec, vocabulary: VocabularySpec) -> Iterator[Segment]:
    """Cut `audio` into segments, one at a time; only the last one is a copy.

    Args:
        audio: [samples] at `features.sample_rate`.
        features: hop and segment length.
        vocabulary: the grid of start times.

    Returns:
        An iterator over at least one segment, in order of time.

    Raises:
        AudioError: at once, when `audio` is not one row of float32.
    """
    if audio.ndim != 1 or audio.dtype != np.float32:
        raise AudioError(
            f"audio is {audio.dtype} of shape {audio.shape}, not one row of float32: use prepare_audio first"
        )
    return stream_segments((audio,), features, vocabulary)


def stream_segments(
    blocks: Iterable[NDArray[np.float32]], features: FeatureSpec, vocabulary: VocabularySpec
) -> Iterator[Segment]:
    """Cut audio as `iter_segments` does, while it is read, within the memory of one block.

    A segment goes out as soon as it cannot be the last one (`SegmentCutter`), the last ones when the blocks are at
    their end: an error at the end of a file is raised before its last segment.

    Args:
        blocks: [samples] at `features.sample_rate`, of any lengths; segments are views of them where they can be.
        features: hop and segment length.
        vocabulary: the grid of start times.

    Returns:
        An iterator over at least one segment, in order of time.
    """
    cutter = SegmentCutter(features, vocabulary)
    for block in blocks:
        yield from cutter.cut(block)
    yield from cutter.end()


class SegmentCutter:
    """Cuts audio that comes in blocks; holds less than a segment of it.

    MT3 lets a segment go when its last sample has come: after it there is at least one of zeros. YourMT3 lets it go
    with the first sample of the next one, as it may be the last.
    """

    def __init__(self, features: FeatureSpec, vocabulary: VocabularySpec) -> None:
        self._features, self._vocabulary = features, vocabulary
        self._least = features.segment_samples + features.centred
        self._rest, self._index = np.empty(0, np.float32), 0

    def cut(self, block: NDArray[np.float32]) -> Iterator[Segment]:
        """Yield the segments that `block` [samples] completes; views of it where they can be."""
        size = self._features.segment_samples
        self._rest = np.concatenate([self._rest, block]) if self._rest.size else block
        while len(self._rest) >= self._least:
            samples, self._rest = self._rest[:size], self._rest[size:]
            yield self._next(samples, self._features.segment_frames)

    def end(self) -> Iterator[Segment]:
        """Yield what is left: at least one segment, the last of all."""
        size = self._features.segment_samples
        total = self._index * size + len(self._rest)
        count = segment_count(total, self._features)
        while self._index < count:
            samples = np.concatenate([self._rest, np.zeros(size - len(self._rest), np.float32)])
            self._rest = self._rest[:0]  # a segment of zeros may follow
            frames = _real_frames(self._index, total, self._features)
            yield self._next(samples, frames, is_last=self._index == count - 1)

    def _next(self, samples: NDArray[np.float32], frames: int, *, is_last: bool = False) -> Segment:
        index, self._index = self._index, self._index + 1
        start, following = (segment_start(i, self._features, self._vocabulary) for i in (index, index + 1))
        return Segment(index, _frozen(samples), frames, start, None if is_last else following)


def _frozen(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    samples.flags.writeable = False
    return samples


def _real_frames(index: int, samples: int, features: FeatureSpec) -> int:
    """Centred frames all see the reflected end of their segment: none of them is padding."""
    if features.centred:
        return features.segment_frames
    return min(features.segment_frames, frame_count(samples, features) - index * features.segment_frames)
