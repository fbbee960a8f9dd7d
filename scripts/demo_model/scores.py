"""Random music of a given difficulty, as notes: voices that share a grid, a scale and a tempo, and drum patterns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from demo_model.drums import CLOSED_HAT, CRASH, HIGH_TOM, KICK, LOW_TOM, OPEN_HAT, SNARE
from demo_model.families import FAMILIES, Family
from mt3_runtime.notes import Note, sort_notes

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 4, 7, 9), tuple(range(12)))
NARROW = (52, 72)  # pitches of the easiest clips
SHORTEST = 0.08  # seconds
BEAT = 0.1  # seconds a drum note lasts; drums have no offset
RINGING = {"piano", "guitar", "organ", "strings"}  # families whose notes may sound on into the next ones
_CLEAR = 0.02  # seconds between the end of a note and the next onset


@dataclass(frozen=True, slots=True)
class Kind:
    """What a clip is made of. `narrow`: a line without chords in the middle register."""

    name: str
    voices: int
    drums: bool = False
    narrow: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("line", 1, narrow=True),
        Kind("one", 1),
        Kind("two", 2),
        Kind("beat", 1, drums=True),
        Kind("trio", 3, drums=True),
        Kind("band", 4, drums=True),
        Kind("drums", 0, drums=True),
    )
}


@dataclass(frozen=True, slots=True)
class Grid:
    """Times of all half units in seconds, shared by all voices: a simultaneous onset is exactly simultaneous."""

    times: NDArray[np.float64]  # [half units]
    fine: bool  # half units are long enough to be played
    scale: NDArray[np.int64]  # every MIDI pitch of the scale, ascending


def compose(kind: Kind, seconds: float, rng: Generator) -> list[Note]:
    """A piece for one clip, in canonical order; it may end before the clip does, and no note outlasts it."""
    grid = _draw_grid(seconds, rng)
    usable = [f for f in FAMILIES if not kind.narrow or min(f.high, NARROW[1]) - max(f.low, NARROW[0]) >= 12]
    notes: list[Note] = []
    chordal = False  # one voice of a clip plays chords, if any; the others play lines
    for index in rng.choice(len(usable), kind.voices, replace=False):
        family = usable[index]
        chordal_voice = not (kind.narrow or chordal) and bool(rng.random() < family.chords)
        chordal |= chordal_voice
        notes += _without_unisons(_play_voice(family, grid, kind, rng, chordal=chordal_voice), notes)
    if kind.drums:
        notes += _play_drums(grid, rng)
    return sort_notes(note for note in (_cut(note, seconds) for note in notes) if note)


def _draw_grid(seconds: float, rng: Generator) -> Grid:
    unit = float(rng.uniform(0.17, 0.40))
    lead = float(rng.uniform(0.0, 0.5))
    count = int((seconds - lead) / unit * 2) + 2
    human = np.clip(rng.normal(0.0, 0.006, count), -0.015, 0.015)
    times = np.maximum(0.0, lead + np.arange(count) * unit / 2 + human)
    steps = np.array(SCALES[int(rng.integers(len(SCALES)))])
    every = np.arange(128)
    scale = every[np.isin((every + rng.integers(12)) % 12, steps)]
    return Grid(times, fine=unit >= 0.26, scale=scale)


def _play_voice(family: Family, grid: Grid, kind: Kind, rng: Generator, *, chordal: bool) -> list[Note]:
    low, high = (max(family.low, NARROW[0]), min(family.high, NARROW[1])) if kind.narrow else (family.low, family.high)
    pitches = grid.scale[(grid.scale >= low) & (grid.scale <= high)]
    lengths, weights = _rhythm(chordal=chordal, fine=grid.fine)
    touch, rest = _draw_touch(family, rng), float(rng.uniform(0.0, 0.25))
    loudness = int(rng.integers(60, 112))
    place = int(rng.integers(len(pitches)))
    at, notes = 0, list[Note]()
    while at < len(grid.times) - 1:
        length = int(rng.choice(lengths, p=weights))
        if rng.random() >= rest:
            place = _move(place, len(pitches), rng)
            onset = float(grid.times[at])
            offset = max(onset + SHORTEST, _end(grid, at, length, touch))
            velocity = int(np.clip(loudness + rng.integers(-12, 13), 30, 127))
            chosen = _chord(pitches, place, rng) if chordal else [int(pitches[place])]
            notes += [Note(onset, offset, pitch, velocity, family.program, is_drum=False) for pitch in chosen]
        at += length
    return _without_restrikes(notes)


def _rhythm(*, chordal: bool, fine: bool) -> tuple[list[int], list[float]]:
    """Lengths in half units and their probabilities."""
    if chordal:
        return [2, 4, 6, 8], [0.2, 0.45, 0.1, 0.25]
    if fine:
        return [1, 2, 3, 4, 8], [0.15, 0.45, 0.1, 0.2, 0.1]
    return [2, 4, 6, 8], [0.55, 0.3, 0.05, 0.1]


def _draw_touch(family: Family, rng: Generator) -> float:
    """How long notes sound, as a multiple of the time they have."""
    if family.name in RINGING and rng.random() < 0.3:
        return float(rng.choice([1.5, 2.0, 3.0]))
    return float(rng.choice([1.0, 0.85, 0.5], p=[0.6, 0.2, 0.2]))


def _end(grid: Grid, at: int, length: int, touch: float) -> float:
    """The offset in seconds of a note that begins at half unit `at`, shortly before a half unit or between two."""
    place = min(at + length * touch, len(grid.times) - 1.0)
    return float(np.interp(place, np.arange(len(grid.times)), grid.times)) - _CLEAR


def _move(place: int, count: int, rng: Generator) -> int:
    """The next place of a line: mostly steps, sometimes a leap; reflected at the ends."""
    place += int(rng.integers(-7, 8)) if rng.random() < 0.25 else int(rng.integers(-3, 4))
    place = abs(place)
    return max(0, min(count - 1, 2 * (count - 1) - place if place >= count else place))


def _chord(pitches: NDArray[np.int64], place: int, rng: Generator) -> list[int]:
    """Two or three notes upwards from `place`, thirds to fifths apart."""
    chosen = [int(pitches[place])]
    for _ in range(int(rng.integers(1, 3))):
        above = pitches[(pitches >= chosen[-1] + 3) & (pitches <= chosen[-1] + 7)]
        if above.size:
            chosen.append(int(rng.choice(above)))
    return chosen


def _play_drums(grid: Grid, rng: Generator) -> list[Note]:
    """A pattern of eight units, varied in every bar."""
    bar = 16  # half units
    pattern = {
        KICK: np.where(np.arange(bar) % 4 == 0, rng.choice([0.3, 0.9], bar), 0.12),
        SNARE: np.where(np.arange(bar) % 8 == 4, 0.9, 0.07),
        CLOSED_HAT: np.full(bar, rng.uniform(0.2, 0.95)),
        OPEN_HAT: np.where(np.arange(bar) % 4 == 2, rng.uniform(0.0, 0.4), 0.03),
        LOW_TOM: np.where(np.arange(bar) >= 12, 0.2, 0.04),
        HIGH_TOM: np.where(np.arange(bar) >= 10, 0.2, 0.04),
        CRASH: np.where(np.arange(bar) == 0, rng.uniform(0.0, 0.4), 0.01),
    }
    loudness = int(rng.integers(70, 115))
    notes = []
    for at in range(0, len(grid.times) - 1, 1 if grid.fine and rng.random() < 0.4 else 2):
        onset = float(grid.times[at])
        hits = [key for key, chances in pattern.items() if rng.random() < chances[at % bar]]
        if OPEN_HAT in hits and CLOSED_HAT in hits:
            hits.remove(CLOSED_HAT)
        for key in hits:
            velocity = int(np.clip(loudness + rng.integers(-15, 13), 30, 127))
            notes.append(Note(onset, onset + BEAT, key, velocity, 0, is_drum=True))
    return notes


def _without_restrikes(notes: list[Note]) -> list[Note]:
    """End every note of one voice before the next one of its pitch begins."""
    kept: list[Note] = []
    following: dict[int, float] = {}
    for note in sorted(notes, key=lambda note: note.onset, reverse=True):
        offset = min(note.offset, following.get(note.pitch, np.inf) - _CLEAR)
        following[note.pitch] = note.onset
        kept.append(Note(note.onset, offset, note.pitch, note.velocity, note.program, is_drum=False))
    return kept


def _without_unisons(notes: list[Note], others: list[Note]) -> list[Note]:
    """Leave out notes of a pitch that another voice is sounding: nobody could tell the two apart."""
    sounding: dict[int, list[Note]] = {}
    for other in others:
        sounding.setdefault(other.pitch, []).append(other)
    return [
        note
        for note in notes
        if not any(
            note.onset < other.offset + BEAT and other.onset < note.offset + BEAT
            for other in sounding.get(note.pitch, ())
        )
    ]


def _cut(note: Note, seconds: float) -> Note | None:
    """The note within the clip, None if it would hardly be heard before the end."""
    if note.onset > seconds - SHORTEST:
        return None
    offset = min(note.offset, seconds)
    return Note(note.onset, offset, note.pitch, note.velocity, note.program, note.is_drum)
