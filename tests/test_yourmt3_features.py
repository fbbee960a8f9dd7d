from __future__ import annotations

import functools
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from feature_cases import chord, noise, signals
from mt3_runtime.errors import AudioError
from mt3_runtime.features import LogMel, feature_extractor
from mt3_runtime.mel import MelFilters, mel_matrix
from mt3_runtime.specs import FeatureSpec
from mt3_runtime.yourmt3_features import YourMT3Mel, YourMT3Spectrum
from oracle.make_yourmt3_goldens import KEPT, SEGMENT_NAMES, STRIDE, golden_segments

SEGMENT = 32_767
MEL = FeatureSpec("yourmt3_mel", mel_norm=False, f_min=50.0, f_max=8000.0, segment_samples=SEGMENT)
SPECTRUM = FeatureSpec("yourmt3_spectrum", mel_norm=False, hop_length=300, bins=1024, segment_samples=SEGMENT)
SPECS = {"melspec": MEL, "spec": SPECTRUM}
both = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def click(*places: int) -> np.ndarray:
    samples = np.zeros(SEGMENT, np.float32)
    samples[list(places)] = 1.0
    return samples


SIGNALS = {name: samples[:SEGMENT] for name, samples in signals().items()} | {
    "square": np.where(np.arange(SEGMENT) // 40 % 2, 1.0, -1.0).astype(np.float32),
    "first sample": click(0),
    "samples near both ends": click(5, SEGMENT - 300),
    "int16 as floats": (20_000 * chord(SEGMENT)).astype(np.float32),
}


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "yourmt3_features.npz", allow_pickle=False) as stored:
        return dict(stored)


