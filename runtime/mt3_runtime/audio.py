"""Sound files and arrays -> mono audio at the model's rate, within documented bounds."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import stat
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import numpy as np
import soundfile
import soxr

from mt3_runtime.containers import CONVERT, SoundBytes, check_end, check_promise, identify
from mt3_runtime.errors import AudioError, OptionError, SampleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import ArrayLike, NDArray

# Decoders that take what files usually hold; libsndfile's rarer ones have open memory bugs, and its W64 reader
# takes chunks after the sound for sound.
_INTEGER: Final = frozenset({"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32"})
_CODECS: Final = {
    "WAV": _INTEGER | {"FLOAT", "DOUBLE"},
    "WAVEX": _INTEGER | {"FLOAT", "DOUBLE"},
    "RF64": _INTEGER | {"FLOAT", "DOUBLE"},
    "AIFF": _INTEGER | {"FLOAT", "DOUBLE"},
    "FLAC": _INTEGER,
    "OGG": frozenset({"VORBIS", "OPUS"}),
    "MP3": frozenset({"MPEG_LAYER_III"}),
}
_INTEGER_TYPES: Final = ("uint8", "int8", "int16", "int32")
_BLOCK_VALUES = 1 << 18  # values decoded at a time, over all channels: 1 MiB
_LOUDEST = 1e10  # full scale is 1; features allow a hundred times as much, which leaves room for the resampler
_UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's frame count of a stream that does not state one


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """What audio is accepted: channels, source rate in Hz, seconds, bytes decoded as float32.

    `min_samples` is counted after resampling; its default is one hop of the MT3 family.
    """

    max_channels: int = 8
    min_rate: int = 8_000
    max_rate: int = 192_000
    max_seconds: float = 4 * 3600.0
    max_decoded_bytes: int = 24 * 2**30
    min_samples: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise OptionError(f"AudioLimits.{field.name} is {value!r}: give a positive number")


DEFAULT_LIMITS: Final = AudioLimits()


def load_audio(
    path: str | os.PathLike[str], *, sample_rate: int = 16_000, limits: AudioLimits = DEFAULT_LIMITS
) -> NDArray[np.float32]:
    """Read a sound file as mono audio at `sample_rate`.

    WAV (also extensible and RF64) and AIFF with integer or float samples, FLAC, MP3, and Ogg with Vorbis or Opus.
    Channels are averaged, then resampled by soxr "HQ" (passband to 7.4 kHz, images below -138 dB at 16 kHz). The
    file is decoded block by block: memory is the result and a few MiB, whatever the file's rate and channels
    (`open_audio` does without the result).

    A file that holds less than its header states is refused, as is one that holds more than libsndfile would
    return: cut files, MP3 with a variable bit rate but no header frame, concatenated MP3 or Ogg, FLAC that does not
    state its length. Tags and up to 16 KiB of unknown bytes after the sound are ignored; a WAV or AIFF written to a
    pipe (a stated size of 2 GiB or more) is read to its end. libsndfile's MP3 decoder prints its own remarks on
    damaged frames to stderr, which cannot be turned off from here.

    Args:
        path: a regular file.
        sample_rate: rate of the result in Hz.
        limits: bounds; the defaults are those of `AudioLimits`.

    Returns:
        [samples], finite, at least `limits.min_samples` long.

    Raises:
        AudioError: the file is missing, unreadable, of another format, damaged, or out of bounds.
        OptionError: `sample_rate` is not a positive integer.
    """
    with open_audio(path, sample_rate=sample_rate, limits=limits) as stream:
        return _collect(stream.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class AudioStream:
    """A sound file that is being read as mono audio.

    `blocks` gives the samples of `load_audio` bit for bit, some seconds at a time [samples], once. What is wrong with
    a file, only its header can tell at once: the rest is raised where the reading comes to it, at the latest in
    place of the end. `expected` is the number of samples that the header promises, an estimate to show progress by.
    """

    blocks: Iterator[NDArray[np.float32]]
    expected: int


@contextlib.contextmanager
def open_audio(
    path: str | os.PathLike[str], *, sample_rate: int = 16_000, limits: AudioLimits = DEFAULT_LIMITS
) -> Iterator[AudioStream]:
    """Open a sound file to be read block by block, within a few MiB however long it is; see `load_audio`.

    Raises:
        AudioError: on entry what the header tells, from `blocks` all the rest that `load_audio` refuses.
        OptionError: `sample_rate` is not a positive integer.
    """
    name = repr(os.fspath(path))
    with _open(path, name) as descriptor:
        sound = identify(descriptor, name)
        try:
            with soundfile.SoundFile(descriptor, closefd=False) as source:
                _check_source(source, sound, limits)
                mono = MonoStream(name, source.samplerate, sample_rate, limits)
                expected = round(source.frames * sample_rate / source.samplerate)
                yield AudioStream(mono.blocks(_decode(source, sound)), expected)
        except soundfile.SoundFileError as error:
            reason = getattr(error, "error_string", str(error)).strip(". \n")
            raise AudioError(
                f"{name} cannot be decoded ({' '.join(reason.split())}): get a complete copy, or {CONVERT}"
            ) from error


def prepare_audio(
    samples: ArrayLike,
    source_rate: int,
    *,
    sample_rate: int = 16_000,
    limits: AudioLimits = DEFAULT_LIMITS,
) -> NDArray[np.float32]:
    """Turn samples in memory into mono audio at `sample_rate`, exactly as `load_audio` does for a file.

    Args:
        samples: [samples] or [samples, channels]. Floats are taken as they are, full scale being 1; int8, int16,
            int32 and uint8 are divided by their full range (uint8 is centred on 128).
        source_rate: rate of `samples` in Hz.
        sample_rate: rate of the result in Hz.
        limits: bounds; the defaults are those of `AudioLimits`.

    Returns:
        [samples], a new array, finite, at least `limits.min_samples` long.

    Raises:
        AudioError: the samples have another type or shape, are not finite, or are out of bounds.
        OptionError: `sample_rate` is not a positive integer.
    """
    name = "the audio array"
    array = as_blocks(samples, name)
    rate = check_rate(source_rate, name)
    check_bounds(name, array.shape[1], rate, len(array), limits)
    return _collect(MonoStream(name, rate, sample_rate, limits).blocks(to_float(array)))


def as_blocks(samples: ArrayLike, name: str) -> NDArray[np.generic]:
    """Samples in memory as an array [samples, channels] of one of the accepted types.

    Raises:
        AudioError: the samples have another type or shape; the message starts with `name`.
    """
    try:
        array = np.asarray(samples)
    except ValueError as error:
        raise AudioError(f"{name} is ragged: give [samples] or [samples, channels]") from error
    if array.ndim not in (1, 2):
        raise AudioError(f"{name} has shape {array.shape}: give [samples] or [samples, channels]")
    if array.dtype.kind != "f" and array.dtype.name not in _INTEGER_TYPES:
        raise AudioError(f"{name} is of type {array.dtype}: give floats, int8, int16, int32 or uint8")
    return array.reshape(len(array), array.shape[1] if array.ndim == 2 else 1)


def check_rate(rate: object, name: str) -> int:
    """A sample rate as a whole number of Hz.

    Raises:
        AudioError: it is none; the message starts with `name`.
    """
    whole = _positive_integer(rate)
    if whole is None:
        raise AudioError(f"{name} has the rate {rate!r}: give a whole number of Hz")
    return whole


@contextlib.contextmanager
def _open(path: str | os.PathLike[str], name: str) -> Iterator[int]:
    """Open a regular file; a pipe or device is refused without waiting for it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise AudioError(f"{name} does not exist: check the path") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AudioError(f"{name} cannot be opened ({reason}): check the path and its permissions") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{name} is a folder: give one sound file")
        if not stat.S_ISREG(mode):
            raise AudioError(f"{name} is a pipe or a device: save the sound to a file first")
        yield descriptor
    finally:
        os.close(descriptor)


