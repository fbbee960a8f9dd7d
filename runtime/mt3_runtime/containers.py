"""What the bytes of a sound file say, apart from any decoder: its container, and whether it is complete.

libsndfile clamps every length to what it finds, so a file that was cut, or whose header states less than the
file holds, decodes without a word. These checks compare the header's promise with the bytes; they read a few
headers, decode nothing and believe no length.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mt3_runtime.errors import AudioError

if TYPE_CHECKING:
    from collections.abc import Iterator

CONVERT: Final = "convert it, for example with: ffmpeg -i INPUT OUTPUT.wav"
_DAMAGED: Final = "is damaged: get a complete copy"
_CUT: Final = "is cut short: get a complete copy"
_MORE: Final = f"holds more data than its header states, which would be lost: {CONVERT}"

_UNCLAIMED_BYTES = 16 * 1024  # tags and padding at the end of a file that no header accounts for
_STREAMED = 0x7FFF_0000  # sizes from here on are what writers to a pipe put down, who cannot know better
_MAX_TAGS = 8
_MAX_CHUNKS = 1 << 16
_MAX_PAGES = 800_000  # an Ogg page for each 20 ms of 4 hours is 720,000

# Bit rates of MPEG layer III in kbit/s, by index, for version 1 and for versions 2 and 2.5.
_BIT_RATES_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_BIT_RATES_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES_1 = (44_100, 48_000, 32_000)  # Hz; halved in version 2, quartered in version 2.5
_EXTRA_FRAMES = 2  # encoders disagree by a frame on whether the header frame and the padding count
_FRAME_SAMPLES_1, _FRAME_SAMPLES_2 = 1152, 576


@dataclass(frozen=True, slots=True)
class SoundBytes:
    """An open sound file: descriptor, name for messages, container, first byte after any ID3 tag, size in bytes.

    `container` is "WAV", "AIFF", "FLAC", "OGG" or "MP3".
    """

    descriptor: int
    name: str
    container: str
    start: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes at `offset`, fewer at the end, without moving the descriptor's position."""
        return os.pread(self.descriptor, count, offset)


def identify(descriptor: int, name: str) -> SoundBytes:
    """Find the container by its first bytes, so that no parser of another format ever runs.

    Raises:
        AudioError: the file is empty, or none of the five containers.
    """
    size = os.fstat(descriptor).st_size
    if size == 0:
        raise AudioError(f"{name} is empty: record or copy it again")
    start = 0
    for _ in range(_MAX_TAGS):
        head = os.pread(descriptor, 12, start)
        if head[:3] != b"ID3" or len(head) < 10:
            break
        # The four bytes of an ID3v2 size carry seven bits each.
        start += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    container = _container(head)
    if container is None:
        raise AudioError(f"{name} is not WAV, FLAC, AIFF, MP3 or Ogg: {CONVERT}")
    return SoundBytes(descriptor, name, container, start, size)


def _container(head: bytes) -> str | None:
    magic, kind = head[:4], head[8:12]
    if magic in (b"RIFF", b"RIFX", b"RF64") and kind == b"WAVE":
        return "WAV"
    if magic == b"FORM" and kind in (b"AIFF", b"AIFC"):
        return "AIFF"
    if mp3_frame_length(head[:4]):
        return "MP3"
    return {b"fLaC": "FLAC", b"OggS": "OGG"}.get(magic)


def check_promise(sound: SoundBytes) -> None:
    """Compare the sizes that a file's headers state with the bytes that are there, before decoding.

    WAV, RF64 and AIFF by their chunks, Ogg by its pages. A WAV or AIFF size as a writer to a pipe puts down
    (2 GiB or more) is not a promise: such a file is read to its end.

    Raises:
        AudioError: the file is cut short, or holds data that no header accounts for.
    """
    if sound.container in ("WAV", "AIFF"):
        _check_chunks(sound)
    elif sound.container == "OGG":
        _check_pages(sound)


def check_end(sound: SoundBytes, position: int, missing: int) -> None:
    """Compare what was decoded with the header's promise, after decoding.

    Args:
        sound: the file.
        position: byte at which the decoder stopped reading.
        missing: sample frames that the header states beyond those that were decoded.

    Raises:
        AudioError: the file ends early, or goes on where its header says that it ends.
    """
    if sound.container == "MP3":
        # Without a header frame the length is the decoder's guess from the file's size: it promises nothing.
        allowed = _EXTRA_FRAMES * _frame_samples(sound) if _states_length(sound) else missing
        if _has_frames(sound, position):
            raise AudioError(f"{sound.name} {_MORE}")
    else:
        allowed = 0
        if sound.container == "FLAC":
            _refuse_rest(sound, position)
    if missing > allowed:
        raise AudioError(f"{sound.name} {_CUT}")


