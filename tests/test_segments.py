from __future__ import annotations

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from mt3_runtime.errors import AudioError
from mt3_runtime.segments import frame_count, iter_segments, segment_count, segment_start
from mt3_runtime.specs import FeatureSpec, VocabularySpec

FEATURES = FeatureSpec("ddsp", mel_norm=False)
SMALL = FeatureSpec("ddsp", mel_norm=False, hop_length=4, segment_samples=12, fft_length=16, bins=4)
YOURMT3 = FeatureSpec("yourmt3_mel", mel_norm=False, f_min=50.0, f_max=8000.0, segment_samples=32_767)
SPECTRUM = FeatureSpec("yourmt3_spectrum", mel_norm=False, hop_length=300, bins=1024, segment_samples=32_767)
VOCABULARY = VocabularySpec()
LENGTHS = [0, 1, 127, 128, 129, 32_639, 32_640, 32_641, 32_767, 32_768, 32_769, 65_535, 65_536, 80_000]


def ramp(samples: int) -> np.ndarray:
    return np.arange(1, samples + 1, dtype=np.float32)


def padded_frames(audio: np.ndarray, features: FeatureSpec) -> list[np.ndarray]:
    """The published order of steps: pad, cut into hops, then count hops into segments."""
    hop = features.hop_length
    audio = np.append(audio, np.zeros(hop - len(audio) % hop, np.float32))
    frames = [audio[first : first + hop] for first in range(0, len(audio), hop)]
    return [
        np.concatenate(frames[first : first + features.segment_frames])
        for first in range(0, len(frames), features.segment_frames)
    ]


@pytest.mark.parametrize("samples", LENGTHS)
def test_segments_are_the_padded_audio(samples: int):
    audio = ramp(samples)
    expected = padded_frames(audio, FEATURES)
    segments = list(iter_segments(audio, FEATURES, VOCABULARY))
    assert len(segments) == len(expected) == segment_count(samples, FEATURES)
    assert [segment.index for segment in segments] == list(range(len(expected)))
    for segment, real in zip(segments, expected, strict=True):
        assert segment.frames == len(real) // 128
        assert segment.samples.shape == (32_768,)
        assert segment.samples.dtype == np.float32
        np.testing.assert_array_equal(segment.samples[: len(real)], real)
        assert not segment.samples[len(real) :].any()


def test_every_length_of_a_small_layout():
    for samples in range(100):
        audio = ramp(samples)
        expected = padded_frames(audio, SMALL)
        segments = list(iter_segments(audio, SMALL, VOCABULARY))
        assert [segment.frames * 4 for segment in segments] == [len(real) for real in expected]
        kept = np.concatenate([segment.samples for segment in segments])[:samples]
        np.testing.assert_array_equal(kept, audio)


@pytest.mark.parametrize(
    ("samples", "frames", "segments"),
    [(0, 1, 1), (127, 1, 1), (128, 2, 1), (32_639, 255, 1), (32_640, 256, 1), (32_767, 256, 1), (32_768, 257, 2)],
)
def test_a_whole_hop_is_added_to_whole_hops(samples: int, frames: int, segments: int):
    assert frame_count(samples, FEATURES) == frames
    assert segment_count(samples, FEATURES) == segments


def test_audio_of_whole_segments_ends_in_an_almost_empty_one():
    *_, last = iter_segments(ramp(2 * 32_768), FEATURES, VOCABULARY)
    assert (last.index, last.frames) == (2, 1)
    assert not last.samples.any()


def test_first_starts():
    starts = [segment_start(index, FEATURES, VOCABULARY) for index in range(12)]
    expected = [0, 2.04, 4.09, 6.14, 8.19, 10.24, 12.28, 14.33, 16.38, 18.43, 20.48, 22.52]
    assert starts == pytest.approx(expected, abs=1e-9)


def test_starts_share_the_float_remainder_of_the_training_code():
    one_below = []
    for index in range(2000):
        exact = Fraction(256 * index, 125) * 100 // 1  # steps of 1/100 s
        start = segment_start(index, FEATURES, VOCABULARY)
        assert abs(start * 100 - round(start * 100)) < 1e-6
        assert exact - round(start * 100) in (0, 1)
        if exact != round(start * 100):
            one_below.append(index)
    assert len(one_below) == 247
    assert one_below[:2] == [15, 30]
    assert segment_start(15, FEATURES, VOCABULARY) == pytest.approx(30.71, abs=1e-9)
    assert segment_start(30, FEATURES, VOCABULARY) == pytest.approx(61.43, abs=1e-9)