@functools.cache
def fourier(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the Fourier sum, angles reduced to one turn before rounding: [length, bins] each."""
    turns = np.outer(np.arange(length), np.arange(length // 2 + 1)) % length / length
    return np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)


def features(spec: FeatureSpec, samples: np.ndarray) -> np.ndarray:
    return feature_extractor(spec)(samples[None], [spec.segment_frames])[0]


def by_definition(spec: FeatureSpec, samples: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The features as sums in float64, with the samples around a frame found by folding their index."""
    length, last = spec.fft_length, spec.segment_samples - 1
    window = np.sin(np.pi * np.arange(length) / length) ** 2
    frames = range(1 + spec.segment_samples // spec.hop_length)
    index = np.abs(np.arange(length) - length // 2 + spec.hop_length * np.array(frames)[:, None])
    cut = samples.astype(np.float64)[np.where(index > last, 2 * last - index, index)] * window
    power = sum(np.square(cut @ table) for table in fourier(length))
    kept = power @ matrix if spec.frontend == "yourmt3_mel" else np.sqrt(power)[:, 1:]
    level = np.log(kept + 1e-5)
    return (level - level.min()) / (level.max() - level.min() + 0.008)


def weights(spec: FeatureSpec) -> np.ndarray:
    return mel_matrix(spec).astype(np.float64) if spec.frontend == "yourmt3_mel" else np.zeros(0)


def test_every_front_end_has_its_extractor():
    assert type(feature_extractor(MEL)) is YourMT3Mel
    assert type(feature_extractor(SPECTRUM)) is YourMT3Spectrum
    for frontend in ("ddsp", "torchaudio"):
        assert type(feature_extractor(FeatureSpec(frontend, mel_norm=False))) is LogMel


@pytest.mark.parametrize("name", SIGNALS)
@both
def test_features_equal_the_fourier_sum(spec: FeatureSpec, name: str):
    result = features(spec, SIGNALS[name])
    assert result.shape == {MEL: (256, 512), SPECTRUM: (110, 1024)}[spec]
    assert result.dtype == np.float32
    # Near silence the range is below 0.008, so that the last digit of 1 + x / 1e-5 is worth 1e-5.
    tolerance = 1e-5 if name == "very quiet noise" else 5e-7
    np.testing.assert_allclose(result, by_definition(spec, SIGNALS[name], weights(spec)), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "own_matrix", "largest"), [("melspec", True, 1e-5), ("melspec", False, 3e-7), ("spec", True, 3e-7)]
)
def test_features_equal_the_authors_module_in_float64(
    goldens: dict[str, np.ndarray], kind: str, own_matrix: bool, largest: float
):
    transform, frames = feature_extractor(SPECS[kind]), SPECS[kind].segment_frames
    if not own_matrix:  # one weight in forty has another last digit
        matrix = np.zeros((1025, 512), np.float32)
        matrix.ravel()[goldens["melspec_matrix_places"]] = goldens["melspec_matrix"]
        transform._filters = MelFilters(matrix)
    ours = transform(golden_segments(), [frames] * len(SEGMENT_NAMES))
    assert np.abs(ours[:, KEPT[kind]] - goldens[f"{kind}_exact"]).max() < largest
    for axis, name in ((2, "frame_norms"), (1, "bin_norms")):
        norms, count = np.linalg.norm(ours.astype(np.float64), axis=axis), ours.shape[axis]
        np.testing.assert_allclose(norms, goldens[f"{kind}_{name}"], rtol=1e-7, atol=largest * math.sqrt(count))


@pytest.mark.parametrize("kind", SPECS)
def test_features_are_as_near_the_authors_as_float32_allows(goldens: dict[str, np.ndarray], kind: str):
    """Their float32 spectra move the quiet bins beside a loud tone, and with the smallest one all others."""
    spec = SPECS[kind]
    ours = feature_extractor(spec)(golden_segments(), [spec.segment_frames] * len(SEGMENT_NAMES))
    authors, exact = goldens[f"{kind}_authors"], goldens[f"{kind}_exact"][..., ::STRIDE]
    error, theirs, size = (
        np.linalg.norm(array, axis=(1, 2))
        for array in (ours[:, KEPT[kind], ::STRIDE] - authors, exact - authors, exact)
    )
    assert (error <= 1.05 * theirs + 2e-6 * size).all()
    assert (error <= np.array([0.002, 0, 0.01, 2e-6, 2e-5]) * size).all()
    assert np.flatnonzero(size == 0).tolist() == [SEGMENT_NAMES.index("silence")]


def test_mel_matrix_follows_torchaudio(goldens: dict[str, np.ndarray]):
    matrix, places = mel_matrix(MEL), goldens["melspec_matrix_places"]
    assert (matrix.shape, matrix.dtype) == ((1025, 512), np.float32)
    np.testing.assert_array_equal(np.flatnonzero(matrix), places)
    difference = np.abs(matrix.ravel()[places] - goldens["melspec_matrix"])
    assert difference.max() < 5e-5  # the last digit of a frequency near 8000 Hz is 5e-4 of a triangle's 30
    assert np.mean(difference == 0) > 0.95


def test_neighbouring_mel_filters_sum_to_one():
    """Without area normalisation, between the first and the last centre; nothing at 50 Hz and 8000 Hz."""
    total, hertz = mel_matrix(MEL).sum(axis=1), np.arange(1025) * 7.8125
    first, last = (750 * (8700 / 750) ** (step / 513) - 700 for step in (1, 512))
    np.testing.assert_allclose(total[(hertz >= first) & (hertz <= last)], 1, rtol=0, atol=1e-4)
    assert not total[(hertz <= 50) | (hertz >= 8000)].any()


@both
def test_silence_is_all_zeros(spec: FeatureSpec):
    assert not features(spec, np.zeros(SEGMENT, np.float32)).any()
    assert not features(spec, np.full(SEGMENT, -0.0, np.float32)).any()
    assert not features(spec, np.full(SEGMENT, 1e-20, np.float32)).any()


def test_a_constant_is_heard_by_the_first_bin_alone():
    """A Hann window gives half of a constant to its neighbour; mel filters start above both."""
    constant = np.full(SEGMENT, 0.5, np.float32)
    spectrum = features(SPECTRUM, constant)
    level = math.log1p(256 / 1e-5)
    np.testing.assert_allclose(spectrum[:, 0], level / (level + 0.008), rtol=1e-6)
    assert not spectrum[:, 1:].any()
    assert not features(MEL, constant).any()


@pytest.mark.parametrize("place", [0, 1500, SEGMENT - 1])
def test_a_single_sample_shows_the_window_around_each_frame(place: int):
    """All magnitudes are the window's weight there; at the very ends reflection does not repeat the sample."""
    spectrum = features(SPECTRUM, click(place))
    distance = place - 300 * np.arange(110)
    weight = np.where(np.abs(distance) < 1024, np.cos(np.pi * distance / 2048) ** 2, 0)
    level = np.log1p(weight / 1e-5)
    expected = level / (level.max() + 0.008)
    np.testing.assert_allclose(spectrum, expected[:, None].repeat(1024, 1), rtol=0, atol=2e-6)


@both
@pytest.mark.parametrize("gain", [1e-9, 1e-3, 1.0, 1e4, 1e12])
def test_features_stay_within_0_and_1_at_any_loudness(spec: FeatureSpec, gain: float):
    for samples in (0.9 * noise(SEGMENT), np.where(np.arange(SEGMENT) % 80 < 40, 1.0, -1.0)):
        result = features(spec, (gain * samples).astype(np.float32))
        assert np.isfinite(result).all()
        assert result.min() == 0
        assert result.max() < 1


@pytest.mark.parametrize("value", [1.1e12, -1e30, math.inf, math.nan])
@pytest.mark.parametrize("spec", [MEL, SPECTRUM, FeatureSpec("ddsp", mel_norm=False)], ids=[*SPECS, "ddsp"])
def test_samples_beyond_all_loudness_are_refused(spec: FeatureSpec, value: float):
    segments = np.zeros((2, spec.segment_samples), np.float32)
    segments[1, 7] = value
    with pytest.raises(AudioError, match=r"scale the audio to -1\.\.1$"):
        feature_extractor(spec)(segments, [spec.segment_frames] * 2)


@both
def test_the_sign_of_the_audio_does_not_matter(spec: FeatureSpec):
    samples = SIGNALS["music"]
    np.testing.assert_array_equal(features(spec, -samples), features(spec, samples))


@pytest.mark.parametrize("frontend", ["yourmt3_mel", "yourmt3_spectrum"])
def test_reversed_audio_gives_reversed_frames(frontend: str):
    """Where the last sample is the centre of a frame: window and reflection know no direction."""
    spec = FeatureSpec(
        frontend, mel_norm=False, hop_length=100, fft_length=512, bins={"yourmt3_mel": 20}.get(frontend, 256),
        segment_samples=6001,
    )  # fmt: skip
    samples = noise(6001).astype(np.float32)
    np.testing.assert_allclose(features(spec, samples[::-1]), features(spec, samples)[::-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("samples", [251, 252, 300, 501, 7000, 7001])
@pytest.mark.parametrize("length", [500, 501])
@pytest.mark.parametrize("frontend", ["yourmt3_mel", "yourmt3_spectrum"])
def test_other_sizes_down_to_the_shortest_segment(frontend: str, length: int, samples: int):
    bins = {"yourmt3_mel": 16}.get(frontend, 250)
    spec = FeatureSpec(
        frontend, mel_norm=False, sample_rate=8000, hop_length=100, fft_length=length, bins=bins, f_min=50.0,
        f_max=3000.0, segment_samples=samples,
    )  # fmt: skip
    result = features(spec, noise(samples).astype(np.float32))
    assert result.shape == (1 + samples // 100, bins)
    expected = by_definition(spec, noise(samples).astype(np.float32), weights(spec))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


@both
def test_a_segment_does_not_depend_on_its_neighbours(spec: FeatureSpec):
    segments = np.stack([*SIGNALS.values()])
    transform, frames = feature_extractor(spec), spec.segment_frames
    together = transform(segments, [frames] * len(segments))
    for index in range(len(segments)):
        np.testing.assert_array_equal(together[index], transform(segments[index : index + 1], [frames])[0])
    np.testing.assert_array_equal(transform(segments[::-1], [frames] * len(segments))[::-1], together)


@both
def test_memory_does_not_grow_with_the_number_of_segments(spec: FeatureSpec):
    transform = feature_extractor(spec)
    segments = np.zeros((24, SEGMENT), np.float32)
    segments[:] = chord(SEGMENT)
    extra = []
    for count in (2, 24):
        tracemalloc.start()
        result = transform(segments[:count], [spec.segment_frames] * count)
        extra.append(tracemalloc.get_traced_memory()[1] - result.nbytes)
        tracemalloc.stop()
    assert extra[1] < extra[0] + 1e5
    assert extra[1] < 8e6


@both
def test_no_segments_give_no_features(spec: FeatureSpec):
    empty = feature_extractor(spec)(np.zeros((0, SEGMENT), np.float32), [])
    assert empty.shape == (0, spec.segment_frames, spec.bins)


@both
def test_arguments_that_do_not_fit_are_refused(spec: FeatureSpec):
    frames, transform = spec.segment_frames, feature_extractor(spec)
    for shape, real in (
        ((SEGMENT,), [frames]),
        ((1, SEGMENT + 1), [frames]),
        ((2, SEGMENT), [frames]),
        ((1, SEGMENT), [frames - 1]),  # no centred frame is padding
        ((1, SEGMENT), [frames + 1]),
    ):
        with pytest.raises(AudioError):
            transform(np.zeros(shape, np.float32), real)