def _check_source(source: soundfile.SoundFile, sound: SoundBytes, limits: AudioLimits) -> None:
    """Refuse a file by its header alone, before any sample is decoded."""
    name = sound.name
    if source.subtype not in _CODECS.get(source.format, ()):
        raise AudioError(f"{name} is {source.format} with {source.subtype} samples, not read here: {CONVERT}")
    if source.frames >= _UNKNOWN_LENGTH:
        raise AudioError(f"{name} does not state its length, as if written to a pipe: {CONVERT}")
    # libsndfile never returns more frames than the header states, so the stated length bounds the real one.
    check_bounds(name, source.channels, source.samplerate, source.frames, limits)
    check_promise(sound)


def check_bounds(name: str, channels: int, rate: int, frames: int, limits: AudioLimits = DEFAULT_LIMITS) -> None:
    """Hold audio of `frames` samples a channel at `rate` Hz to the limits.

    Raises:
        AudioError: it is out of bounds; the message starts with `name`.
    """
    if not 1 <= channels <= limits.max_channels:
        raise AudioError(f"{name} has {channels} channels, not 1 to {limits.max_channels}: mix it down to mono first")
    if not limits.min_rate <= rate <= limits.max_rate:
        raise AudioError(
            f"{name} has a rate of {rate} Hz, not {limits.min_rate} to {limits.max_rate} Hz: resample it first"
        )
    if frames > limits.max_seconds * rate:
        raise AudioError(
            f"{name} lasts {frames / rate:.1f} s, more than {limits.max_seconds:g} s: split it, or stream it"
        )
    decoded = frames * channels * 4
    if decoded > limits.max_decoded_bytes:
        raise AudioError(
            f"{name} decodes to {decoded} bytes, more than {limits.max_decoded_bytes}: split it, or stream it"
        )


