"""Audio that comes in blocks -> the same segments as from the whole of it, within the memory of one block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mt3_runtime.segments import Segment, real_frames, segment_count, segment_start

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mt3_runtime.arrays import FloatArray
    from mt3_runtime.specs import FeatureSpec, VocabularySpec


def stream_segments(
    blocks: Iterable[FloatArray], features: FeatureSpec, vocabulary: VocabularySpec
) -> Iterator[Segment]:
    """Cut audio as `iter_segments` does, while it is read.

    A segment goes out when more samples have come than it holds, the last ones when the blocks are at their end: an
    error at the end of a file is raised before its last segment.

    Args:
        blocks: [samples] at `features.sample_rate`, of any lengths.
        features: hop and segment length.
        vocabulary: the grid of start times.

    Returns:
        An iterator over at least one segment, in order of time.
    """
    size = features.segment_samples
    rest, index = np.empty(0, np.float32), 0
    for block in blocks:
        rest = np.concatenate([rest, block])
        while len(rest) > size:
            yield Segment(
                index=index,
                samples=_frozen(rest[:size]),
                frames=features.segment_frames,
                start=segment_start(index, features, vocabulary),
                max_time=segment_start(index + 1, features, vocabulary),
            )
            rest, index = rest[size:], index + 1
    samples = index * size + len(rest)
    for last in range(index, count := segment_count(samples, features)):
        yield Segment(
            index=last,
            samples=_frozen(np.concatenate([rest, np.zeros(size - len(rest), np.float32)])),
            frames=real_frames(last, samples, features),
            start=segment_start(last, features, vocabulary),
            max_time=None if last == count - 1 else segment_start(last + 1, features, vocabulary),
        )
        rest = rest[:0]  # a segment of zeros may follow


def _frozen(samples: FloatArray) -> FloatArray:
    samples.flags.writeable = False
    return samples
