"""The note: what every model of the family is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Note:
    """One transcribed note.

    Times in seconds from the start of the audio, `pitch` as MIDI number, `velocity` 1..127, `program` 0..127
    (General MIDI, counted from 0; 0 for drums), `confidence` in 0..1 (see `tokens_to_notes`).
    """

    onset: float
    offset: float
    pitch: int
    velocity: int
    program: int
    is_drum: bool
    confidence: float = 1.0
