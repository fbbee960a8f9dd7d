"""What a transcription returns: the notes, and how they came about."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mt3_runtime.errors import OptionError, OutputError
from mt3_runtime.files import atomic_write
from mt3_runtime.midi import notes_to_midi, write_midi
from mt3_runtime.midi_styles import MT3_STYLE, MidiStyle
from mt3_runtime.picture import draw_piano_roll

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import pretty_midi

    from mt3_runtime.notes import Note
    from mt3_runtime.rows import Status

JSON_VERSION = 1
_DIGITS = 6  # of seconds and probabilities in JSON


@dataclass(frozen=True, slots=True)
class SegmentNotes:
    """The notes that one segment completed. A note held over is completed, and given, by a later segment.

    `start` in seconds; `count` is the number of segments of the whole audio: for a file what its header promises,
    until it has been read to its end, which is at the latest with the last segment; for a live stream those that have
    come. `status` is the worst of the segment's channels; one that `is_silent` was not decoded, and has "ended".
    """

    index: int
    count: int
    start: float
    notes: tuple[Note, ...]
    status: Status
    is_last: bool
    is_silent: bool = False


@dataclass(frozen=True, slots=True)
class Provenance:
    """How a transcription came about: what ran where, how long it took, and what went wrong.

    `bundle` is the folder, or "embedded demo". `stage_seconds` holds wall-clock seconds by stage.
    `real_time_factor` is processing seconds divided by audio seconds: 0.1 is ten times faster than the music
    plays, 0 where there is no audio. `tokens` are the ids generated, `invalid_events` and `dropped_events`
    those that made no note (see `DecodingStatistics`). Truncated segments reached the length limit before
    their end, failed ones gave no usable tokens, in one of their channels at least; both are indices of segments.
    `memory_restarts`: segments that should have been told of the one before, which failed (see `SongMemory`).
    `fallback_rows`: how many rows gave numbers that are not finite in half precision, and were decoded again in fp32.
    `skip_silence`: the rule by which segments are silent (see `SilenceRule`); `silent_segments`: those that were not
    decoded for that, by index.
    `device_reason`: why it is this device, where "auto" chose it.
    Of files transcribed together, each has its share of the seconds. `strict_upstream`: see `Transcriber`.

    Raises:
        OptionError: a time or a count is negative, or not a finite number.
    """

    model: str
    bundle: str
    bundle_sha256: str
    device: str
    provider: str
    precision: str
    runtime_version: str
    audio_seconds: float
    stage_seconds: Mapping[str, float]
    real_time_factor: float
    segments: int
    tokens: int
    invalid_events: int
    dropped_events: int
    truncated_segments: tuple[int, ...] = ()
    failed_segments: tuple[int, ...] = ()
    memory_restarts: tuple[int, ...] = ()
    fallback_rows: int = 0
    skip_silence: str = "off"
    silent_segments: tuple[int, ...] = ()
    device_reason: str = ""
    strict_upstream: bool = False
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage_seconds", dict(self.stage_seconds))  # the caller's may change later
        amounts = {field.name: getattr(self, field.name) for field in fields(self)} | dict(self.stage_seconds)
        for name, amount in amounts.items():
            if isinstance(amount, Real) and not 0 <= float(amount) < math.inf:
                raise OptionError(f"provenance {name!r} is {amount}: give a finite number of 0 or more")


@dataclass(frozen=True, slots=True)
class Transcription:
    """The notes of a piece of audio of `duration` seconds, and their provenance.

    `midi_style` is how they are written as MIDI; JSON and pictures hold them as they are.

    Raises:
        OptionError: `duration` is negative or not finite.
    """

    notes: tuple[Note, ...]
    duration: float
    provenance: Provenance
    midi_style: MidiStyle = MT3_STYLE

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(self.notes))
        if not 0 <= self.duration < math.inf:
            raise OptionError(f"the duration is {self.duration} s: give a finite number of 0 or more")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know about this result, one line each."""
        return self.provenance.warnings

    def to_midi(self) -> pretty_midi.PrettyMIDI:
        """Return the notes as a PrettyMIDI; see `notes_to_midi` for what MIDI cannot hold."""
        return notes_to_midi(self.notes, style=self.midi_style)

    def to_json(self) -> str:
        """Return everything as JSON, one note on a line; times in seconds, rounded to a microsecond.

        `confidence` is null where it is not known.
        """
        notes = ",\n    ".join(json.dumps(note_to_dict(note), allow_nan=False) for note in self.notes)
        provenance = asdict(self.provenance)
        warnings = provenance.pop("warnings")
        members = {
            "version": str(JSON_VERSION),
            "duration": json.dumps(round(float(self.duration), _DIGITS), allow_nan=False),
            "notes": f"[\n    {notes}\n  ]" if notes else "[]",
            "warnings": json.dumps(warnings),
            "provenance": _indented(provenance),
        }
        body = ",\n".join(f'  "{name}": {text}' for name, text in members.items())
        return f"{{\n{body}\n}}\n"

    def save(self, path: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write a file of the kind its suffix names: .mid or .midi, .json, .png (piano roll).

        The file is written whole or not at all.

        Returns:
            What this kind of file could not hold, one line each (see `midi_warnings`).

        Raises:
            OutputError: the suffix is none of these, or the file cannot be written.
            DependencyError: a picture is asked for and Pillow is not installed.
        """
        suffix = Path(path).suffix.lower()
        if suffix in {".mid", ".midi"}:
            return write_midi(self.notes, path, style=self.midi_style)
        if suffix == ".json":
            atomic_write(path, self.to_json().encode())
        elif suffix == ".png":
            heard = self.midi_style.written  # the instruments that stand for YourMT3's voices
            notes = [replace(note, program=heard.get(note.program, note.program)) for note in self.notes]
            atomic_write(path, draw_piano_roll(notes, duration=self.duration, title=self._title()))
        else:
            raise OutputError(f"cannot write {str(path)!r}: give it the suffix .mid, .midi, .json or .png")
        return ()

    def _title(self) -> str:
        return f"{self.provenance.model}: {len(self.notes)} notes in {self.duration:.1f} s"


def _indented(mapping: dict[str, Any]) -> str:
    # numpy's numbers are no numbers to json, but know the Python number they hold
    text = json.dumps(mapping, allow_nan=False, indent=2, default=lambda number: number.item())
    return text.replace("\n", "\n  ")


def note_to_dict(note: Note) -> dict[str, Any]:
    """A note as JSON holds it; times in seconds, rounded to a microsecond."""
    return {
        "onset": round(float(note.onset), _DIGITS),
        "offset": round(float(note.offset), _DIGITS),
        "pitch": int(note.pitch),
        "velocity": int(note.velocity),
        "program": int(note.program),
        "is_drum": bool(note.is_drum),
        "confidence": None if note.confidence is None else round(float(note.confidence), _DIGITS),
    }
