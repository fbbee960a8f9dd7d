from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from audio_cases import FORMATS, LOSSLESS, REFUSED, encode, flac_with_length, melody, wav
from bundle_cases import no_open_files_left
from mt3_runtime import audio, containers
from mt3_runtime.audio import load_audio, open_audio
from mt3_runtime.errors import AudioError

HERE = Path(__file__).parent
MORE = "more data than its header states"
CUT = "cut short"


def save(folder: Path, data: bytes, name: str = "sound.bin") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def refusal(path: Path | str) -> str:
    """The one line that refuses a file."""
    with pytest.raises(AudioError) as caught:
        load_audio(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(repr(os.fspath(path)))
    assert ": " in text  # what is wrong, then what to do
    return text


def test_paths_that_are_not_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert refusal(tmp_path / "missing.wav").endswith("does not exist: check the path")
    assert refusal(tmp_path / "dangling").endswith("does not exist: check the path")
    assert refusal(tmp_path).endswith("is a folder: give one sound file")
    assert refusal(tmp_path / "pipe").endswith("save the sound to a file first")
    assert refusal("/dev/null").endswith("save the sound to a file first")
    assert "cannot be opened" in refusal(tmp_path / "loop")
    assert "cannot be opened" in refusal(tmp_path / ("x" * 300))
    assert "cannot be opened" in refusal(str(tmp_path / "nul\0.wav"))

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path, wav(bytes(500)))
    monkeypatch.setattr(os, "open", refuse)
    assert refusal(path).endswith("(Permission denied): check the path and its permissions")


def test_paths_of_every_kind(tmp_path: Path):
    path = save(tmp_path, encode(melody(500), 16_000, "WAV", "PCM_16"), "a\nb \N{MUSICAL SYMBOL G CLEF}.txt")
    (tmp_path / "link").symlink_to(path)
    expected = load_audio(path)
    np.testing.assert_array_equal(load_audio(str(path)), expected)
    np.testing.assert_array_equal(load_audio(tmp_path / "link"), expected)
    path.write_bytes(b"no sound")
    refusal(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"R", b"Once upon a time, " * 20, bytes(5000), b"RIFF", b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS", b"ID3\4\0\0",
     b"\xff\xfb\x90\x00", b"MThd\0\0\0\6\0\0\0\1\0\xdc", b"\0\0\0\x20ftypM4A \0\0\0\0" * 9, b"ID3\4\0\0\0\0\0\0" * 30,
     b"ID3\4\0\0\x7f\x7f\x7f\x7f" * 30, b"FORM\0\0\0\4AIFF", b"RF64\xff\xff\xff\xffWAVEds64"],
)  # fmt: skip
def test_bytes_that_are_no_sound(tmp_path: Path, data: bytes):
    assert any(fix in refusal(save(tmp_path, data, "song.wav")) for fix in ("convert it", "again", "complete copy"))


@pytest.mark.parametrize(("container", "codec"), REFUSED)
def test_other_formats_are_refused(tmp_path: Path, container: str, codec: str):
    assert "convert it" in refusal(save(tmp_path, encode(melody(4000), 16_000, container, codec), "song.wav"))


def test_other_containers_never_reach_a_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    others = [
        encode(melody(4000), 16_000, container, codec)
        for container, codec in REFUSED
        if container not in ("WAV", "AIFF")
    ]
    monkeypatch.setattr(audio.soundfile, "SoundFile", None)  # cannot be called
    for data in others:
        assert "is not WAV" in refusal(save(tmp_path, data))
        assert "is not WAV" in refusal(save(tmp_path, b"ID3\4\0\0\0\0\0\5" + bytes(5) + data))
    with pytest.raises(TypeError):
        load_audio(save(tmp_path, wav(bytes(500))))


@pytest.mark.parametrize("name", FORMATS)
def test_cut_files_are_refused(tmp_path: Path, name: str):
    container, codec, _ = FORMATS[name]
    data = encode(melody(40_000), 16_000, container, codec)
    for part in np.linspace(0.01, 0.93, 20):
        text = refusal(save(tmp_path, data[: int(part * len(data))]))
        assert any(fix in text for fix in ("complete copy", "convert it", "longer audio"))
    if name in LOSSLESS:
        refusal(save(tmp_path, data[:-1]))


@pytest.mark.parametrize("stated", [0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F000, 0x8000_0000])
def test_a_size_put_down_by_a_writer_to_a_pipe_means_to_the_end(tmp_path: Path, stated: int):
    values = np.random.default_rng(0).integers(-32768, 32768, 30_000).astype("<i2")
    result = load_audio(save(tmp_path, wav(values.tobytes(), size=stated)))
    np.testing.assert_array_equal(result, values / np.float32(32768))


