from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soxr

from audio_cases import FORMATS, LOSSLESS, encode, melody, wav
from mt3_runtime import audio
from mt3_runtime.audio import AudioLimits, load_audio, prepare_audio
from mt3_runtime.errors import AudioError, OptionError

if TYPE_CHECKING:
    from pathlib import Path


def save(folder: Path, data: bytes) -> Path:
    path = folder / "sound.bin"  # no hint from the name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_files_at_the_models_rate_come_back(tmp_path: Path, name: str):
    container, codec, tolerance = FORMATS[name]
    samples = melody(5002)
    result = load_audio(save(tmp_path, encode(samples, 16_000, container, codec)))
    assert result.dtype == np.float32
    assert result.shape == (5002,)
    assert np.abs(result - samples).max() <= tolerance


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in LOSSLESS])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_lossy_files_keep_length_and_sound(tmp_path: Path, name: str, rate: int):
    container, codec, _ = FORMATS[name]
    seconds = np.arange(rate) / rate
    result = load_audio(save(tmp_path, encode(0.5 * np.sin(2 * np.pi * 440 * seconds), rate, container, codec)))
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert result.shape == (16_000,)
    assert np.abs(result - expected)[2000:-2000].max() < 0.03  # one sample of shift would be 0.08


def test_samples_of_files_written_by_hand(tmp_path: Path):
    values = np.random.default_rng(3).integers(-(2**23), 2**23, 500)
    values[:2] = -(2**23), 2**23 - 1
    exact = values / 2**23
    packed = {
        8: ((values >> 16) + 128).astype(np.uint8).tobytes(),
        16: (values >> 8).astype("<i2").tobytes(),
        24: b"".join(int(value).to_bytes(3, "little", signed=True) for value in values),
        32: (values << 8).astype("<i4").tobytes(),
    }
    for bits, data in packed.items():
        result = load_audio(save(tmp_path, wav(data, bits=bits)))
        kept = (values >> max(0, 24 - bits)) / 2.0 ** min(bits - 1, 23)
        np.testing.assert_array_equal(result, kept.astype(np.float32))
    for bits, kind in ((32, "<f4"), (64, "<f8")):
        result = load_audio(save(tmp_path, wav(exact.astype(kind).tobytes(), bits=bits, tag=3)))
        np.testing.assert_array_equal(result, exact.astype(np.float32))


@pytest.mark.parametrize("channels", [2, 3, 6, 8])
def test_channels_are_averaged(tmp_path: Path, channels: int):
    values = np.random.default_rng(channels).integers(-32768, 32768, (700, channels)).astype("<i2")
    expected = values.astype(np.float64).mean(axis=1) / 32768
    result = load_audio(save(tmp_path, wav(values.tobytes(), channels=channels)))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-7)
    np.testing.assert_array_equal(prepare_audio(values, 16_000), result)


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 96_000, 191_999, 192_000])
def test_resampling_keeps_a_tone_and_the_duration(rate: int):
    seconds = np.arange(rate) / rate
    result = prepare_audio(0.5 * np.sin(2 * np.pi * 1000 * seconds + 0.3), rate)
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(len(result)) / 16_000 + 0.3)
    assert len(result) == 16_000
    assert np.abs(result - expected)[500:-500].max() < 2e-5


def test_resampling_removes_what_would_fold_back():
    seconds = np.arange(44_100) / 44_100
    result = prepare_audio(0.5 * np.sin(2 * np.pi * 8500 * seconds), 44_100)
    assert np.abs(result[500:-500]).max() < 1e-6


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 191_999])
@pytest.mark.parametrize("values", [1000, 4096, 1 << 18])
def test_blocks_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, values: int):
    stereo = np.stack([melody(40_000, rate), melody(40_000, rate, seed=1)], axis=1)
    mono = (stereo[:, 0] + stereo[:, 1]) / 2
    expected = mono if rate == 16_000 else soxr.resample(mono, rate, 16_000, quality="HQ")
    monkeypatch.setattr(audio, "_BLOCK_VALUES", values)
    for result in (load_audio(save(tmp_path, encode(stereo, rate, "WAV", "FLOAT"))), prepare_audio(stereo, rate)):
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_in_blocks_is_exact_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    container, codec, _ = FORMATS[name]
    path = save(tmp_path, encode(melody(30_000), 16_000, container, codec))
    whole = load_audio(path)
    np.testing.assert_array_equal(load_audio(path), whole)
    monkeypatch.setattr(audio, "_BLOCK_VALUES", 777)
    # The MP3 decoder adds its overlapping windows in another order after each block: one or two float32 steps.
    np.testing.assert_allclose(load_audio(path), whole, rtol=0, atol=2.5e-7 if name == "mp3" else 0)


