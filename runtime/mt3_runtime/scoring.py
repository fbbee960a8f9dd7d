"""How well notes agree with reference notes, by the usual measure of transcription: onset F1 within 50 ms."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.notes import Note

ONSET_TOLERANCE = 0.05  # seconds, as in mir_eval
DIGITS = 4  # of a distance, as in mir_eval: onsets on a grid are often exactly 50 ms apart, but for float64


def onset_f1(notes: Sequence[Note], reference: Sequence[Note]) -> float:
    """Note onset F1 in 0..1; drums match drums only, instruments are not compared. 1 where both are empty."""
    found, met = match_onsets(notes, reference)
    total = len(notes) + len(reference)
    return (len(found) + len(met)) / total if total else 1.0


def match_onsets(notes: Sequence[Note], reference: Sequence[Note]) -> tuple[set[int], set[int]]:
    """Pair notes of equal pitch whose onsets are within 50 ms, each at most once, as many as possible.

    Returns:
        Indices of the paired notes and of the paired reference notes.
    """
    found: set[int] = set()
    met: set[int] = set()
    waiting: defaultdict[tuple[bool, int], list[int]] = defaultdict(list)
    for index in sorted(range(len(reference)), key=lambda index: reference[index].onset, reverse=True):
        waiting[reference[index].is_drum, reference[index].pitch].append(index)
    # Windows of one width around sorted onsets: taking the earliest that still fits is optimal.
    for index in sorted(range(len(notes)), key=lambda index: notes[index].onset):
        onset = notes[index].onset
        candidates = waiting[notes[index].is_drum, notes[index].pitch]
        while candidates and round(reference[candidates[-1]].onset - onset, DIGITS) < -ONSET_TOLERANCE:
            candidates.pop()
        if candidates and round(reference[candidates[-1]].onset - onset, DIGITS) <= ONSET_TOLERANCE:
            met.add(candidates.pop())
            found.add(index)
    return found, met
