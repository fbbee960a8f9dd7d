"""`mt3-run stream`: raw samples in, one line of JSON for every segment out, as soon as its notes are there."""

from __future__ import annotations

import json
import select
import signal
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

import numpy as np

from mt3_runtime.audio import check_bounds
from mt3_runtime.console import say, silence
from mt3_runtime.errors import OutputError
from mt3_runtime.midi import write_midi
from mt3_runtime.transcribe_command import check_suffix, check_writable, load_asked
from mt3_runtime.transcription import note_to_dict

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from mt3_runtime.notes import Note
    from mt3_runtime.transcriber import Transcriber
    from mt3_runtime.transcription import SegmentNotes

TYPES = {"s16le": "<i2", "s32le": "<i4", "f32le": "<f4"}
_READ = 1 << 16  # bytes at most at a time; what is there is taken at once
_LEFT = 1 << 20  # bytes that are still read after a signal


def stream_notes(arguments: argparse.Namespace, source: IO[bytes], target: IO[str]) -> None:
    """Transcribe `source` to its end, or until Ctrl-C or a SIGTERM, which count as its end.

    An error, too, leaves a MIDI file with the notes before it.

    Raises:
        AudioError: the samples cannot be used.
        OptionError: the output has another suffix than MIDI's.
        OutputError: the MIDI file cannot be written, or nobody reads `target` any more.
    """
    check_suffix(arguments.output, ".mid", ".midi")
    if arguments.output is not None:
        check_writable(arguments.output)
    check_bounds("standard input", arguments.channels, arguments.rate, 0)
    transcriber = load_asked(arguments)
    for notice in (transcriber.bundle.manifest.origin.notice, *transcriber.notices):
        if notice:
            say(f"note: {notice}")
    where = ": ".join(filter(None, (transcriber.backend.device, transcriber.device_reason)))
    say(f"listening: {arguments.channels} x {arguments.format} at {arguments.rate} Hz, on {where}")
    notes: list[Note] = []
    interrupt, is_whole = _Interrupt(), False
    with interrupt.installed():
        try:
            blocks = _blocks(source, np.dtype(TYPES[arguments.format]), arguments.channels, interrupt)
            for segment in transcriber.stream(blocks, arguments.rate):
                if arguments.output is not None:
                    notes += segment.notes
                _write(_line(segment), target)
            is_whole = True
        finally:
            interrupt.is_held = True  # what was heard is written, whoever is in a hurry
            if arguments.output is not None and (notes or is_whole):
                _save(notes, arguments.output, transcriber)


def _save(notes: list[Note], path: Path, transcriber: Transcriber) -> None:
    for notice in write_midi(notes, path, style=transcriber.midi_style):
        say(f"note: {notice}")


def _write(line: str, target: IO[str]) -> None:
    try:
        print(line, file=target, flush=True)
    except OSError as error:
        with suppress(OSError, ValueError):  # a stream without a descriptor
            silence(target)
        raise OutputError(
            f"nobody reads the notes any more ({error.strerror}): check what they are piped to"
        ) from error


class _Interrupt:
    """Turns the first Ctrl-C or SIGTERM into the end of the input, wherever it comes; the second is as always.

    `is_held`: none of them is heard any more.
    """

    def __init__(self) -> None:
        self.asked = self.is_held = self._is_waiting = False
        self._after = 0  # bytes read since it was asked

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            # What the parent had ignored stays so; only the main thread has signals.
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                with suppress(ValueError):
                    before[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        if self.is_held:
            return
        if self.asked or self._is_waiting:
            self.asked = True
            raise KeyboardInterrupt
        self.asked = True

    def read(self, source: IO[bytes]) -> bytes:
        """What is there, waiting only where nothing is; empty at the end."""
        # read1 does not wait until everything asked for is there
        read = getattr(source, "read1", source.read)
        self._wait(source)
        return self._rest(source, read) if self.asked else bytes(read(_READ))

    def _wait(self, source: IO[bytes]) -> None:
        """Wait until something has come or a signal; a read that a signal broke off would lose what it had taken."""
        if self.asked:
            return
        try:
            try:
                self._is_waiting = True
                if not self.asked:
                    _wait_for(source, None)
            finally:
                self._is_waiting = False
        except KeyboardInterrupt:
            self._is_waiting = False  # it may have come before it could be said

    def _rest(self, source: IO[bytes], read: Callable[[int], bytes]) -> bytes:
        """What had come before the signal and lies in the pipe, of one that never ends a megabyte."""
        there = _wait_for(source, 0) and self._after < _LEFT
        data = bytes(read(_READ)) if there else b""
        self._after += len(data)
        return data


def _wait_for(source: IO[bytes], timeout: int | None) -> bool:
    """Whether there is something to read, waiting at most `timeout` milliseconds; False without a descriptor."""
    poll = select.poll()
    try:
        poll.register(source, select.POLLIN)
    except (OSError, ValueError, TypeError):
        return False
    return bool(poll.poll(timeout))


def _blocks(
    source: IO[bytes], kind: np.dtype[np.generic], channels: int, interrupt: _Interrupt
) -> Iterator[NDArray[np.generic]]:
    """Blocks [samples, channels] of what comes in, cut where a sample of all channels is whole."""
    frame, rest = kind.itemsize * channels, b""
    while data := interrupt.read(source):
        data = rest + data
        whole = len(data) // frame * frame
        rest = data[whole:]
        if whole:
            yield np.frombuffer(data[:whole], kind).reshape(-1, channels)
    if rest:
        say(f"note: the last {len(rest)} bytes are no whole sample and were left out")


def _line(segment: SegmentNotes) -> str:
    return json.dumps(
        {
            "segment": segment.index,
            "start": segment.start,
            "status": segment.status,
            "is_silent": segment.is_silent,
            "notes": [note_to_dict(note) for note in segment.notes],
            "is_last": segment.is_last,
        },
        allow_nan=False,
    )
