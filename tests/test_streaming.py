"""Segments of audio that comes in blocks are those of the whole audio, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from mt3_runtime.segments import iter_segments, stream_segments
from mt3_runtime.specs import FeatureSpec, VocabularySpec

VOCABULARY = VocabularySpec()
MT3 = FeatureSpec("ddsp", mel_norm=False, hop_length=4, segment_samples=12, fft_length=16, bins=4)
YOURMT3 = FeatureSpec("yourmt3_spectrum", mel_norm=False, hop_length=3, segment_samples=11, fft_length=16, bins=8)


def ramp(samples):
    return np.arange(1, samples + 1, dtype=np.float32)


def split(audio, sizes):
    """Cut audio into blocks of these sizes, over and over."""
    first, index = 0, 0
    while first < len(audio):
        size = sizes[index % len(sizes)]
        yield audio[first : first + size].copy()
        first, index = first + size, index + 1


def assert_same(streamed, whole):
    streamed, whole = list(streamed), list(whole)
    assert len(streamed) == len(whole)
    for one, other in zip(streamed, whole, strict=True):
        assert (one.index, one.frames, one.start, one.max_time) == (
            other.index, other.frames, other.start, other.max_time,
        )  # fmt: skip
        assert one.samples.dtype == np.float32
        np.testing.assert_array_equal(one.samples, other.samples)


@pytest.mark.parametrize("features", [MT3, YOURMT3], ids=["mt3", "yourmt3"])
@pytest.mark.parametrize("sizes", [[1], [5, 0, 2], [11], [12], [13, 1], [40], [1000]])
def test_every_length_in_blocks_of_any_size(features, sizes):
    for samples in range(100):
        audio = ramp(samples)
        assert_same(
            stream_segments(split(audio, sizes), features, VOCABULARY), iter_segments(audio, features, VOCABULARY)
        )


@pytest.mark.parametrize("samples", [1, 32_767, 32_768, 32_769, 2 * 32_767, 2 * 32_768, 300_000])
@pytest.mark.parametrize(
    "features",
    [
        FeatureSpec("ddsp", mel_norm=False),
        FeatureSpec("yourmt3_spectrum", mel_norm=False, hop_length=300, segment_samples=32_767, bins=1024),
    ],
    ids=["mt3", "yourmt3"],
)
def test_the_real_sizes(features, samples):
    audio = ramp(samples)
    assert_same(
        stream_segments(split(audio, [100_000]), features, VOCABULARY), iter_segments(audio, features, VOCABULARY)
    )


def test_segments_go_out_before_the_rest_is_read():
    taken = []

    def blocks():
        for index in range(100):
            taken.append(index)
            yield ramp(6)

    segments = stream_segments(blocks(), MT3, VOCABULARY)
    assert taken == []
    for index in range(40):
        assert next(segments).index == index
        assert len(taken) == 2 * (index + 1)  # two blocks are a segment, and zeros follow the last one of all


def test_segments_cannot_be_changed_and_do_not_change():
    segments = list(stream_segments(split(ramp(100), [7]), MT3, VOCABULARY))
    np.testing.assert_array_equal(np.concatenate([each.samples for each in segments])[:100], ramp(100))
    for segment in segments:
        with pytest.raises(ValueError, match="read-only"):
            segment.samples[0] = 0.0


def test_an_error_of_the_source_comes_before_the_last_segment():
    def blocks():
        yield ramp(36)
        raise OSError("gone")

    segments, found = stream_segments(blocks(), MT3, VOCABULARY), []
    with pytest.raises(OSError, match="gone"):
        found.extend(segment.index for segment in segments)
    assert found == [0, 1, 2]  # a last one of zeros would have followed
