"""How well a transcription agrees with the notes that were played, by mir_eval."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import mir_eval
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mt3_runtime.notes import Note

DRUM_LABEL = 128  # beside the programs 0 to 127


@dataclass(frozen=True, slots=True)
class Agreement:
    """F1 scores of one clip, None where there is nothing to score.

    `onset`: pitch and onset within 50 ms, drums only with drums; `instrument`: and the program; `offset`: pitch, onset
    and offset within 50 ms or a fifth of the length, without drums; `drums`: onset of the drums alone.
    """

    onset: float | None
    instrument: float | None
    offset: float | None
    drums: float | None


def compare(notes: Sequence[Note], reference: Sequence[Note]) -> Agreement:
    """Score the notes of one clip."""
    pitched, drums = ([n for n in reference if n.is_drum == wanted] for wanted in (False, True))
    found, beaten = ([n for n in notes if n.is_drum == wanted] for wanted in (False, True))
    return Agreement(
        onset=_f1(notes, reference, lambda note: DRUM_LABEL * note.is_drum),
        instrument=_f1(notes, reference, lambda note: DRUM_LABEL if note.is_drum else note.program),
        offset=_f1(found, pitched, lambda _: 0, offset_ratio=0.2),
        drums=_f1(beaten, drums, lambda _: DRUM_LABEL),
    )


def average(agreements: Sequence[Agreement]) -> Agreement:
    """The mean of every score over the clips that have it."""
    means = {}
    for field in fields(Agreement):
        values = [v for v in (getattr(agreement, field.name) for agreement in agreements) if v is not None]
        means[field.name] = sum(values) / len(values) if values else None
    return Agreement(**means)


def _f1(
    notes: Sequence[Note],
    reference: Sequence[Note],
    label: Callable[[Note], int],
    offset_ratio: float | None = None,
) -> float | None:
    """F1 where only notes of the same label may agree."""
    if not reference:
        return 0.0 if notes else None
    agreed = 0
    for value in {label(note) for note in reference}:
        wanted, found = ([note for note in some if label(note) == value] for some in (reference, notes))
        if found:
            pairs = mir_eval.transcription.match_notes(
                *_arrays(wanted), *_arrays(found), onset_tolerance=0.05, offset_ratio=offset_ratio
            )
            agreed += len(pairs)
    return 2 * agreed / (len(notes) + len(reference))


def _arrays(notes: Sequence[Note]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Intervals in seconds [notes, 2] and pitches in Hz [notes]."""
    intervals = np.array([[note.onset, note.offset] for note in notes])
    return intervals, 440.0 * 2.0 ** (np.array([note.pitch - 69 for note in notes]) / 12.0)