def test_wav_and_aiff_headers_that_lie(tmp_path: Path):
    values = np.random.default_rng(0).integers(-32768, 32768, 30_000)
    little, big = values.astype("<i2").tobytes(), values.astype(">i2").tobytes()
    aiff = encode(values.astype(np.int16), 16_000, "AIFF", "PCM_16")
    assert aiff.endswith(big)
    place = aiff.index(b"SSND") + 4
    for stated, words in ((0, MORE), (1000, MORE), (40_000, MORE), (60_002, CUT), (2**30, CUT)):
        assert words in refusal(save(tmp_path, wav(little, size=stated)))
        if stated:  # libsndfile reads an AIFF of size 0 to its end
            sized = aiff[:place] + struct.pack(">I", stated + 8) + aiff[place + 4 :]
            assert words in refusal(save(tmp_path, sized))
    frames = aiff.index(b"COMM") + 10
    for stated in (0, 10, 2**31):  # the count of frames decides nothing: the size of the data does
        counted = aiff[:frames] + struct.pack(">I", stated) + aiff[frames + 4 :]
        np.testing.assert_array_equal(load_audio(save(tmp_path, counted)), values / np.float32(32768))


def test_rf64_headers_that_lie(tmp_path: Path):
    data = encode(melody(30_000), 16_000, "RF64", "PCM_16")
    place = data.index(b"ds64") + 16
    assert struct.unpack("<Q", data[place : place + 8]) == (60_000,)
    for stated, words in ((1000, MORE), (60_002, CUT), (2**32 - 2, CUT), (2**62, CUT), (2**63 - 2, "")):
        assert words in refusal(save(tmp_path, data[:place] + struct.pack("<Q", stated) + data[place + 8 :]))


def test_flac_headers_that_lie(tmp_path: Path):
    data = encode(melody(60_000), 16_000, "FLAC", "PCM_16")
    np.testing.assert_array_equal(
        load_audio(save(tmp_path, flac_with_length(data, 60_000))), load_audio(save(tmp_path, data))
    )
    assert MORE in refusal(save(tmp_path, flac_with_length(data, 20_000)))
    for stated in (60_001, 120_000):
        assert "cannot be decoded" in refusal(save(tmp_path, flac_with_length(data, stated)))
    for stated in (2**36 - 1, 4 * 3600 * 16_000 + 1):
        assert "split it" in refusal(save(tmp_path, flac_with_length(data, stated)))
    assert "does not state its length" in refusal(save(tmp_path, flac_with_length(data, 0)))