def _refuse_rest(sound: SoundBytes, end: int) -> None:
    if sound.size - end > _UNCLAIMED_BYTES:
        raise AudioError(f"{sound.name} {_MORE}")


def _chunks(sound: SoundBytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, first byte and stated size of the chunks of a RIFF, RIFX, RF64 or AIFF file."""
    big = sound.read(sound.start, 4) in (b"RIFX", b"FORM")
    offset = sound.start + 12
    wide = None  # the 64-bit size that RF64 keeps in a chunk of its own
    for _ in range(_MAX_CHUNKS):
        head = sound.read(offset, 8)
        name = head[:4]
        if len(head) < 8 or not all(0x20 <= byte < 0x7F for byte in name):
            return
        length = int.from_bytes(head[4:], "big" if big else "little")
        if name == b"ds64":
            wide = int.from_bytes(sound.read(offset + 16, 8), "little")
        if name == b"data" and wide is not None and length == 0xFFFF_FFFF:
            length = wide
        yield name, offset + 8, length
        offset += 8 + length
        # Chunks start at even bytes after a zero, but some writers leave the zero out.
        offset += length % 2 and sound.read(offset, 1) == b"\0"
    raise AudioError(f"{sound.name} {_DAMAGED}")


def _check_chunks(sound: SoundBytes) -> None:
    is_wide = sound.read(sound.start, 4) == b"RF64"  # its sizes are always known
    end = sound.start + 12
    for name, first, length in _chunks(sound):
        if name in (b"data", b"SSND") and length > sound.size - first:
            if length >= _STREAMED and not is_wide:
                return
            raise AudioError(f"{sound.name} {_CUT}")
        if length > sound.size - first:
            break
        end = first + length
    _refuse_rest(sound, end)


def _check_pages(sound: SoundBytes) -> None:
    """Walk the pages of an Ogg file (RFC 3533): one stream, from its first page to the page marked as last."""
    offset, is_last = sound.start, False
    for _ in range(_MAX_PAGES):
        head = sound.read(offset, 27 + 255)
        if len(head) < 27 or head[:4] != b"OggS":
            break
        if head[5] & 2 and offset > sound.start:
            raise AudioError(f"{sound.name} holds several streams, of which one would be read: {CONVERT}")
        is_last = bool(head[5] & 4)
        offset += 27 + head[26] + sum(head[27 : 27 + head[26]])
        if offset > sound.size:
            raise AudioError(f"{sound.name} {_CUT}")
    else:
        raise AudioError(f"{sound.name} {_DAMAGED}")
    if not is_last:
        raise AudioError(f"{sound.name} {_CUT}")
    _refuse_rest(sound, offset)


def mp3_frame_length(head: bytes) -> int:
    """Bytes of the MPEG layer III frame that starts with these 4 bytes, 0 when none does (ISO 11172-3, 2.4.1)."""
    bits = int.from_bytes(head[:4], "big")
    version, layer = bits >> 19 & 3, bits >> 17 & 3  # version: 3 is 1, 2 is 2, 0 is 2.5
    bit_rate, rate, padding = bits >> 12 & 15, bits >> 10 & 3, bits >> 9 & 1
    if len(head) < 4 or bits >> 21 != 0x7FF or version == 1 or layer != 1 or bit_rate in (0, 15) or rate == 3:
        return 0
    if version == 3:
        return 144_000 * _BIT_RATES_1[bit_rate] // _RATES_1[rate] + padding
    return 72_000 * _BIT_RATES_2[bit_rate] // (_RATES_1[rate] // (2 if version == 2 else 4)) + padding


def _frame_samples(sound: SoundBytes) -> int:
    """Samples of one MP3 frame: version 1 has two granules, the others one."""
    is_version_1 = sound.read(sound.start + 1, 1)[0] & 0x18 == 0x18
    return _FRAME_SAMPLES_1 if is_version_1 else _FRAME_SAMPLES_2


def _states_length(sound: SoundBytes) -> bool:
    """Whether the first MP3 frame is a header frame that counts the others."""
    head = sound.read(sound.start, 64)
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def _has_frames(sound: SoundBytes, offset: int) -> bool:
    """Whether more MP3 frames follow at `offset` than encoders leave uncounted."""
    for _ in range(_EXTRA_FRAMES + 1):
        length = mp3_frame_length(sound.read(offset, 4))
        if not length or offset + length > sound.size:
            return False
        offset += length
    return True