def _decode(source: soundfile.SoundFile, sound: SoundBytes) -> Iterator[NDArray[np.float32]]:
    """Yield the decoded blocks [samples, channels] of a whole file; each is valid until the next."""
    block = np.empty((_BLOCK_VALUES // source.channels, source.channels), np.float32)
    left = source.frames
    while left:
        wanted = min(left, len(block))
        got = len(source.read(out=block[:wanted]))
        left -= got
        yield block[:got]
        if got < wanted:
            break
    check_end(sound, os.lseek(sound.descriptor, 0, os.SEEK_CUR), left)


def to_float(array: NDArray[np.generic]) -> Iterator[NDArray[np.float32]]:
    """Yield an array [samples, channels] of any accepted type as blocks of float32."""
    step = _BLOCK_VALUES // array.shape[1]
    for first in range(0, len(array), step):
        block = array[first : first + step]
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):  # becomes infinite, which is refused
                yield block.astype(np.float32)
        else:
            full = 2.0 ** (8 * array.dtype.itemsize - 1)
            centre = full if array.dtype.kind == "u" else 0.0
            yield ((block.astype(np.float64) - centre) / full).astype(np.float32)


def _positive_integer(value: object) -> int | None:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
    return number if number > 0 and not isinstance(value, bool) else None


def _average(block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over the channels of a block [samples, channels]: [samples], a copy."""
    mono = block[:, 0].copy()
    # One channel at a time: numpy's mean over so short an axis takes 20 times as long.
    with np.errstate(over="ignore", invalid="ignore"):  # not finite either way, which is refused
        for channel in range(1, block.shape[1]):
            mono += block[:, channel]
        mono /= np.float32(block.shape[1])
    return mono


class MonoStream:
    """Turns blocks of any channels into blocks of one mono signal at the target rate.

    Blocks of any size give the same bits: soxr's stream equals its one-shot call.

    Args:
        name: of the audio, for messages.
        source_rate: of the blocks in Hz.
        sample_rate: of the result in Hz.
        limits: of which `min_samples` counts here.

    Raises:
        OptionError: `sample_rate` is not a positive integer.
    """

    def __init__(self, name: str, source_rate: int, sample_rate: int, limits: AudioLimits = DEFAULT_LIMITS) -> None:
        rate = _positive_integer(sample_rate)
        if rate is None:
            raise OptionError(f"sample_rate is {sample_rate!r}: give a whole number of Hz")
        self._name = name
        self._min_samples, self._samples = limits.min_samples, 0
        self._stream = None
        if rate != source_rate:
            self._stream = soxr.ResampleStream(source_rate, rate, 1, dtype="float32", quality="HQ")

    def mix(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        """The mean of the channels of a block [samples, channels] -> [samples]; nothing is taken in yet.

        Raises:
            SampleError: a sample is not finite, or beyond all loudness.
        """
        mono = _average(block)
        peak = max(mono.max(initial=0), -mono.min(initial=0))  # NaN if one of them is
        if not peak <= _LOUDEST:  # found here, it is the fault of this audio alone, and nothing before it is lost
            first = int(np.argmin(np.abs(mono) <= _LOUDEST))
            level = abs(mono[first])
            if not np.isfinite(level):
                raise SampleError(f"{self._name} holds NaN or infinite samples: export it again", first)
            raise SampleError(f"{self._name} reaches {level:.0e}, which is no sound: scale it to -1..1", first)
        return mono

    def take(self, mono: NDArray[np.float32]) -> NDArray[np.float32]:
        """What a block [samples] of the source completes: [samples], a new array, which may be empty."""
        return self._counted(mono if self._stream is None else self._stream.resample_chunk(mono))

    def end(self) -> NDArray[np.float32]:
        """What is left after the last block [samples].

        Raises:
            AudioError: all of it was too short.
        """
        rest = np.empty(0, np.float32)
        if self._stream is not None:
            rest = self._counted(self._stream.resample_chunk(rest, last=True))
        if self._samples < self._min_samples:
            raise AudioError(
                f"{self._name} holds {self._samples} samples at the model's rate, fewer than {self._min_samples}:"
                " give longer audio"
            )
        return rest

    def _counted(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        self._samples += len(block)
        return block

    def blocks(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yield [samples], new arrays, for all blocks [samples, channels]."""
        for block in blocks:
            yield self.take(self.mix(block))
        yield self.end()


def _collect(blocks: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Join blocks in an array that grows in place: a list of blocks to concatenate would hold everything twice."""
    result, length = np.empty(0, np.float32), 0
    for block in blocks:
        end = length + len(block)
        if end > len(result):
            # In steps that stay small beside the block: what is reserved is also zeroed, so it counts.
            result.resize(end + _BLOCK_VALUES, refcheck=False)
        result[length:end] = block
        length = end
    result.resize(length, refcheck=False)
    return result
