"""How well notes agree with reference notes, by the usual measures of transcription, those of `mir_eval`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mt3_runtime.errors import OptionError
from mt3_runtime.note_matching import ONSET_TOLERANCE, match_notes, rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.notes import Note

LARGEST_ONSET_TOLERANCE = 10.0  # seconds: beyond it every note is near every other


@dataclass(frozen=True, slots=True)
class Tolerances:
    """How far two notes may be apart and still agree; the defaults are mir_eval's.

    Offsets may differ by `offset` seconds or `offset_ratio` of the reference note's duration, whichever is more.

    Raises:
        OptionError: a value is out of range.
    """

    onset: float = ONSET_TOLERANCE
    offset: float = 0.05
    offset_ratio: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.onset <= LARGEST_ONSET_TOLERANCE:
            largest = f"{LARGEST_ONSET_TOLERANCE * 1e3:g}"
            raise OptionError(f"the onset tolerance is {self.onset * 1e3:g} ms: give 0 to {largest}")
        for name, value in (("tolerance", self.offset), ("ratio", self.offset_ratio)):
            if not 0 <= value < math.inf:
                raise OptionError(f"the offset {name} is {value}: give a finite number of 0 or more")

    def offset_of(self, reference: Note) -> float:
        """Seconds by which the offset of this reference note may be missed."""
        return max(self.offset_ratio * (reference.offset - reference.onset), self.offset)

    def offsets_agree(self, reference: Note, note: Note) -> bool:
        """Whether two notes end at the same time; drums do, as their ends mean nothing."""
        return reference.is_drum or rounded(abs(reference.offset - note.offset)) <= self.offset_of(reference)


MIR_EVAL = Tolerances()


@dataclass(frozen=True, slots=True)
class Scores:
    """F1 scores in 0..1, each of a matching of its own; None where neither side has such notes.

    `onset` counts all notes, `drums` drums alone, the others pitched notes alone.
    """

    onset: float | None
    pitched_onset: float | None
    onset_offset: float | None
    onset_offset_program: float | None
    drums: float | None


def score_notes(notes: Sequence[Note], reference: Sequence[Note], tolerances: Tolerances = MIR_EVAL) -> Scores:
    """All F1 scores of notes against a reference."""
    drums = [[note for note in side if note.is_drum] for side in (reference, notes)]
    pitched = [[note for note in side if not note.is_drum] for side in (reference, notes)]
    match = partial(match_notes, onset_tolerance=tolerances.onset)
    onsets, hits = len(match(*pitched)), len(match(*drums))
    ends = match(*pitched, agrees=tolerances.offsets_agree)
    same = match(*pitched, agrees=lambda a, b: a.program == b.program and tolerances.offsets_agree(a, b))
    of_pitched, of_drums = (len(side[0]) + len(side[1]) for side in (pitched, drums))
    return Scores(
        onset=_f1(onsets + hits, of_pitched + of_drums),
        pitched_onset=_f1(onsets, of_pitched),
        onset_offset=_f1(len(ends), of_pitched),
        onset_offset_program=_f1(len(same), of_pitched),
        drums=_f1(hits, of_drums),
    )


def _f1(pairs: int, notes: int) -> float | None:
    return 2 * pairs / notes if notes else None


def onset_f1(notes: Sequence[Note], reference: Sequence[Note]) -> float:
    """Note onset F1 in 0..1; drums match drums only, instruments are not compared. 1 where both are empty."""
    score = _f1(len(match_notes(reference, notes)), len(notes) + len(reference))
    return 1.0 if score is None else score


def match_onsets(notes: Sequence[Note], reference: Sequence[Note]) -> tuple[set[int], set[int]]:
    """Pair notes of equal pitch whose onsets are within 50 ms, each at most once, as many as possible.

    Returns:
        Indices of the paired notes and of the paired reference notes.
    """
    matched = match_notes(reference, notes)
    return set(matched.values()), set(matched)
