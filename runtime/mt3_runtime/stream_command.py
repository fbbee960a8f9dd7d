"""`mt3-run stream`: raw samples in, one line of JSON for every segment out, as soon as its notes are there."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import numpy as np

from mt3_runtime.midi import write_midi
from mt3_runtime.transcribe_command import check_suffix, check_writable, load_asked
from mt3_runtime.transcription import note_to_dict

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from mt3_runtime.notes import Note
    from mt3_runtime.transcription import SegmentNotes

TYPES = {"s16le": "<i2", "s32le": "<i4", "f32le": "<f4"}
_READ = 1 << 16  # bytes at most at a time; what is there is taken at once


def stream_notes(arguments: argparse.Namespace, source: IO[bytes], target: IO[str]) -> None:
    """Transcribe `source` to its end, or until interrupted, which counts as its end.

    Raises:
        AudioError: the samples cannot be used.
        OptionError: the output has another suffix than MIDI's.
        OutputError: the MIDI file cannot be written.
    """
    check_suffix(arguments.output, ".mid", ".midi")
    if arguments.output is not None:
        check_writable(arguments.output)
    transcriber = load_asked(arguments)
    kind = np.dtype(TYPES[arguments.format])
    notes: list[Note] = []
    if notice := transcriber.bundle.manifest.origin.notice:
        print(f"note: {notice}", file=sys.stderr)
    print(f"listening: {arguments.channels} x {arguments.format} at {arguments.rate} Hz", file=sys.stderr)
    interrupt = _Interrupt()
    with interrupt.installed():
        blocks = _blocks(source, kind, arguments.channels, interrupt)
        for segment in transcriber.stream(blocks, arguments.rate):
            print(_line(segment), file=target, flush=True)
            if arguments.output is not None:
                notes += segment.notes
    if arguments.output is not None:
        for notice in write_midi(notes, arguments.output, style=transcriber.midi_style):
            print(f"note: {notice}", file=sys.stderr)


class _Interrupt:
    """Turns the first Ctrl-C into the end of the input, wherever it comes; the second one is as always."""

    def __init__(self) -> None:
        self.asked = self.reading = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        try:
            before = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # only the main thread has signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, *_: object) -> None:
        if self.asked or self.reading:
            self.asked = True
            raise KeyboardInterrupt
        self.asked = True

    def read(self, source: IO[bytes]) -> bytes:
        """What is there, waiting only where nothing is; empty at the end."""
        self.reading = not self.asked
        try:
            # read1 does not wait until everything asked for is there
            return getattr(source, "read1", source.read)(_READ) if self.reading else b""
        except KeyboardInterrupt:
            return b""
        finally:
            self.reading = False


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
        print(f"note: the last {len(rest)} bytes are no whole sample and were left out", file=sys.stderr)


def _line(segment: SegmentNotes) -> str:
    return json.dumps(
        {
            "segment": segment.index,
            "start": segment.start,
            "status": segment.status,
            "notes": [note_to_dict(note) for note in segment.notes],
            "is_last": segment.is_last,
        },
        allow_nan=False,
    )
