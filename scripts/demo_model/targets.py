"""Notes -> the token sequences that the network learns to write, one a segment.

The grammar is magenta/mt3's (`note_sequences.py`, `run_length_encoding.py`): a tie section names the notes that go
on; then, in order of time, a shift from the start of the segment, note-offs by program and pitch, onsets by program
and pitch, drums; program and velocity tokens stand only where they change. Times are on the 10 ms grid. Where the sound
cannot tell two times apart, this module decides for one, always within the 50 ms that scores allow:

* an onset in the last 10 ms before a segment, or the first 20 ms in it, stands at the segment's start;
* an offset within 40 ms of onsets stands with them, and so does one within 40 ms of an earlier offset;
* a note that ends in the first 40 ms of a segment is not tied: it ends with the segment before.

Distinct times of a segment are then at least 50 ms apart, if onsets are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from demo_model.settings import EVENTS, FEATURES, NOTE_OFF, NOTE_ON, TIE, VOCABULARY
from mt3_runtime.segments import segment_count, segment_start
from mt3_runtime.vocabulary import END_TOKEN, Event

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mt3_runtime.notes import Note

LATE, EARLY, SNAP = 1, 2, 4  # steps, as in the list above
Voice = tuple[int, int]  # program, pitch


@dataclass(frozen=True, slots=True)
class Group:
    """What happens at one time of a segment: `steps` from its start. `mistold`: onsets that are not true."""

    steps: int
    offsets: tuple[Voice, ...]
    onsets: tuple[Voice, ...]
    drums: tuple[int, ...]
    mistold: frozenset[Voice] = frozenset()


@dataclass(frozen=True, slots=True)
class SegmentEvents:
    """The events of one segment, in order: notes that go on, then groups of distinct ascending times."""

    ties: tuple[Voice, ...]
    groups: tuple[Group, ...]


@dataclass(slots=True)
class _Open:
    ties: list[Voice]
    onsets: defaultdict[int, list[Voice]]
    offsets: list[tuple[int, Voice]]
    drums: defaultdict[int, list[int]]


def segment_events(notes: Iterable[Note], samples: int) -> list[SegmentEvents]:
    """The events of every segment of a clip of `samples` samples."""
    count = segment_count(samples, FEATURES)
    starts = [round(segment_start(i, FEATURES, VOCABULARY) * VOCABULARY.steps_per_second) for i in range(count)]
    segments = [_Open([], defaultdict(list), [], defaultdict(list)) for _ in range(count)]
    for note in notes:
        first, steps = _place(note.onset, starts)
        steps = 0 if steps <= EARLY else steps
        if note.is_drum:
            segments[first].drums[steps].append(note.pitch)
            continue
        voice = (note.program, note.pitch)
        segments[first].onsets[steps].append(voice)
        last, steps = _place(note.offset, starts)
        ends_at_tie = last > first and steps <= SNAP
        for index in range(first + 1, last + (not ends_at_tie)):
            segments[index].ties.append(voice)
        if not ends_at_tie:
            segments[last].offsets.append((steps, voice))
    return [_close(segment) for segment in segments]


def _place(seconds: float, starts: Sequence[int]) -> tuple[int, int]:
    """Segment and steps from its start, negative in the last moments before it."""
    step = round(seconds * VOCABULARY.steps_per_second)
    index = max(0, bisect_right(starts, step + LATE) - 1)
    return index, step - starts[index]


def _close(segment: _Open) -> SegmentEvents:
    beats = sorted({*segment.onsets, *segment.drums})
    offsets: defaultdict[int, list[Voice]] = defaultdict(list)
    latest = -SNAP - 1
    for steps, voice in sorted(segment.offsets):
        near = [beat for beat in beats if abs(beat - steps) <= SNAP and voice not in segment.onsets[beat]]
        restruck = [beat for beat in beats if 0 <= beat - steps <= SNAP and voice in segment.onsets[beat]]
        if restruck or near:
            offsets[(restruck or near)[0]].append(voice)
        else:
            latest = latest if steps - latest <= SNAP else steps
            offsets[latest].append(voice)
    groups = [
        Group(
            steps,
            tuple(sorted(offsets[steps])),
            tuple(sorted(segment.onsets[steps])),
            tuple(sorted(segment.drums[steps])),
        )
        for steps in sorted({*beats, *offsets})
    ]
    return SegmentEvents(tuple(sorted(segment.ties)), tuple(groups))


def write_tokens(segment: SegmentEvents) -> list[int]:
    """Token ids of a segment, with the end token, without the start token."""
    return write_lesson(segment)[0]


def write_lesson(segment: SegmentEvents) -> tuple[list[int], list[bool]]:
    """As `write_tokens`, and whether each token is to be learned: those that tell what is mistold are only read."""
    tokens: list[int] = []
    mistold: set[int] = set()
    program: int | None = None
    for voice in segment.ties:
        program = _write_voice(tokens, voice, program)
    tokens.append(TIE)
    program = velocity = None
    for group in segment.groups:
        if group.steps:
            tokens.append(EVENTS.encode(Event("shift", group.steps)))
        for state, voices in ((NOTE_OFF, group.offsets), (NOTE_ON, group.onsets)):
            for voice in voices:
                first = len(tokens)
                if voice[0] != program:
                    program = voice[0]
                    tokens.append(EVENTS.encode(Event("program", program)))
                velocity = _write_velocity(tokens, state, velocity)
                tokens.append(EVENTS.encode(Event("pitch", voice[1])))
                if state == NOTE_ON and voice in group.mistold:
                    mistold.update(range(first, len(tokens)))
        for key in group.drums:
            velocity = _write_velocity(tokens, NOTE_ON, velocity)
            tokens.append(EVENTS.encode(Event("drum", key)))
    tokens.append(END_TOKEN)
    return tokens, [place not in mistold for place in range(len(tokens))]


def _write_voice(tokens: list[int], voice: Voice, program: int | None) -> int:
    if voice[0] != program:
        tokens.append(EVENTS.encode(Event("program", voice[0])))
    tokens.append(EVENTS.encode(Event("pitch", voice[1])))
    return voice[0]


def _write_velocity(tokens: list[int], state: int, velocity: int | None) -> int:
    if state != velocity:
        tokens.append(state)
    return state
