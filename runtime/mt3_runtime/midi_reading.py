"""MIDI files to notes, as `pretty_midi` reads them, with a word about what it leaves out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import mido
import pretty_midi

from mt3_runtime.errors import OptionError
from mt3_runtime.notes import Note, sort_notes

if TYPE_CHECKING:
    import os

SIZE_LIMIT = 64 << 20  # bytes
# What mido and pretty_midi raise over damaged files.
DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
FIX = "give a MIDI file of type 0 or 1"
TICKS = 10_000_000  # more are no file to pretty_midi; see `midi.py` for how long that is


@dataclass(frozen=True, slots=True)
class MidiNotes:
    """Notes of a MIDI file in canonical order, and one line for each kind of thing that could not be read."""

    notes: tuple[Note, ...]
    warnings: tuple[str, ...]


def read_midi(path: str | os.PathLike[str]) -> MidiNotes:
    """Notes of a MIDI file; programs of drum tracks, which are kits, become 0.

    Raises:
        OptionError: the file cannot be read, or is no MIDI file of type 0 or 1.
    """
    name = repr(str(path))[:200]
    data = _read(Path(path), name)
    try:
        file = mido.MidiFile(file=BytesIO(data))
        why = _unsuitable(file)
    except (*DAMAGE, mido.KeySignatureError) as error:
        why = f"it is damaged or no MIDI file ({_reason(error)})"
    if why:
        raise OptionError(f"{name} cannot be read: {why}: {FIX}")
    begun = sum(message.type == "note_on" and message.velocity > 0 for track in file.tracks for message in track)
    elsewhere = any(message.type == "set_tempo" for track in file.tracks[1:] for message in track)
    try:
        notes = _notes(file)
    except DAMAGE as error:
        raise OptionError(f"{name} cannot be read: its times make no sense ({_reason(error)}): {FIX}") from None
    told = []
    if begun > len(notes):
        told.append(f"{name}: notes that never end or have no length, left out: {begun - len(notes)}")
    if elsewhere:
        told.append(f"{name}: tempo changes outside the first track, ignored")
    return MidiNotes(tuple(notes), tuple(told))


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"{name} cannot be read ({reason}): give the path of a MIDI file") from None
    if len(data) > SIZE_LIMIT:
        raise OptionError(f"{name} is larger than {SIZE_LIMIT >> 20} MiB: give a MIDI file")
    return data


def _unsuitable(file: mido.MidiFile) -> str:
    """Why the times of a file cannot be told, empty if they can."""
    file.tracks = [track for track in file.tracks if track]
    if file.type not in {0, 1}:
        return f"its tracks have no time in common (type {file.type})"
    if file.ticks_per_beat <= 0:
        return "it counts time in frames (SMPTE), not in beats"
    if any(sum(message.time for message in track) > TICKS for track in file.tracks):
        return f"it lasts longer than the {TICKS:,} ticks that pretty_midi reads"
    return "" if file.tracks else "it has no events"


def _notes(file: mido.MidiFile) -> list[Note]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about tempos elsewhere, which the caller tells
        midi = pretty_midi.PrettyMIDI(mido_object=file)
    return sort_notes(
        Note(
            float(note.start),
            float(note.end),
            int(note.pitch),
            int(note.velocity),
            0 if track.is_drum else int(track.program),
            bool(track.is_drum),
        )
        for track in midi.instruments
        for note in track.notes
    )


def _reason(error: Exception) -> str:
    """What a library says, on one line."""
    return " ".join(f"{type(error).__name__} {error}".split())[:120]
