"""Note events of several channels to notes, as the segments come in.

Source: YourMT3 `utils/event2note.py` (`note_event2note`) and `utils/note2event.py` (`mix_notes`), which work on
whole files. Notes of different keys never affect each other there, so that each key is settled on its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from mt3_runtime.note_decoding import MIN_NOTE_SECONDS
from mt3_runtime.notes import Note

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

MAX_NOTE_SECONDS = 10.0  # upstream takes a longer note for one whose end was missed
VELOCITY = 100  # these models do not tell velocities; upstream writes this one

ENDLESS, LONG, OVERRULED = "endless", "long", "overruled"


class Key(NamedTuple):
    """What sounds; drums have program 0."""

    pitch: int
    program: int
    is_drum: bool = False


@dataclass(frozen=True, slots=True)
class NoteEvent:
    """An onset or an offset at `time` seconds, which segment number `segment` told.

    `is_forced` marks an offset that no token stands for: the next segment does not tie the note.
    """

    time: float
    key: Key
    segment: int
    is_onset: bool
    confidence: float | None = None
    is_forced: bool = False


class Span(NamedTuple):
    """A note of a known key."""

    onset: float
    offset: float
    confidence: float | None


class ChannelNotes:
    """The notes of one channel, from events that may lie ahead of the segment that told them.

    Strict, it does as upstream does. Otherwise notes longer than 10 s keep their length, and an offset that an
    earlier segment told, or forced, does not end a note of a later one: it is `overruled`. An onset that lies
    behind its own forced offset makes a note of 10 ms.

    `counts` holds `invalid` (offsets without a note), `dropped` (offsets overruled), and what upstream would lose.
    """

    def __init__(self, *, strict: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._strict = strict
        self._queue: list[NoteEvent] = []
        self._active: dict[Key, NoteEvent] = {}
        self._untied: dict[Key, int] = {}  # the last segment whose note of this key was forced to end
        self._finished: list[tuple[Key, Span]] = []

    @property
    def sounding(self) -> dict[Key, float]:
        """Onset of every note that has begun and not ended."""
        return {key: event.time for key, event in self._active.items()}

    def add(self, events: Iterable[NoteEvent]) -> None:
        """Take the events of one segment, in the order of their tokens."""
        self._queue += events
        self._queue.sort(key=lambda event: (event.time, event.is_onset))

    def advance(self, horizon: float) -> list[tuple[Key, Span]]:
        """Play the events before `horizon` seconds; return the notes that they finished."""
        ready = bisect_left(self._queue, horizon, key=lambda event: event.time)
        for event in self._queue[:ready]:
            if event.key.is_drum:
                self._finish(event, event.time)
            else:
                self._play(event)
        del self._queue[:ready]
        return self._take_finished()

    def finish(self, duration: float, held: Container[Key]) -> list[tuple[Key, Span]]:
        """End the notes that no event ended after 10 ms, those `held` at `duration` seconds unless strict."""
        for event in self._active.values():
            is_held = event.key in held and not self._strict
            self.counts[ENDLESS] += is_held or self._strict
            self._finish(event, duration if is_held else event.time)
        self._active.clear()
        return self._take_finished()

    def _play(self, event: NoteEvent) -> None:
        active = self._active.get(event.key)
        if active and active.segment > event.segment and not event.is_onset:
            self.counts[OVERRULED] += 1
            if not self._strict:
                self.counts["dropped"] += not event.is_forced
                return
        if active:
            self._end(active, event.time)
        elif not event.is_onset:
            self.counts["invalid"] += not event.is_forced
        if event.is_onset:
            self._begin(event, active)
        elif event.is_forced:
            self._untied[event.key] = event.segment

    def _begin(self, event: NoteEvent, active: NoteEvent | None) -> None:
        segment = max(event.segment, active.segment if active else 0)
        if not self._strict and segment <= self._untied.get(event.key, -1):
            self._finish(event, event.time)
        else:
            self._active[event.key] = replace(event, segment=segment)

    def _end(self, active: NoteEvent, time: float) -> None:
        del self._active[active.key]
        is_long = time - active.time > MAX_NOTE_SECONDS
        self.counts[LONG] += is_long
        self._finish(active, active.time if is_long and self._strict else time)

    def _finish(self, event: NoteEvent, offset: float) -> None:
        self._finished.append((event.key, _lengthened(Span(event.time, offset, event.confidence))))

    def _take_finished(self) -> list[tuple[Key, Span]]:
        finished, self._finished = self._finished, []
        return finished


class NoteMixer:
    """Keeps finished notes until no later note can change them, then separates those that overlap.

    `collapsed` counts notes left out because another of the same key starts at the same time.
    """

    def __init__(self) -> None:
        self.collapsed = 0
        self._held: defaultdict[Key, list[tuple[Span, int]]] = defaultdict(list)

    def hold(self, channel: int, finished: Iterable[tuple[Key, Span]]) -> None:
        """Take the finished notes of one channel, those of a key in order of their onsets."""
        for key, span in finished:
            self._held[key].append((span, channel))

    def release(self, horizon: float, sounding: Iterable[Mapping[Key, float]]) -> list[Note]:
        """Return the notes that are settled.

        Args:
            horizon: No note will start before this time, in seconds.
            sounding: For each channel, the onsets of the notes that have begun and are not finished.
        """
        limits: dict[Key, float] = {}
        for onsets in sounding:
            for key, onset in onsets.items():
                limits[key] = min(onset, limits.get(key, horizon))
        notes: list[Note] = []
        for key in list(self._held):
            held = sorted(self._held.pop(key), key=lambda item: item[0].onset)
            settled = _count_settled([span for span, _ in held], limits.get(key, horizon))
            notes += self._mix(key, held[:settled])
            if settled < len(held):
                self._held[key] = held[settled:]
        return notes

    def _mix(self, key: Key, held: Sequence[tuple[Span, int]]) -> list[Note]:
        channels = sorted({channel for _, channel in held})
        by_channel = [[span for span, channel in held if channel == index] for index in channels]
        spans = [span for channel_spans in by_channel for span in _separate(channel_spans)]
        mixed = _separate(sorted(spans, key=lambda span: (span.onset, span.offset)))
        self.collapsed += len(held) - len(mixed)
        if not key.is_drum:
            mixed = [_lengthened(span) for span in mixed]
        return [
            Note(span.onset, span.offset, key.pitch, VELOCITY, key.program, key.is_drum, span.confidence)
            for span in mixed
        ]


def _count_settled(spans: Sequence[Span], limit: float) -> int:
    """How many of the notes, by onset, end before all later ones and before `limit`."""
    reach, settled = 0.0, 0
    for index, span in enumerate(spans):
        if reach <= span.onset:
            settled = index
        reach = max(reach, span.offset)
        if reach > limit:
            return settled
    return len(spans)


def _separate(spans: Sequence[Span]) -> list[Span]:
    """End each note where the next one starts; leave out those of which nothing is left."""
    cut = [span._replace(offset=min(span.offset, later.onset)) for span, later in pairwise(spans)]
    cut += spans[-1:]
    return [span for span in cut if span.onset < span.offset]


def _lengthened(span: Span) -> Span:
    is_short = span.offset - span.onset < MIN_NOTE_SECONDS
    return span._replace(offset=span.onset + MIN_NOTE_SECONDS) if is_short else span
