"""The note: what every model of the family is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable

VELOCITY_RANGE = (1, 127)  # 0 would read back as a note-off
MIDI_RANGE = (0, 127)


@dataclass(frozen=True, slots=True)
class Note:
    """One transcribed note.

    Times in seconds from the start of the audio, `pitch` as MIDI number, `velocity` 1..127, `program` 0..127
    (General MIDI, counted from 0; 0 for drums), `confidence` in 0..1, None when not known (see
    `NoteDecoder`).

    Raises:
        OptionError: a value is out of range, or the note does not end after it starts.
    """

    onset: float
    offset: float
    pitch: int
    velocity: int
    program: int
    is_drum: bool
    confidence: float | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.onset < self.offset < math.inf):
            raise OptionError(f"a note cannot last from {self.onset} s to {self.offset} s: give 0 <= onset < offset")
        _check_range("pitch", self.pitch, MIDI_RANGE)
        _check_range("velocity", self.velocity, VELOCITY_RANGE)
        _check_range("program", self.program, MIDI_RANGE)
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise OptionError(f"a note's confidence is {self.confidence}: give 0..1, or None if not known")


def sort_notes(notes: Iterable[Note]) -> list[Note]:
    """Notes in canonical order: onset, pitched before drums, program, pitch, offset, velocity."""
    return sorted(
        notes,
        key=lambda note: (
            note.onset, note.is_drum, note.program, note.pitch, note.offset, note.velocity,
        ),
    )  # fmt: skip


def _check_range(name: str, value: Any, bounds: tuple[int, int]) -> None:
    low, high = bounds
    is_whole = type(value) is int or isinstance(value, Integral)  # the second is slow
    if not (is_whole and low <= value <= high):
        raise OptionError(f"a note's {name} is {value!r}: give a whole number from {low} to {high}")
