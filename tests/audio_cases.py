"""Sound files made on the spot, and ways to spoil them. Run as a script, it feeds spoiled files to the reader.

    python tests/audio_cases.py FOLDER COUNT SEED

prints one JSON line with what happened; the file being read stays in FOLDER when the process dies.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

from mt3_runtime.audio import AudioLimits, load_audio
from mt3_runtime.errors import AudioError

# Name of the case -> container, codec, tolerance of a round trip (None where the codec is lossy).
FORMATS = {
    "wav-u8": ("WAV", "PCM_U8", 2**-7),
    "wav-16": ("WAV", "PCM_16", 2**-15),
    "wav-24": ("WAV", "PCM_24", 2**-23),
    "wav-32": ("WAV", "PCM_32", 2**-24),
    "wav-float": ("WAV", "FLOAT", 0.0),
    "wav-double": ("WAV", "DOUBLE", 0.0),
    "wavex-24": ("WAVEX", "PCM_24", 2**-23),
    "rf64-16": ("RF64", "PCM_16", 2**-15),
    "aiff-8": ("AIFF", "PCM_S8", 2**-7),
    "aiff-16": ("AIFF", "PCM_16", 2**-15),
    "aiff-24": ("AIFF", "PCM_24", 2**-23),
    "aiff-float": ("AIFF", "FLOAT", 0.0),
    "flac-16": ("FLAC", "PCM_16", 2**-15),
    "flac-24": ("FLAC", "PCM_24", 2**-23),
    "mp3": ("MP3", "MPEG_LAYER_III", None),
    "vorbis": ("OGG", "VORBIS", None),
    "opus": ("OGG", "OPUS", None),
}
LOSSLESS = [name for name, (_, _, tolerance) in FORMATS.items() if tolerance is not None]
REFUSED = [
    ("WAV", "ULAW"),
    ("WAV", "ALAW"),
    ("WAV", "IMA_ADPCM"),
    ("WAV", "MS_ADPCM"),
    ("WAV", "GSM610"),
    ("WAV", "G721_32"),
    ("WAV", "NMS_ADPCM_16"),
    ("AIFF", "ULAW"),
    ("AIFF", "DWVW_16"),
    ("AIFF", "IMA_ADPCM"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("W64", "PCM_16"),
    ("VOC", "PCM_16"),
    ("NIST", "PCM_16"),
    ("SVX", "PCM_16"),
    ("PAF", "PCM_16"),
    ("IRCAM", "PCM_16"),
    ("AVR", "PCM_16"),
    ("HTK", "PCM_16"),
    ("XI", "DPCM_16"),
    ("SDS", "PCM_16"),
    ("MAT4", "PCM_16"),
    ("MAT5", "PCM_16"),
    ("PVF", "PCM_16"),
    ("MPC2K", "PCM_16"),
]


def melody(samples: int, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Three partials and a little noise, peak below 1: [samples] float32."""
    seconds = np.arange(samples) / rate
    tones = sum(0.2 * np.sin(2 * np.pi * hertz * seconds + hertz) for hertz in (196.0, 440.0, 1318.5))
    return (tones + 0.02 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def encode(samples: np.ndarray, rate: int, container: str, codec: str, **options: object) -> bytes:
    """Bytes of a sound file, written by libsndfile."""
    target = io.BytesIO()
    soundfile.write(target, samples, rate, format=container, subtype=codec, **options)
    return target.getvalue()


def wav(data: bytes, *, channels: int = 1, rate: int = 16_000, bits: int = 16, tag: int = 1, size: int = -1) -> bytes:
    """A WAV file written by hand: any header for any data; `size` overrides the data size that it states."""
    width = channels * bits // 8
    form = struct.pack("<HHIIHH", tag, channels & 0xFFFF, rate, rate * width & 0xFFFFFFFF, width & 0xFFFF, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", len(data) if size < 0 else size) + data
    return b"RIFF" + struct.pack("<I", len(body) & 0xFFFFFFFF) + body


def flac_with_length(flac: bytes, frames: int) -> bytes:
    """The same FLAC file with another number of frames (36 bits) in its header."""
    word = int.from_bytes(flac[18:26], "big") >> 36 << 36 | frames
    return flac[:18] + word.to_bytes(8, "big") + flac[26:]


def spoil(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """One random mutation of a file; `other` is a file to splice in."""
    spoiled = bytearray(data)
    at, length = int(random.integers(len(data))), int(random.integers(1, 200))
    extremes = (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\0\x80")
    kind = random.integers(8)
    if kind == 0:
        for position in random.integers(len(data), size=random.integers(1, 9)):
            spoiled[position] = random.integers(256)
    elif kind == 1:
        spoiled[at] ^= 1 << int(random.integers(8))
    elif kind == 2:
        del spoiled[at:]
    elif kind == 3:
        del spoiled[at : at + length]
    elif kind == 4:
        spoiled[at:at] = random.bytes(length)
    elif kind == 5:
        spoiled[at : at + length] = bytes(length)
    elif kind == 6:
        # Sizes, counts and rates stand near the start.
        for position in random.integers(min(len(data), 120), size=2):
            spoiled[position : position + 4] = extremes[random.integers(len(extremes))]
    else:
        spoiled[at:] = other[int(random.integers(len(other))) :]
    return bytes(spoiled)


def sources() -> list[bytes]:
    """Small files of every format: mono at 16 kHz and stereo at 48 kHz."""
    short, wide = melody(3000), np.stack([melody(6000, 48_000), melody(6000, 48_000, seed=1)], axis=1)
    files = [encode(short, 16_000, container, codec) for container, codec, _ in FORMATS.values()]
    return files + [encode(wide, 48_000, container, codec) for container, codec, _ in FORMATS.values()]


def read_spoiled(folder: Path, count: int, seed: int) -> dict[str, object]:
    """Read `count` spoiled files; anything but a good result or an AudioError escapes."""
    files, random = sources(), np.random.default_rng(seed)
    limits = AudioLimits(max_seconds=60.0)
    read, slowest, refusals = 0, 0.0, []
    for index in range(count):
        path = folder / "spoiled.bin"
        path.write_bytes(spoil(files[index % len(files)], files[random.integers(len(files))], random))
        began = time.perf_counter()
        try:
            audio = load_audio(path, limits=limits)
            assert audio.dtype == np.float32
            assert audio.ndim == 1
            assert 128 <= len(audio) <= 61 * 16_000
            assert np.isfinite(audio).all()
            read += 1
        except AudioError as error:
            refusals.append(str(error))
        slowest = max(slowest, time.perf_counter() - began)
    lines = max(len(text.splitlines()) for text in refusals)
    return {"read": read, "refused": len(refusals), "slowest": slowest, "lines": lines}


if __name__ == "__main__":
    print(json.dumps(read_spoiled(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))  # noqa: T201