def test_other_target_rates(tmp_path: Path):
    path = save(tmp_path, encode(melody(16_000), 16_000, "FLAC", "PCM_16"))
    assert len(load_audio(path, sample_rate=22_050)) == 22_050
    for bad in (0, -1, 16_000.0, True, None, "16000"):
        with pytest.raises(OptionError, match=r"whole number of Hz$"):
            load_audio(path, sample_rate=bad)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([-128, 0, 127], np.int8, [-1, 0, 127 / 128]),
        ([0, 128, 255], np.uint8, [-1, 0, 127 / 128]),
        ([-32768, 0, 32767], np.int16, [-1, 0, 32767 / 32768]),
        ([-(2**31), 0, 2**31 - 1], np.int32, [-1, 0, 1]),
        ([-1.5, 0.25, 1.0], np.float16, [-1.5, 0.25, 1.0]),
        ([-1.5, 0.1, 1.0], np.float32, [-1.5, 0.1, 1.0]),
        ([-1.5, 0.1, 1.0], np.float64, [-1.5, 0.1, 1.0]),
        ([-1.5, 0.1, 1.0], ">f4", [-1.5, 0.1, 1.0]),
    ],
)
def test_arrays_of_every_type(values: list[float], kind: object, expected: list[float]):
    result = prepare_audio(np.tile(np.array(values, kind), 50), 16_000)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.tile(np.array(expected, np.float32), 50))


def test_layout_does_not_matter_and_nothing_is_shared():
    stereo = np.stack([melody(3000), melody(3000, seed=1)], axis=1)
    expected = prepare_audio(stereo, 44_100)
    np.testing.assert_array_equal(prepare_audio(np.asfortranarray(stereo), 44_100), expected)
    np.testing.assert_array_equal(prepare_audio(stereo.repeat(2, axis=0)[::2], 44_100), expected)
    np.testing.assert_array_equal(
        prepare_audio(stereo.tolist(), 44_100), prepare_audio(stereo.astype(np.float64), 44_100)
    )
    mono = melody(1000)
    kept = mono.copy()
    prepare_audio(mono, 16_000)[:] = 9.0
    np.testing.assert_array_equal(mono, kept)


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (np.zeros(0, np.float32), 16_000, "0 samples"),
        (np.zeros(127, np.float32), 16_000, "127 samples"),
        (np.zeros(300, np.float32), 44_100, "109 samples"),
        (np.zeros((0, 2), np.float32), 44_100, "0 samples"),
        (np.zeros((200, 0), np.float32), 16_000, "0 channels"),
        (np.zeros((2, 16_000), np.float32), 16_000, "16000 channels"),
        (np.zeros((2, 3, 4), np.float32), 16_000, r"shape \(2, 3, 4\)"),
        (np.float32(1), 16_000, "shape"),
        ([[1.0, 2.0], [3.0]], 16_000, "ragged"),
        ("sound.wav", 16_000, "shape"),
        (["a", "b"], 16_000, "type"),
        ([None, 1.0], 16_000, "type object"),
        (np.zeros(500, np.int64), 16_000, "type int64"),
        (np.zeros(500, np.uint16), 16_000, "type uint16"),
        (np.zeros(500, bool), 16_000, "type bool"),
        (np.zeros(500, complex), 16_000, "type complex128"),
        (np.zeros(500, np.float32), 7_999, "7999 Hz"),
        (np.zeros(500, np.float32), 192_001, "192001 Hz"),
        (np.zeros(500, np.float32), 0, "rate 0"),
        (np.zeros(500, np.float32), -16_000, "rate -16000"),
        (np.zeros(500, np.float32), 44_100.0, "rate 44100.0"),
        (np.zeros(500, np.float32), True, "rate True"),
        (np.zeros(500, np.float32), None, "rate None"),
    ],
)
def test_arrays_that_are_refused(samples: object, rate: object, words: str):
    with pytest.raises(AudioError, match=words) as caught:
        prepare_audio(samples, rate)
    assert len(str(caught.value).splitlines()) == 1
    assert ": " in str(caught.value)  # what is wrong, then what to do


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 150_000, 299_999])
def test_samples_that_are_not_finite_are_refused(tmp_path: Path, rate: int, bad: float, place: int):
    stereo = np.zeros((300_000, 2), np.float32)
    stereo[place, 1] = bad
    with pytest.raises(AudioError, match="NaN or infinite"):
        prepare_audio(stereo, rate)
    if place == 299_999:
        with pytest.raises(AudioError, match="NaN or infinite"):
            load_audio(save(tmp_path, encode(stereo, rate, "WAV", "FLOAT")))