def test_each_segment_ends_where_the_next_starts():
    segments = list(iter_segments(ramp(40 * 32_768 - 1), FEATURES, VOCABULARY))
    assert len(segments) == 40
    assert [segment.max_time for segment in segments[:-1]] == [segment.start for segment in segments[1:]]
    assert segments[-1].max_time is None
    assert all(type(segment.start) is float for segment in segments)


def test_segments_are_cut_one_at_a_time_without_copies():
    audio = np.ones(200 * 32_768 + 5, np.float32)
    tracemalloc.start()
    count = sum(1 for _ in iter_segments(audio, FEATURES, VOCABULARY))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 201
    assert peak < 1 << 20
    first = next(iter_segments(audio, FEATURES, VOCABULARY))
    assert np.shares_memory(first.samples, audio)


def test_segments_cannot_change_the_audio():
    for segment in iter_segments(ramp(40_000), FEATURES, VOCABULARY):
        with pytest.raises(ValueError, match="read-only"):
            segment.samples[0] = 0.0


@pytest.mark.parametrize("audio", [np.zeros((2, 500), np.float32), np.zeros(500), np.float32(1.0)])
def test_anything_but_a_row_of_float32_is_refused_at_once(audio: np.ndarray):
    with pytest.raises(AudioError, match=r"use prepare_audio first$"):
        iter_segments(np.asarray(audio), FEATURES, VOCABULARY)


@pytest.mark.parametrize("features", [YOURMT3, SPECTRUM], ids=["mel", "spectrum"])
@pytest.mark.parametrize(
    ("samples", "segments"),
    [(0, 1), (1, 1), (32_766, 1), (32_767, 1), (32_768, 2), (65_533, 2), (65_534, 2), (65_535, 3), (98_301, 3)],
)
def test_yourmt3_adds_nothing_to_whole_segments(features: FeatureSpec, samples: int, segments: int):
    assert segment_count(samples, features) == segments
    audio = ramp(samples)
    cut = list(iter_segments(audio, features, VOCABULARY))
    assert [segment.index for segment in cut] == list(range(segments))
    joined = np.concatenate([segment.samples for segment in cut])
    assert (joined.shape, joined.dtype) == ((32_767 * segments,), np.float32)
    np.testing.assert_array_equal(joined[:samples], audio)
    assert not joined[samples:].any()
    frames = {YOURMT3: 256, SPECTRUM: 110}[features]
    assert [segment.frames for segment in cut] == [frames] * segments  # the padded end too: no frame is masked


def test_yourmt3_counts_every_length():
    small = FeatureSpec("yourmt3_mel", mel_norm=False, hop_length=3, fft_length=16, bins=4, segment_samples=11)
    for samples in range(1, 100):
        cut = list(iter_segments(ramp(samples), small, VOCABULARY))
        assert len(cut) == len(range(0, samples, 11)) == segment_count(samples, small)
        assert all(segment.samples.any() for segment in cut)


@pytest.mark.parametrize("steps_per_second", [100, 7])
def test_yourmt3_starts_are_on_no_grid(steps_per_second: int):
    vocabulary = VocabularySpec(steps_per_second=steps_per_second)
    for index in range(5000):
        assert segment_start(index, YOURMT3, vocabulary) == float(Fraction(32_767 * index, 16_000))
    cut = list(iter_segments(ramp(3 * 32_767), YOURMT3, vocabulary))
    assert [segment.start for segment in cut] == [0.0, 2.0479375, 4.095875]
    assert [segment.max_time for segment in cut] == [2.0479375, 4.095875, None]
    assert all(type(segment.start) is float for segment in cut)


def test_yourmt3_segments_are_cut_without_copies_and_read_only():
    audio = ramp(40_000)
    first, last = iter_segments(audio, YOURMT3, VOCABULARY)
    assert np.shares_memory(first.samples, audio)
    assert not np.shares_memory(last.samples, audio)
    for segment in (first, last):
        with pytest.raises(ValueError, match="read-only"):
            segment.samples[0] = 0.0