def test_what_follows_the_sound_is_not_sound(tmp_path: Path):
    samples = melody(20_000)
    notes = b"LIST" + struct.pack("<I", 26) + b"INFOICMT" + struct.pack("<I", 14) + b"a fine melody\0"
    for container, codec in (("WAV", "PCM_16"), ("AIFF", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")):
        data = encode(samples, 16_000, container, codec)
        expected = load_audio(save(tmp_path, data))
        for extra in (notes, b"TAG" + bytes(125), bytes(10_000), b"\x93" * 300):
            np.testing.assert_array_equal(load_audio(save(tmp_path, data + extra)), expected)
        if container != "MP3":
            assert MORE in refusal(save(tmp_path, data + b"\x93" * 30_000))
    for container, codec in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")):
        data = encode(samples, 16_000, container, codec)
        expected = load_audio(save(tmp_path, data))
        tag = b"ID3\4\0\0\0\0\3\1" + bytes(385)  # seven bits per byte: 3 * 128 + 1
        np.testing.assert_array_equal(load_audio(save(tmp_path, tag + data)), expected)


def test_chunks_around_the_sound(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 256, 20_001).astype(np.uint8)
    expected = (values - np.float32(128)) / 128
    data = wav(values.tobytes(), bits=8)
    before = data[:36] + b"note" + struct.pack("<I", 5) + b"hello\0" + data[36:]
    np.testing.assert_array_equal(load_audio(save(tmp_path, before)), expected)
    assert CUT in refusal(save(tmp_path, before[:-1]))
    notes = b"note" + struct.pack("<I", 30_000) + bytes(30_000)
    for pad in (b"\0", b""):  # the zero after a chunk of odd size is sometimes forgotten
        np.testing.assert_array_equal(load_audio(save(tmp_path, data + pad + notes)), expected)
    assert MORE in refusal(save(tmp_path, data + b"\x80" * 30_000))


def first_mp3_frame(data: bytes) -> int:
    """Length of the header frame: the first two bytes of every frame are the same."""
    return data.index(data[:2], 4)


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
def test_mp3_without_a_header_frame(tmp_path: Path, rate: int):
    # The first half is loud and the second quiet, so the guess from the first frames is far too short.
    samples = 0.4 * np.random.default_rng(0).standard_normal(4 * rate)
    samples[2 * rate :] = 0.3 * np.sin(np.arange(2 * rate) / 20)
    steady, variable = (
        encode(samples.clip(-1, 1), rate, "MP3", "MPEG_LAYER_III", bitrate_mode=mode, compression_level=0.5)
        for mode in ("CONSTANT", "VARIABLE")
    )
    assert b"Info" in steady[:64]
    assert b"Xing" in variable[:64]
    for data in (steady, variable):
        assert len(load_audio(save(tmp_path, data))) == 64_000
    bare = load_audio(save(tmp_path, steady[first_mp3_frame(steady) :]))
    assert 64_000 <= len(bare) <= 64_000 + 16_000 * 3000 / rate  # with the coder's delay and padding
    assert MORE in refusal(save(tmp_path, variable[first_mp3_frame(variable) :]))


def test_a_guessed_mp3_length_is_no_promise(tmp_path: Path):
    data = encode(melody(64_000), 16_000, "MP3", "MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=0.9)
    bare = data[first_mp3_frame(data) :]
    assert len(bare) < 25_000  # so that a tag of 1000 bytes passes for 10 frames
    expected = load_audio(save(tmp_path, bare))
    np.testing.assert_array_equal(load_audio(save(tmp_path, bare + bytes(1000))), expected)


def test_joined_files_are_refused(tmp_path: Path):
    first, second = melody(20_000), melody(20_000, seed=1)
    for name, words in (("mp3", MORE), ("vorbis", "several streams"), ("opus", "several streams"), ("wav-16", "RIFF")):
        container, codec, _ = FORMATS[name]
        joined = encode(first, 16_000, container, codec) + encode(second, 16_000, container, codec)
        assert words in refusal(save(tmp_path, joined))
    flac = encode(first, 16_000, "FLAC", "PCM_16")
    assert MORE in refusal(save(tmp_path, flac + flac))


def test_ogg_must_end_with_its_last_page(tmp_path: Path):
    for codec in ("VORBIS", "OPUS"):
        data = encode(melody(60_000), 16_000, "OGG", codec)
        last = data.rindex(b"OggS")
        assert CUT in refusal(save(tmp_path, data[:last]))
        assert CUT in refusal(save(tmp_path, data[:-1]))
        assert MORE in refusal(save(tmp_path, data + bytes(20_000)))


@pytest.mark.parametrize(
    ("head", "length"),
    [
        ("fffb9000", 417), ("fffb9200", 418), ("fffbe400", 960), ("fffb1800", 144), ("fff38000", 208),
        ("fff34800", 144), ("ffe31000", 52), ("ffe3e800", 1440), ("fffa9000", 417), ("fff39400", 240),
        ("fffbf000", 0), ("fffb0000", 0), ("fffb9c00", 0), ("ffeb9000", 0), ("fffd9000", 0), ("fff99000", 0),
        ("ffdb9000", 0), ("49443304", 0), ("fffb90", 0), ("", 0),
    ],
)  # fmt: skip
def test_mp3_frame_lengths(head: str, length: int):
    assert containers.mp3_frame_length(bytes.fromhex(head)) == length


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("values", [777, 1 << 18])
def test_a_file_read_in_blocks_has_the_samples_of_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, values: int
):
    monkeypatch.setattr("mt3_runtime.audio._BLOCK_VALUES", values)
    container, codec, _ = FORMATS[name]
    for rate in (16_000, 48_000):
        path = save(tmp_path, encode(np.stack([melody(9000), melody(9000, seed=1)], axis=1), rate, container, codec))
        with open_audio(path) as stream:
            blocks = list(stream.blocks)
        np.testing.assert_array_equal(np.concatenate(blocks), load_audio(path))
        assert {block.dtype for block in blocks} == {np.dtype(np.float32)}
        assert max(map(len, blocks)) <= values + 1
        assert abs(stream.expected - sum(map(len, blocks))) <= 1


def test_what_the_header_tells_is_told_at_once_and_the_rest_where_it_stands(tmp_path: Path):
    with pytest.raises(AudioError, match="does not exist"), open_audio(tmp_path / "none.wav"):
        pytest.fail("was opened")
    samples = melody(5 * (1 << 18))
    samples[3 * (1 << 18)] = np.nan
    path = save(tmp_path, encode(samples, 16_000, "WAV", "FLOAT"))
    blocks = []
    with pytest.raises(AudioError, match="NaN or infinite"), open_audio(path) as stream:
        blocks.extend(stream.blocks)
    assert [len(block) for block in blocks] == [1 << 18] * 3
    flac = encode(melody(5 * (1 << 18)), 16_000, "FLAC", "PCM_16")
    path, blocks = save(tmp_path, flac[: len(flac) // 2]), []
    message = refusal(path)
    with pytest.raises(AudioError) as caught, open_audio(path) as stream:
        blocks.extend(stream.blocks)
    assert str(caught.value) == message
    assert len(blocks) >= 2


def test_a_file_left_in_the_middle_is_closed(tmp_path: Path):
    path = save(tmp_path, encode(melody(600_000), 16_000, "FLAC", "PCM_16"))
    with no_open_files_left():
        with open_audio(path) as stream:
            next(stream.blocks)
        with pytest.raises(RuntimeError, match="enough"), open_audio(path) as stream:
            raise RuntimeError("enough")


def test_files_are_closed(tmp_path: Path):
    good, bad = encode(melody(3000), 16_000, "FLAC", "PCM_16"), wav(bytes(5000), size=9000)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        load_audio(save(tmp_path, good))
        refusal(save(tmp_path, bad))
        refusal(tmp_path)
        refusal(save(tmp_path, good[:-100]))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def measured(code: str, *arguments: object) -> dict[str, float | str]:
    """Run `code` in a process of its own; it prints JSON. Adds the growth of its peak memory in MiB."""
    script = f"""
import json, sys, time
from mt3_runtime.audio import AudioLimits, load_audio, prepare_audio
from mt3_runtime.errors import AudioError
def peak():  # the process alone; getrusage starts from its parent's peak
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) / 1024
before = peak()
began = time.process_time()
{code}
answer["seconds"], answer["growth"] = time.process_time() - began, peak() - before
print(json.dumps(answer))
"""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)


REFUSE = """
answer = {"error": ""}
try: load_audio(sys.argv[1])
except AudioError as error: answer["error"] = str(error)
"""


def test_bombs_are_refused_at_once(tmp_path: Path):
    silence = encode(np.zeros(960_000, np.int16), 48_000, "FLAC", "PCM_16")
    rf64 = encode(np.zeros(3000, np.int16), 16_000, "RF64", "PCM_16")
    place = rf64.index(b"ds64") + 16
    page = b"OggS" + bytes(23)
    bombs = {
        "8 h of silence": (flac_with_length(silence, 8 * 3600 * 48_000), "lasts 28800.0 s"),
        "rate": (wav(bytes(8000), channels=8, rate=655_350), "655350 Hz"),
        "frames": (rf64[:place] + struct.pack("<Q", 2**62) + rf64[place + 8 :], CUT),
        "channels": (wav(bytes(4096), channels=1024), "1024 channels"),
        "more channels": (wav(bytes(1 << 18), channels=65_535), "cannot be decoded"),
        "chunks": (wav(bytes(500)) + b"junk\0\0\0\0" * 500_000, "damaged"),
        "pages": (encode(melody(3000), 16_000, "OGG", "VORBIS") + page * 1_000_000, "damaged"),
    }
    for data, words in bombs.values():
        answer = measured(REFUSE, save(tmp_path, data))
        assert words in answer["error"]
        assert answer["seconds"] < 2
        assert answer["growth"] < 64


def test_memory_is_the_result_and_a_few_blocks(tmp_path: Path):
    # 180 MB decoded, 3.8 MB of result.
    path = save(tmp_path, encode(np.zeros((5_760_000, 8), np.int16), 192_000, "FLAC", "PCM_16"))
    answer = measured('answer = {"samples": len(load_audio(sys.argv[1]))}', path)
    assert answer["samples"] == 480_000
    assert answer["growth"] < 24
    # 64 MB of result: a second copy would show.
    path = save(tmp_path, encode(np.zeros(16_000_000, np.int16), 16_000, "FLAC", "PCM_16"))
    answer = measured('answer = {"samples": len(load_audio(sys.argv[1]))}', path)
    assert answer["samples"] == 16_000_000
    assert 61 < answer["growth"] < 85


def test_spoiled_files_give_a_result_or_an_error(tmp_path: Path):
    count = int(os.environ.get("MT3_FUZZ_FILES", "400"))
    seed = int(os.environ.get("MT3_FUZZ_SEED", "1"))
    command = [sys.executable, str(HERE / "audio_cases.py"), str(tmp_path), str(count), str(seed)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60 + count / 50)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout)
    assert answer["read"] + answer["refused"] == count
    assert min(answer["read"], answer["refused"]) > count / 10  # spoiled enough, but not beyond use
    assert answer["slowest"] < 10
    assert answer["lines"] == 1