def test_samples_beyond_float32_are_refused(tmp_path: Path):
    for samples in (np.full(500, 1e300), np.full((500, 2), 3e38, np.float32), np.array([[np.inf, -np.inf]] * 500)):
        with pytest.raises(AudioError, match="NaN or infinite"):
            prepare_audio(samples, 16_000)
    with pytest.raises(AudioError, match="NaN or infinite"):
        load_audio(save(tmp_path, encode(np.full(500, 1e300), 16_000, "WAV", "DOUBLE")))


@pytest.mark.parametrize("value", [1e-45, 1e-39, 1e-30, 1e4])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_tiny_and_large_samples_are_audio(value: float, rate: int):
    result = prepare_audio(np.full(2000, value, np.float32), rate)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result[300:400], np.float32(value), rtol=1e-3, atol=1e-38)


def test_the_shortest_audio_is_one_hop(tmp_path: Path):
    assert len(prepare_audio(np.zeros(128, np.float32), 16_000)) == 128
    assert len(load_audio(save(tmp_path, wav(bytes(256))))) == 128
    assert len(prepare_audio(np.zeros(3, np.float32), 16_000, limits=AudioLimits(min_samples=3))) == 3
    for samples in (0, 1, 2, 127):
        with pytest.raises(AudioError, match=f"{samples} samples.*give longer audio$"):
            load_audio(save(tmp_path, wav(bytes(2 * samples))))


def test_limits_are_exact(tmp_path: Path):
    path = save(tmp_path, encode(np.zeros((44_100, 2), np.float32), 44_100, "FLAC", "PCM_16"))
    at, below = AudioLimits(max_seconds=1.0), AudioLimits(max_seconds=1 - 1e-5)
    assert len(load_audio(path, limits=at)) == 16_000
    with pytest.raises(AudioError, match=r"lasts 1\.0 s.*split it"):
        load_audio(path, limits=below)
    size = 44_100 * 2 * 4
    assert len(load_audio(path, limits=AudioLimits(max_decoded_bytes=size))) == 16_000
    with pytest.raises(AudioError, match=f"decodes to {size} bytes"):
        load_audio(path, limits=AudioLimits(max_decoded_bytes=size - 1))
    with pytest.raises(AudioError, match=r"2 channels.*mono first$"):
        load_audio(path, limits=AudioLimits(max_channels=1))
    with pytest.raises(AudioError, match=r"44100 Hz.*resample it first$"):
        load_audio(path, limits=AudioLimits(max_rate=44_099))


@pytest.mark.parametrize("name", list(inspect.signature(AudioLimits).parameters))
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "8"])
def test_limits_must_be_positive_numbers(name: str, value: object):
    with pytest.raises(OptionError, match=rf"AudioLimits\.{name} .*positive number$"):
        AudioLimits(**{name: value})
