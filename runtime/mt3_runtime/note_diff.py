"""What differs between two sets of notes: which notes only one of them has, and which are other in the other."""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mt3_runtime.errors import OptionError
from mt3_runtime.note_matching import match_notes
from mt3_runtime.scoring import MIR_EVAL, Tolerances

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.notes import Note

NEARBY = 0.5  # seconds within which a single note's counterpart is looked for


@dataclass(frozen=True, slots=True)
class Comparison:
    """What of two notes is compared besides pitch and onset; `velocity` is how far apart they may be, None for any.

    Of drums the ends and the kits are not compared.

    Raises:
        OptionError: the tolerance of the velocity is negative.
    """

    tolerances: Tolerances = MIR_EVAL
    programs: bool = True
    offsets: bool = True
    velocity: int | None = None

    def __post_init__(self) -> None:
        if self.velocity is not None and self.velocity < 0:
            raise OptionError(f"the velocity tolerance is {self.velocity}: give 0 or more, or off")

    @property
    def aspects(self) -> tuple[str, ...]:
        """Names of what is compared; those that matter most come first."""
        compared = {"program": self.programs, "offset": self.offsets, "velocity": self.velocity is not None}
        return tuple(name for name, wanted in compared.items() if wanted)

    def agree(self, aspect: str, a: Note, b: Note) -> bool:
        """Whether two notes of one pitch and onset agree in an aspect."""
        if aspect == "program":
            return a.is_drum or a.program == b.program
        if aspect == "offset":
            return self.tolerances.offsets_agree(a, b)
        return self.velocity is None or abs(a.velocity - b.velocity) <= self.velocity


DEFAULT = Comparison()


@dataclass(frozen=True, slots=True)
class Pair:
    """A note that both sets have, and the aspects in which it differs."""

    a: Note
    b: Note
    differs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Single:
    """A note that one set has, and seconds to the nearest single note of its pitch in the other, None if far."""

    note: Note
    nearest: float | None


@dataclass(frozen=True, slots=True)
class NoteDiff:
    """Notes of both sets, each in exactly one of the lists, all in order of time."""

    pairs: tuple[Pair, ...]
    only_a: tuple[Single, ...]
    only_b: tuple[Single, ...]

    @property
    def changed(self) -> tuple[Pair, ...]:
        """Pairs that differ in something."""
        return tuple(pair for pair in self.pairs if pair.differs)

    @property
    def equal(self) -> bool:
        """Whether the sets are equal within the tolerances."""
        return not (self.only_a or self.only_b or self.changed)


def diff_notes(a: Sequence[Note], b: Sequence[Note], comparison: Comparison = DEFAULT) -> NoteDiff:
    """Pair the notes of two sets, and say what differs.

    As many notes as possible that agree in everything compared are paired first. Then one aspect after the other is
    let go (velocity, offset, program), so that in the end there are as many pairs as onsets alone allow; where that
    needs it, a note that was paired gets another partner, but never none.
    """
    aspects = comparison.aspects
    matched: dict[int, int] = {}
    for count in range(len(aspects), -1, -1):
        agrees = partial(_agree_in, comparison, aspects[:count])
        matched = match_notes(a, b, onset_tolerance=comparison.tolerances.onset, agrees=agrees, start=matched)
    pairs = [
        Pair(a[i], b[j], tuple(aspect for aspect in aspects if not comparison.agree(aspect, a[i], b[j])))
        for i, j in matched.items()
    ]
    pairs.sort(key=lambda pair: (pair.a.onset, pair.a.is_drum, pair.a.pitch, pair.a.program, pair.b.onset))
    taken = set(matched.values())
    only_a = [note for index, note in enumerate(a) if index not in matched]
    only_b = [note for index, note in enumerate(b) if index not in taken]
    return NoteDiff(tuple(pairs), _singles(only_a, only_b), _singles(only_b, only_a))


def _agree_in(comparison: Comparison, aspects: Sequence[str], a: Note, b: Note) -> bool:
    return all(comparison.agree(aspect, a, b) for aspect in aspects)


def _singles(notes: Sequence[Note], others: Sequence[Note]) -> tuple[Single, ...]:
    onsets: defaultdict[tuple[bool, int], list[float]] = defaultdict(list)
    for other in sorted(others, key=lambda note: note.onset):
        onsets[other.is_drum, other.pitch].append(other.onset)
    ordered = sorted(notes, key=lambda note: (note.onset, note.is_drum, note.pitch, note.program))
    return tuple(Single(note, _nearest(note.onset, onsets[note.is_drum, note.pitch])) for note in ordered)


def _nearest(onset: float, onsets: Sequence[float]) -> float | None:
    """The shortest way from an onset to one of a sorted list, with its sign."""
    place = bisect(onsets, onset)
    ways = [other - onset for other in onsets[max(0, place - 1) : place + 1]]
    way = min(ways, key=abs, default=None)
    return way if way is not None and abs(way) <= NEARBY else None
