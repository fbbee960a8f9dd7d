from __future__ import annotations

import functools
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_cases import GOLDEN_FRAMES, SEGMENT, chord, golden_segments, noise, signals
from mt3_runtime.errors import AudioError, BundleError
from mt3_runtime.features import LogMel
from mt3_runtime.mel import mel_matrix
from mt3_runtime.specs import FeatureSpec

DDSP = FeatureSpec("ddsp", mel_norm=False)
TORCHAUDIO = FeatureSpec("torchaudio", mel_norm=False)
SPECS = {"ddsp": DDSP, "torchaudio": TORCHAUDIO}
SILENT = np.float32(math.log(1e-5))
EMPTY_FILTERS = [1, 10]
SIGNALS = signals()


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "features.npz", allow_pickle=False) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def fourier() -> np.ndarray:
    """The Fourier sum as a matrix, angles reduced to one turn before rounding: [2048, 1025] complex128."""
    turns = np.outer(np.arange(2048), np.arange(1025)) % 2048 / 2048
    return np.exp(-2j * np.pi * turns)


def log_mel(spec: FeatureSpec, samples: np.ndarray, real: int = 256) -> np.ndarray:
    return LogMel(spec)(samples[None], [real])[0]


@functools.cache
def exact_matrix(frontend: str) -> np.ndarray:
    """The filters from their definition, one weight at a time, in Python floats: [1025, 512]."""

    def to_scale(hertz: float) -> float:
        return 1127.0 * math.log1p(hertz / 700.0) if frontend == "ddsp" else hertz

    def to_mel(hertz: float) -> float:
        return 1127.0 * math.log1p(hertz / 700.0)

    step = (to_mel(7600.0) - to_mel(20.0)) / 513
    edges_hertz = [700.0 * math.expm1((to_mel(20.0) + index * step) / 1127.0) for index in range(514)]
    edges = [to_scale(hertz) for hertz in edges_hertz]
    matrix = np.zeros((1025, 512))
    for index in range(1, 1025):
        place = to_scale(index * 8000 / 1024)
        for mel in range(512):
            low, centre, high = edges[mel : mel + 3]
            if low < place <= centre:
                matrix[index, mel] = (place - low) / (centre - low)
            elif centre < place < high:
                matrix[index, mel] = (high - place) / (high - centre)
    return matrix


@pytest.mark.parametrize("frontend", SPECS)
def test_matrix_is_its_definition_in_float32(frontend: str):
    matrix, exact = mel_matrix(SPECS[frontend]), exact_matrix(frontend)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix > 0, exact > 0)
    # A mel value near 2800 is rounded to 2.4e-4 of a filter's 5.4: no float32 matrix is closer than this.
    assert np.abs(matrix - exact).max() < 1e-4


@pytest.mark.parametrize(("frontend", "source"), [("ddsp", "tensorflow"), ("torchaudio", "torchaudio")])
def test_matrix_follows_its_source(goldens: dict[str, np.ndarray], frontend: str, source: str):
    matrix = mel_matrix(SPECS[frontend])
    places, weights = goldens[f"{source}_matrix_places"], goldens[f"{source}_matrix"]
    np.testing.assert_array_equal(np.flatnonzero(matrix), places)
    ours = matrix.ravel()[places]
    assert np.abs(ours - weights).max() < 1e-4  # two roundings of a mel value
    assert np.mean(ours == weights) > 0.85  # the rest: last digits of the two logarithms
    exact = exact_matrix(frontend).ravel()[places]
    assert np.square(ours - weights).mean() < np.square(exact - weights).mean() / 4


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_empty_filters_and_used_bins(spec: FeatureSpec):
    matrix = mel_matrix(spec)
    assert np.flatnonzero(~matrix.any(axis=0)).tolist() == EMPTY_FILTERS
    assert np.flatnonzero(matrix.any(axis=1)).max() == 972
    assert not matrix[0].any()


