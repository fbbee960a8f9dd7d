"""One piece of audio on its way through the model: segments come, rows go out, decoded rows become notes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mt3_runtime.devices import encode_group
from mt3_runtime.launches import audio_device
from mt3_runtime.memory import SongMemory
from mt3_runtime.midi import midi_warnings
from mt3_runtime.note_decoding import SegmentTokens
from mt3_runtime.notes import sort_notes
from mt3_runtime.rows import Row
from mt3_runtime.silence import silent_tokens
from mt3_runtime.stopwatch import Stopwatch
from mt3_runtime.transcription import Provenance, SegmentNotes, Transcription
from mt3_runtime.unfinished import Unfinished, ranges
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mt3_runtime.backends import Backend
    from mt3_runtime.manifest import Manifest
    from mt3_runtime.notes import Note
    from mt3_runtime.rows import DecodedRow, Status
    from mt3_runtime.segments import Segment
    from mt3_runtime.transcriber import Transcriber


STAGES = ("read", "features", "encode", "decode", "notes")


class RowKey(NamedTuple):
    """Whose row it is."""

    piece: int
    segment: int
    channel: int


def alone(states: Any) -> Any:
    """The states of one row without those encoded beside them; what stays on a device is alone already."""
    return states.copy() if isinstance(states, np.ndarray) else states


@dataclass(slots=True)
class _UnderWay:
    """A segment whose channels are being decoded, or told, where it is silent."""

    start: float
    max_time: float | None
    is_silent: bool
    rows: list[DecodedRow[RowKey] | None]  # [channels]


class Piece:
    """One pass over one piece of audio, and what there is to tell of it.

    Whoever reads the audio says in `samples` how many have come, and in `expected` how many segments there will be as
    far as is known. Only segments that wait or are being decoded are held; without `record` there is no list of those
    that did not end well either, for audio that may go on for days.
    """

    def __init__(self, transcriber: Transcriber, *, number: int = 0, record: bool = True) -> None:
        self.number, self.is_finished, self.clock = number, False, Stopwatch()
        self.samples = self.expected = 0
        self._transcriber = transcriber
        self._state = transcriber.new_note_state()
        self._read = self._due = self._tokens = self._fallback_rows = 0
        self._decode_seconds = 0.0
        self._cut: deque[Segment] = deque()
        self._encoded: deque[Row[RowKey]] = deque()
        self._under_way: dict[int, _UnderWay] = {}
        model = self.manifest.model
        self._unfinished = Unfinished(model.channels)
        self._memory = SongMemory(model, model.memory) if model.memory else None
        self._record, self._restarts, self._silent = record, list[int](), list[int]()

    @property
    def manifest(self) -> Manifest:
        """Of the model."""
        return self._transcriber.bundle.manifest

    @property
    def device(self) -> str:
        """Where it is encoded."""
        return self._transcriber.backend.device

    @property
    def count(self) -> int:
        """Segments: by the header until a file has been read to its end."""
        return max(self.expected, self._read)

    @property
    def has_rows(self) -> bool:
        """Whether rows are left, those included that wait for the segment before them."""
        return bool(self._encoded or self._cut)

    @property
    def backlog(self) -> int:
        """Segments that have come and are not decoded yet."""
        return self._read - self._due

    def add(self, segments: Iterable[Segment]) -> None:
        """Take the next segments, in order of time."""
        for segment in segments:
            self._cut.append(segment)
            self._read += 1
            if segment.max_time is None:
                self.expected = self._read

    def next_row(self) -> Row[RowKey] | None:
        """The next row, None where there is none, or where it has to wait until the segment before it is decoded.

        Segments are encoded here, a group at a time, and ahead of those that wait.
        """
        if not self._encoded and self._cut:
            self._encode(
                [self._cut.popleft() for _ in range(min(len(self._cut), encode_group(self.manifest, self.device)))]
            )
        if not self._encoded:
            return None
        if self._memory is None:
            return self._encoded.popleft()
        segment = self._encoded[0].key.segment
        memory = self._memory.ids_for(segment)
        if memory is None:
            return None
        if self._record and self._memory.has_restarted and not self._under_way[segment].is_silent:
            self._restarts.append(segment)
        return replace(self._encoded.popleft(), memory=memory)

    def _encode(self, group: list[Segment]) -> None:
        with self.clock.stage("features"):
            heard = [segment for segment in group if not self._transcriber.silence.is_silent(segment.samples)]
        encoded = self._states(heard, self._transcriber.backend) if heard else ()
        states = dict(zip([segment.index for segment in heard], encoded, strict=True))
        for segment in group:
            is_silent = segment.index not in states
            rows = self._silent_rows(segment) if is_silent else self._rows(segment, states[segment.index])
            self._under_way[segment.index] = _UnderWay(segment.start, segment.max_time, is_silent, [None] * len(rows))
            self._encoded += rows
            if is_silent and self._record:
                self._silent.append(segment.index)

    def _rows(self, segment: Segment, states: Any) -> list[Row[RowKey]]:
        rows = []
        for channel, own in enumerate(states):
            again = partial(self._states_of, segment, channel) if self._transcriber.fallback else None
            rows.append(Row(RowKey(self.number, segment.index, channel), alone(own), encode=again))
        return rows

    def _silent_rows(self, segment: Segment) -> list[Row[RowKey]]:
        """What a silent segment says, in place of its states."""
        said = np.array(silent_tokens(self._transcriber.vocabulary), np.int32)
        channels = range(self.manifest.model.channels)
        return [Row(RowKey(self.number, segment.index, channel), states=None, known=said) for channel in channels]

    def _states(self, group: list[Segment], backend: Backend) -> Any:
        """Encoder states, indexed [segment][channel]."""
        extractor, device = self._transcriber.extractor, audio_device(backend)
        samples, frames = np.stack([segment.samples for segment in group]), [segment.frames for segment in group]
        if device:
            with self.clock.stage("features"):
                extractor.check(samples, frames)  # a device cannot refuse what is no audio
            with self.clock.stage("encode"):
                return device.encode_audio(samples, np.array(frames, np.int32))
        with self.clock.stage("features"):
            features = extractor(samples, frames)
        with self.clock.stage("encode"):
            return backend.encode(features)

    def _states_of(self, segment: Segment, channel: int, backend: Backend) -> Any:
        return self._states([segment], backend)[0][channel]

    def take(self, row: DecodedRow[RowKey]) -> Iterator[SegmentNotes]:
        """Receive one decoded row; yields the segments that are complete now, in order of time."""
        segment = self._under_way[row.key.segment]
        self._decode_seconds += row.seconds
        self._tokens += 0 if segment.is_silent else len(row.tokens)
        self._fallback_rows += row.fell_back
        if self._record:
            self._unfinished.note(row.key.segment, row.key.channel, row.status)
        segment.rows[row.key.channel] = row
        if self._memory:
            self._memory.keep(row.key.segment, row)
        while self._due in self._under_way:
            rows = [row for row in self._under_way[self._due].rows if row is not None]
            if len(rows) < len(self._under_way[self._due].rows):
                return
            with self.clock.stage("notes"):
                complete = self._complete(self._under_way.pop(self._due), rows)
            self._due += 1
            yield complete

    def _complete(self, segment: _UnderWay, rows: list[DecodedRow[RowKey]]) -> SegmentNotes:
        spoken = [SegmentTokens(segment.start, row.tokens.tolist(), row.log_probs.tolist()) for row in rows]
        notes = self._state.decode_segment(spoken, segment.max_time)
        if segment.max_time is None:
            notes += self._state.flush(self._duration)
            self.is_finished = True
        statuses: set[Status] = {row.status for row in rows}
        worst = next(status for status in ("failed", "truncated", "ended") if status in statuses)
        start, is_last = segment.start, self.is_finished
        return SegmentNotes(self._due, self.count, start, tuple(notes), worst, is_last, segment.is_silent)

    @property
    def _duration(self) -> float:
        return self.samples / self.manifest.features.sample_rate

    def result(self, notes: list[Note]) -> Transcription:
        """Everything about the finished pass; `notes` are those of all its segments."""
        transcriber, backend = self._transcriber, self._transcriber.backend
        with self.clock.stage("notes"):
            notes = sort_notes(notes)
            warnings = self._warnings(notes)
        seconds = self.clock.seconds | {"decode": self._decode_seconds}
        statistics = self._state.statistics
        provenance = Provenance(
            model=self.manifest.model.name,
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
            memory_restarts=tuple(self._restarts),
            fallback_rows=self._fallback_rows,
            skip_silence=str(transcriber.silence),
            silent_segments=tuple(self._silent),
            device_reason=transcriber.device_reason,
            strict_upstream=transcriber.strict_upstream,
            warnings=warnings,
        )
        return Transcription(tuple(notes), self._duration, provenance, transcriber.midi_style)

    def _warnings(self, notes: list[Note]) -> tuple[str, ...]:
        notice = self.manifest.origin.notice
        restarts, again = ranges(self._restarts), self._fallback_rows
        half = self._transcriber.backend.precision
        return (
            *([notice] if notice else []),
            *self._transcriber.notices,
            *([f"{again} rows were decoded again in fp32: {half} gave numbers that are not finite"] if again else []),
            *self._unfinished.warnings(self._transcriber.rules.max_tokens),
            *([f"segments {restarts} know nothing of what was before: it failed"] if restarts else []),
            *self._state.warnings,
            *([] if notes else ["no notes were found"]),
            *midi_warnings(notes, style=self._transcriber.midi_style),
        )
