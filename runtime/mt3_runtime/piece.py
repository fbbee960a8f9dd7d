"""One piece of audio on its way through the model: rows go out, decoded rows come back and become notes."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mt3_runtime.audio import open_audio, prepare_audio
from mt3_runtime.decoding import Row
from mt3_runtime.devices import encode_group
from mt3_runtime.errors import OptionError
from mt3_runtime.midi import midi_warnings
from mt3_runtime.note_decoding import SegmentTokens
from mt3_runtime.notes import sort_notes
from mt3_runtime.segments import iter_segments, segment_count, stream_segments
from mt3_runtime.stopwatch import Stopwatch
from mt3_runtime.transcription import Provenance, SegmentNotes, Transcription
from mt3_runtime.unfinished import Unfinished
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from mt3_runtime.arrays import FloatArray
    from mt3_runtime.decoding import DecodedRow, Status
    from mt3_runtime.notes import Note
    from mt3_runtime.segments import Segment
    from mt3_runtime.transcriber import Source, Transcriber


STAGES = ("read", "features", "encode", "decode", "notes")


class RowKey(NamedTuple):
    """Whose row it is."""

    piece: int
    segment: int
    channel: int


@dataclass(slots=True)
class _UnderWay:
    """A segment whose channels are being decoded."""

    start: float
    max_time: float | None
    rows: list[DecodedRow[RowKey] | None]  # [channels]


class Piece:
    """One pass over one piece of audio, and what there is to tell of it.

    Only segments that are being decoded are held, and of a file the block that is being cut.
    """

    def __init__(self, transcriber: Transcriber, audio: Source, sample_rate: int | None, *, number: int = 0) -> None:
        self.number, self.is_finished = number, False
        self._transcriber, self._clock = transcriber, Stopwatch()
        self._audio, self._sample_rate = audio, sample_rate
        self._state = transcriber.new_note_state()
        self._samples = self._expected = self._read = self._due = self._tokens = 0
        self._decode_seconds = 0.0
        self._under_way: dict[int, _UnderWay] = {}
        self._unfinished = Unfinished(transcriber.bundle.manifest.model.channels)

    @property
    def count(self) -> int:
        """Segments: by the header until a file has been read to its end."""
        return max(self._expected, self._read)

    def rows(self) -> Generator[Row[RowKey], None, None]:
        """Read, cut and encode, one group of segments ahead of what is taken.

        Raises:
            AudioError: the audio cannot be read or is out of bounds.
            OptionError: samples without a rate, or a file with one.
        """
        size, backend = encode_group(self._transcriber.bundle.manifest), self._transcriber.backend
        with closing(self._segments()) as cut:
            segments = self._clock.each("read", cut)
            while group := list(islice(segments, size)):
                with self._clock.stage("features"):
                    samples = np.stack([segment.samples for segment in group])
                    features = self._transcriber.extractor(samples, [segment.frames for segment in group])
                with self._clock.stage("encode"):
                    states = backend.encode(features)  # [segments, channels, frames, d_model]
                for segment, channels in zip(group, states, strict=True):
                    self._under_way[segment.index] = _UnderWay(segment.start, segment.max_time, [None] * len(channels))
                    for channel, own in enumerate(channels):
                        yield Row(RowKey(self.number, segment.index, channel), own.copy())

    def take(self, row: DecodedRow[RowKey]) -> Iterator[SegmentNotes]:
        """Receive one decoded row; yields the segments that are complete now, in order of time."""
        self._decode_seconds += row.seconds
        self._tokens += len(row.tokens)
        self._unfinished.note(row.key.segment, row.key.channel, row.status)
        self._under_way[row.key.segment].rows[row.key.channel] = row
        while self._due in self._under_way:
            rows = [row for row in self._under_way[self._due].rows if row is not None]
            if len(rows) < len(self._under_way[self._due].rows):
                return
            with self._clock.stage("notes"):
                segment = self._complete(self._under_way.pop(self._due), rows)
            self._due += 1
            yield segment

    def _segments(self) -> Generator[Segment, None, None]:
        manifest = self._transcriber.bundle.manifest
        features, vocabulary = manifest.features, manifest.vocabulary
        if isinstance(self._audio, str | os.PathLike):
            if self._sample_rate is not None:
                raise OptionError("a sample rate was given for a file, which has its own: leave sample_rate out")
            with open_audio(self._audio, sample_rate=features.sample_rate) as stream:
                self._expected = segment_count(stream.expected, features)
                yield from self._counted(stream_segments(self._measured(stream.blocks), features, vocabulary))
        else:
            if self._sample_rate is None:
                raise OptionError("samples were given without their rate: pass sample_rate in Hz")
            audio = prepare_audio(self._audio, self._sample_rate, sample_rate=features.sample_rate)
            self._samples, self._expected = len(audio), segment_count(len(audio), features)
            yield from self._counted(iter_segments(audio, features, vocabulary))

    def _measured(self, blocks: Iterable[FloatArray]) -> Iterator[FloatArray]:
        for block in blocks:
            self._samples += len(block)
            yield block

    def _counted(self, segments: Iterable[Segment]) -> Iterator[Segment]:
        for segment in segments:
            self._read += 1
            if segment.max_time is None:
                self._expected = self._read
            yield segment

    def _complete(self, segment: _UnderWay, rows: list[DecodedRow[RowKey]]) -> SegmentNotes:
        spoken = [SegmentTokens(segment.start, row.tokens.tolist(), row.log_probs.tolist()) for row in rows]
        notes = self._state.decode_segment(spoken, segment.max_time)
        if segment.max_time is None:
            notes += self._state.flush(self._duration)
            self.is_finished = True
        statuses: set[Status] = {row.status for row in rows}
        worst = next(status for status in ("failed", "truncated", "ended") if status in statuses)
        return SegmentNotes(self._due, self.count, segment.start, tuple(notes), worst)

    @property
    def _duration(self) -> float:
        return self._samples / self._transcriber.bundle.manifest.features.sample_rate

    def result(self, notes: list[Note]) -> Transcription:
        """Everything about the finished pass; `notes` are those of all its segments."""
        transcriber, backend = self._transcriber, self._transcriber.backend
        with self._clock.stage("notes"):
            notes = sort_notes(notes)
            warnings = self._warnings(notes)
        seconds = self._clock.seconds | {"decode": self._decode_seconds}
        statistics = self._state.statistics
        provenance = Provenance(
            model=transcriber.bundle.manifest.model.name,
            bundle=transcriber.name,
            bundle_sha256=transcriber.bundle.sha256,
            device=backend.device,
            provider=backend.provider,
            precision=backend.precision,
            runtime_version=__version__,
            audio_seconds=self._duration,
            stage_seconds={stage: seconds.get(stage, 0.0) for stage in STAGES},
            real_time_factor=sum(seconds.values()) / self._duration,
            segments=self._read,
            tokens=self._tokens,
            invalid_events=statistics.invalid_events,
            dropped_events=statistics.dropped_events,
            truncated_segments=self._unfinished.segments("truncated"),
            failed_segments=self._unfinished.segments("failed"),
            strict_upstream=transcriber.strict_upstream,
            warnings=warnings,
        )
        return Transcription(tuple(notes), self._duration, provenance, transcriber.midi_style)

    def _warnings(self, notes: list[Note]) -> tuple[str, ...]:
        notice = self._transcriber.bundle.manifest.origin.notice
        return (
            *([notice] if notice else []),
            *self._unfinished.warnings(self._transcriber.rules.max_tokens),
            *self._state.warnings,
            *([] if notes else ["no notes were found"]),
            *midi_warnings(notes, style=self._transcriber.midi_style),
        )
