"""Audio in, notes out: composes reading, features, encoding, decoding and the note state machine."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np

from mt3_runtime.audio import load_audio, prepare_audio
from mt3_runtime.decoding import DecodingRules, Row, decode_rows
from mt3_runtime.errors import OptionError
from mt3_runtime.features import feature_extractor
from mt3_runtime.midi import midi_warnings
from mt3_runtime.note_decoding import NoteDecoder
from mt3_runtime.notes import sort_notes
from mt3_runtime.segments import iter_segments, segment_count, segment_start
from mt3_runtime.stopwatch import Stopwatch
from mt3_runtime.transcription import Provenance, Transcription
from mt3_runtime.version import __version__
from mt3_runtime.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import ArrayLike

    from mt3_runtime.arrays import FloatArray
    from mt3_runtime.backends import Backend
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.decoding import DecodedRow, Status
    from mt3_runtime.notes import Note
    from mt3_runtime.segments import Segment

    Source = str | os.PathLike[str] | ArrayLike
    Progress = Callable[[int, int], None]

STAGES = ("read", "features", "encode", "decode", "notes")
ENCODE_GROUP = 4  # segments; larger groups are no faster on a CPU and hold up the first note


@dataclass(frozen=True, slots=True)
class SegmentNotes:
    """The notes that one segment completed. A note held over is completed, and given, by a later segment.

    `start` in seconds; `count` is the number of segments of the whole audio.
    """

    index: int
    count: int
    start: float
    notes: tuple[Note, ...]
    status: Status


class Transcriber:
    """A loaded model. One transcription runs at a time; other threads wait for their turn."""

    def __init__(self, bundle: Bundle, backend: Backend, *, name: str) -> None:
        self.bundle, self.backend, self.name = bundle, backend, name
        manifest = bundle.manifest
        self.extractor = feature_extractor(manifest.features)
        self.vocabulary = Vocabulary(manifest.vocabulary)
        self.rules = DecodingRules(manifest.model.start_token, manifest.model.end_token, manifest.model.max_length)
        self._lock, self._owner = threading.Lock(), 0

    def transcribe(
        self, audio: Source, sample_rate: int | None = None, *, progress: Progress | None = None
    ) -> Transcription:
        """Transcribe a file, or samples.

        Args:
            audio: path of a sound file, or samples [samples] or [samples, channels].
            sample_rate: of the samples in Hz; not given for a file.
            progress: called after every segment with the segments done and their number.

        Raises:
            AudioError: the audio cannot be read or is out of bounds.
            OptionError: samples without a rate, or a file with one.
        """
        with self._turn():
            run = _Run(self, audio, sample_rate)
            notes: list[Note] = []
            for done, segment in enumerate(run.segments(), start=1):
                notes.extend(segment.notes)
                if progress:
                    progress(done, segment.count)
            return run.result(notes)

    def iter_segments(self, audio: Source, sample_rate: int | None = None) -> Iterator[SegmentNotes]:
        """Transcribe as `transcribe` does, and yield the notes segment by segment as they are complete.

        Until the iterator is used up or closed, this transcriber is busy.
        """
        with self._turn():
            yield from _Run(self, audio, sample_rate).segments()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        thread = threading.get_ident()
        if self._owner == thread:  # waiting for oneself would be for ever
            raise OptionError("this transcriber is in the middle of iter_segments: finish or close that iterator first")
        with self._lock:
            self._owner = thread
            try:
                yield
            finally:
                self._owner = 0


class _Run:
    """One pass over one piece of audio, and what there is to tell of it."""

    def __init__(self, transcriber: Transcriber, audio: Source, sample_rate: int | None) -> None:
        self.transcriber, self.clock = transcriber, Stopwatch()
        self.features = transcriber.bundle.manifest.features
        self.vocabulary = transcriber.bundle.manifest.vocabulary
        with self.clock.stage("read"):
            self.audio = _read(audio, sample_rate, self.features.sample_rate)  # [samples]
        self.count = segment_count(len(self.audio), self.features)
        self.decoder = NoteDecoder(transcriber.vocabulary)
        self.tokens = 0
        self.unfinished: dict[Status, list[int]] = {"truncated": [], "failed": []}

    def segments(self) -> Iterator[SegmentNotes]:
        """Notes of every segment, in order of time."""
        rows = self._rows(iter_segments(self.audio, self.features, self.vocabulary))
        decoded = decode_rows(self.transcriber.backend, rows, self.transcriber.rules)
        for row in in_order(self.clock.each("decode", decoded)):
            self.tokens += len(row.tokens)
            if row.status in self.unfinished:
                self.unfinished[row.status].append(row.key)
            with self.clock.stage("notes"):
                segment = self._segment(row)
            yield segment

    def _rows(self, segments: Iterator[Segment]) -> Iterator[Row]:
        while group := list(islice(segments, ENCODE_GROUP)):
            with self.clock.stage("features"):
                samples = np.stack([segment.samples for segment in group])
                features = self.transcriber.extractor(samples, [segment.frames for segment in group])
            with self.clock.stage("encode"):
                states = self.transcriber.backend.encode(features)  # [segments, channels, frames, d_model]
            for segment, (channel,) in zip(group, states, strict=True):
                yield Row(segment.index, channel)

    def _segment(self, row: DecodedRow) -> SegmentNotes:
        start, last = self._start(row.key), row.key == self.count - 1
        max_time = None if last else self._start(row.key + 1)
        notes = self.decoder.decode_segment(row.tokens.tolist(), row.log_probs.tolist(), start, max_time)
        if last:
            notes += self.decoder.flush()
        return SegmentNotes(row.key, self.count, start, tuple(notes), row.status)

    def _start(self, index: int) -> float:
        return segment_start(index, self.features, self.vocabulary)

    def result(self, notes: list[Note]) -> Transcription:
        """Everything about the finished pass."""
        transcriber, backend = self.transcriber, self.transcriber.backend
        duration = len(self.audio) / self.features.sample_rate
        with self.clock.stage("notes"):
            notes = sort_notes(notes)
            warnings = self._warnings(notes)
        statistics = self.decoder.statistics
        provenance = Provenance(
            model=transcriber.bundle.manifest.model.name,
            bundle=transcriber.name,
            bundle_sha256=transcriber.bundle.sha256,
            device=backend.device,
            provider=backend.provider,
            precision=backend.precision,
            runtime_version=__version__,
            audio_seconds=duration,
            stage_seconds={stage: self.clock.seconds.get(stage, 0.0) for stage in STAGES},
            real_time_factor=sum(self.clock.seconds.values()) / duration,
            segments=self.count,
            tokens=self.tokens,
            invalid_events=statistics.invalid_events,
            dropped_events=statistics.dropped_events,
            truncated_segments=tuple(self.unfinished["truncated"]),
            failed_segments=tuple(self.unfinished["failed"]),
            warnings=warnings,
        )
        return Transcription(tuple(notes), duration, provenance)

    def _warnings(self, notes: list[Note]) -> tuple[str, ...]:
        told = {
            "truncated": f"reached {self.transcriber.rules.max_tokens} tokens without end: later notes may be missing",
            "failed": "gave numbers that are not finite, twice: only the notes before that are kept",
        }
        notice = self.transcriber.bundle.manifest.origin.notice
        return (
            *([notice] if notice else []),
            *(
                f"segments {ranges(segments)} {told[status]}"
                for status, segments in self.unfinished.items()
                if segments
            ),
            *([] if notes else ["no notes were found"]),
            *midi_warnings(notes),
        )


def in_order(rows: Iterable[DecodedRow]) -> Iterator[DecodedRow]:
    """Hold rows back until all with a smaller key have gone out; keys are 0, 1, 2, ..."""
    held: dict[int, DecodedRow] = {}
    due = 0
    for row in rows:
        held[row.key] = row
        while due in held:
            yield held.pop(due)
            due += 1


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs written short: 0-2, 5."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _read(audio: Source, sample_rate: int | None, wanted: int) -> FloatArray:
    if isinstance(audio, str | os.PathLike):
        if sample_rate is not None:
            raise OptionError("a sample rate was given for a file, which has its own: leave sample_rate out")
        return load_audio(audio, sample_rate=wanted)
    if sample_rate is None:
        raise OptionError("samples were given without their rate: pass sample_rate in Hz")
    return prepare_audio(audio, sample_rate, sample_rate=wanted)