def test_the_two_frontends_differ_as_published(goldens: dict[str, np.ndarray]):
    assert np.abs(mel_matrix(DDSP) - mel_matrix(TORCHAUDIO)).max() == pytest.approx(6.7e-4, abs=0.1e-4)
    other = np.abs(log_mel(DDSP, golden_segments()[1])[list(GOLDEN_FRAMES)] - goldens["torchaudio"][1])
    assert other.max() == pytest.approx(2.0e-3, abs=0.1e-3)
    assert other.mean() == pytest.approx(3.4e-4, abs=0.4e-4)


# The other libraries transform in float32: their own rounding is the larger part of these bounds.
@pytest.mark.parametrize(
    ("frontend", "source", "largest", "mean"),
    [
        ("ddsp", "tensorflow", 5e-4, 2e-5),
        ("torchaudio", "torchaudio", 6e-4, 1e-5),
        ("torchaudio", "librosa", 1e-3, 3e-5),
    ],
)
def test_features_equal_other_libraries(
    goldens: dict[str, np.ndarray], frontend: str, source: str, largest: float, mean: float
):
    features = LogMel(SPECS[frontend])(golden_segments(), [256] * 3)[:, GOLDEN_FRAMES]
    difference = np.abs(features - goldens[source])
    assert difference.max() < largest
    assert difference.mean() < mean


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_features_equal_the_fourier_sum(spec: FeatureSpec, name: str, fourier: np.ndarray):
    samples = SIGNALS[name]
    window = np.sin(np.pi * np.arange(2048) / 2048) ** 2
    frames = [0, 70, 78, 128, 241, 255]
    longer = np.append(samples.astype(np.float64), np.zeros(2048))
    cut = np.stack([longer[128 * frame : 128 * frame + 2048] * window for frame in frames])
    mel = np.abs(cut @ fourier) @ mel_matrix(spec).astype(np.float64)
    expected = np.log(np.where(mel > 0, mel, 1e-5))
    assert np.abs(log_mel(spec, samples)[frames] - expected).max() < 3e-6


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_sine_on_a_bin_has_a_closed_form(spec: FeatureSpec):
    # With a periodic Hann window such a sine has three bins: amplitude * 512, and half of it on each side.
    samples = (0.25 * np.cos(2 * np.pi * 300 / 2048 * np.arange(SEGMENT))).astype(np.float32)
    matrix = mel_matrix(spec).astype(np.float64)
    expected = 128.0 * matrix[300] + 64.0 * (matrix[299] + matrix[301])
    touched = expected > 0
    features = log_mel(spec, samples)[:241]
    assert touched.sum() > 2
    np.testing.assert_allclose(features[:, touched], np.log(expected[touched])[None].repeat(241, 0), atol=1e-4)
    assert (features[:, ~touched] < -10).all()


def test_frames_start_at_the_first_sample_with_a_periodic_window():
    first, last = np.zeros((2, SEGMENT), np.float32)
    first[0] = last[-1] = 1.0
    assert (log_mel(DDSP, first) == SILENT).all()  # the window starts with zero and nothing comes before frame 0
    heard = (log_mel(DDSP, last) != SILENT).any(axis=1)
    assert np.flatnonzero(heard).tolist() == list(range(240, 256))  # a symmetric window would end with zero


def test_silence_and_empty_filters_are_the_logarithm_of_the_replacement():
    assert (log_mel(DDSP, np.zeros(SEGMENT, np.float32)) == SILENT).all()
    for spec in SPECS.values():
        loud = log_mel(spec, (0.9 * noise(SEGMENT)).astype(np.float32))
        assert (loud[:, EMPTY_FILTERS] == SILENT).all()
        assert np.delete(loud, EMPTY_FILTERS, axis=1).min() > SILENT


def test_the_replacement_is_not_a_floor():
    quiet = np.delete(log_mel(DDSP, (1e-7 * noise(SEGMENT)).astype(np.float32)), EMPTY_FILTERS, axis=1)
    assert np.mean(quiet < SILENT) > 0.9
    assert quiet.min() < -20


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_normalisation_clips_then_scales(spec: FeatureSpec):
    normalised = replace(spec, mel_norm=True)
    for samples in (golden_segments()[0], (1e-6 * noise(SEGMENT)).astype(np.float32), 40 * golden_segments()[2]):
        expected = (np.minimum(np.maximum(log_mel(spec, samples).astype(np.float64), -12), 5) + 12) / 17
        np.testing.assert_allclose(log_mel(normalised, samples), expected, rtol=0, atol=1e-7)
    assert log_mel(normalised, 40 * golden_segments()[2]).max() == 1.0
    assert log_mel(normalised, (1e-6 * noise(SEGMENT)).astype(np.float32)).min() == 0.0


@pytest.mark.parametrize("mel_norm", [False, True])
@pytest.mark.parametrize("real", [0, 1, 100, 255, 256])
def test_padding_frames_are_zero_after_normalisation(mel_norm: bool, real: int):
    spec = replace(DDSP, mel_norm=mel_norm)
    silence = np.zeros(SEGMENT, np.float32)
    features = log_mel(spec, silence, real)
    value = (math.log(1e-5) + 12) / 17 if mel_norm else math.log(1e-5)
    np.testing.assert_allclose(features[:real], value, rtol=1e-6)
    assert (features[real:] == 0).all()


def test_a_segment_does_not_depend_on_its_neighbours():
    segments = np.stack([*SIGNALS.values()])
    real = [256 - index for index in range(len(segments))]
    together = LogMel(DDSP)(segments, real)
    for index in range(len(segments)):
        np.testing.assert_array_equal(
            together[index], LogMel(DDSP)(segments[index : index + 1], real[index : index + 1])[0]
        )
    reverse = LogMel(DDSP)(segments[::-1], real[::-1])
    np.testing.assert_array_equal(reverse[::-1], together)


def test_memory_does_not_grow_with_the_number_of_segments():
    transform = LogMel(DDSP)
    segments = np.zeros((24, SEGMENT), np.float32)
    segments[:] = chord(SEGMENT)
    transform(segments[:1], [256])
    extra = []
    for count in (2, 24):
        tracemalloc.start()
        result = transform(segments[:count], [256] * count)
        extra.append(tracemalloc.get_traced_memory()[1] - result.nbytes)
        tracemalloc.stop()
    assert extra[1] < extra[0] + 1e5
    assert extra[1] < 8e6


def test_no_segments_give_no_features():
    assert LogMel(DDSP)(np.zeros((0, SEGMENT), np.float32), []).shape == (0, 256, 512)


@pytest.mark.parametrize("frontend", SPECS)
def test_other_sizes(frontend: str):
    spec = FeatureSpec(
        frontend, mel_norm=False, sample_rate=8000, hop_length=100, fft_length=500, bins=40, f_min=50.0,
        f_max=3000.0, segment_samples=7000,
    )  # fmt: skip
    samples = noise(7000).astype(np.float32)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(500) / 500)
    longer = np.append(samples, np.zeros(500))
    spectrum = np.abs([np.fft.fft(longer[100 * frame : 100 * frame + 500] * window)[:251] for frame in range(70)])
    mel = spectrum @ mel_matrix(spec).astype(np.float64)
    assert (mel > 0).all()
    np.testing.assert_allclose(log_mel(spec, samples, 70), np.log(mel), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "real"),
    [
        ((SEGMENT,), [256]),
        ((1, SEGMENT - 1), [256]),
        ((2, SEGMENT), [256]),
        ((1, SEGMENT), [257]),
        ((1, SEGMENT), [-1]),
    ],
)
def test_arguments_that_do_not_fit_are_refused(shape: tuple[int, ...], real: list[int]):
    with pytest.raises(AudioError):
        LogMel(DDSP)(np.zeros(shape, np.float32), real)


@pytest.mark.parametrize("frontend", ["ddsp", "torchaudio", "yourmt3_mel"])
def test_filters_too_narrow_for_float32_are_refused(frontend: str):
    with pytest.raises(BundleError, match=r"512 mel filters .* export the bundle again$"):
        mel_matrix(FeatureSpec(frontend, mel_norm=False, f_min=7000.0, f_max=7000.01))
