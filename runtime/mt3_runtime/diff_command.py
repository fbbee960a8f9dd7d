"""The command `mt3-run diff`: what differs between two MIDI files, note by note."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pretty_midi

from mt3_runtime.errors import OptionError
from mt3_runtime.files import atomic_write
from mt3_runtime.midi_reading import MidiNotes, read_midi
from mt3_runtime.note_diff import Comparison, NoteDiff, Pair, Single, diff_notes
from mt3_runtime.picture import check_pillow, draw_differences
from mt3_runtime.scoring import Scores, Tolerances, score_notes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

    from mt3_runtime.notes import Note

LONGEST_BAR = 10
PITCH_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
SCORE_TITLES = {
    "onset": "onset F1, all notes",
    "pitched_onset": "onset F1, pitched notes",
    "onset_offset": "onset+offset F1",
    "onset_offset_program": "onset+offset+program F1",
    "drums": "drums F1",
}


@dataclass(frozen=True, slots=True)
class Compared:
    """Two files and what differs between them; A is the reference."""

    paths: tuple[Path, Path]
    files: tuple[MidiNotes, MidiNotes]
    comparison: Comparison
    diff: NoteDiff
    scores: Scores

    def passes(self, least_f1: float | None) -> bool:
        """Whether the onset F1 is at least that; without a number, whether the files are equal within tolerances."""
        if least_f1 is None:
            return self.diff.equal
        return (1.0 if self.scores.onset is None else self.scores.onset) >= least_f1


def diff_files(arguments: argparse.Namespace) -> tuple[str, bool]:
    """Carry the command out.

    Returns:
        What it prints, and whether the files agree.

    Raises:
        OptionError: a file cannot be read, or an option is out of range.
        OutputError: the picture cannot be written.
        DependencyError: a picture is wanted and Pillow is not installed.
    """
    comparison = _comparison(arguments)
    least = arguments.f1
    if least is not None and not 0 <= least <= 1:
        raise OptionError(f"--f1 is {least:g}: give a number from 0 to 1")
    if arguments.picture is not None:
        if arguments.picture.suffix.lower() != ".png":
            raise OptionError(f"the picture {str(arguments.picture)!r:.200} is a PNG file: end its name with .png")
        check_pillow()
    compared = compare_files(arguments.a, arguments.b, comparison)
    if arguments.picture is not None:
        title = f"A: {arguments.a.name}, B: {arguments.b.name}"
        atomic_write(arguments.picture, draw_differences(compared.diff, title=title))
    text = json.dumps(to_data(compared, least)) if arguments.json else to_text(compared, least, arguments.limit)
    return text, compared.passes(least)


def _comparison(arguments: argparse.Namespace) -> Comparison:
    tolerances = Tolerances(arguments.onset_tolerance / 1e3, arguments.offset_tolerance / 1e3, arguments.offset_ratio)
    return Comparison(tolerances, arguments.programs == "on", arguments.offsets == "on", arguments.velocities)


def compare_files(a: Path, b: Path, comparison: Comparison) -> Compared:
    """Read two MIDI files, match their notes and score B against A."""
    files = read_midi(a), read_midi(b)
    diff = diff_notes(files[0].notes, files[1].notes, comparison)
    return Compared((a, b), files, comparison, diff, score_notes(files[1].notes, files[0].notes, comparison.tolerances))


def to_data(compared: Compared, least_f1: float | None) -> dict[str, Any]:
    """All of it as plain data; times in seconds."""
    diff = compared.diff
    return {
        "passes": compared.passes(least_f1),
        "least_f1": least_f1,
        "equal": diff.equal,
        **{
            side: {"file": str(path), "notes": len(file.notes), "warnings": list(file.warnings)}
            for side, path, file in zip("ab", compared.paths, compared.files, strict=True)
        },
        "compared": dataclasses.asdict(compared.comparison),
        "counts": _counts(compared),
        "scores": dataclasses.asdict(compared.scores),
        "only_a": [dataclasses.asdict(single) for single in diff.only_a],
        "only_b": [dataclasses.asdict(single) for single in diff.only_b],
        "changed": [dataclasses.asdict(pair) for pair in diff.changed],
    }


def _counts(compared: Compared) -> dict[str, int]:
    diff, changed = compared.diff, compared.diff.changed
    other = {aspect: sum(aspect in pair.differs for pair in changed) for aspect in compared.comparison.aspects}
    return {
        "both": len(diff.pairs),
        "agree": len(diff.pairs) - len(changed),
        **{f"other_{aspect}": count for aspect, count in other.items()},
        "only_a": len(diff.only_a),
        "only_b": len(diff.only_b),
    }


def to_text(compared: Compared, least_f1: float | None, limit: int) -> str:
    """The comparison for a person: a summary, the scores, and up to `limit` differences in order of time."""
    counts = _counts(compared)
    lines = [
        f"{side}  {str(path)!r:.200}: {len(file.notes)} notes"
        for side, path, file in zip("AB", compared.paths, compared.files, strict=True)
    ]
    lines += [f"note: {warning}" for file in compared.files for warning in file.warnings]
    others = [f"{counts[f'other_{name}']} with another {name}" for name in compared.comparison.aspects]
    lines.append(f"{counts['both']:7}  in both: {counts['agree']} agree{''.join(f', {other}' for other in others)}")
    lines += [f"{counts[f'only_{side.lower()}']:7}  only in {side}" for side in "AB"]
    for name, title in SCORE_TITLES.items():
        score = getattr(compared.scores, name)
        lines.append(f"{'-' if score is None else f'{score:.4f}':>7}  {title}")
    rows = [row for _, row in sorted(_rows(compared))]
    lines += ["", *rows[:limit]] if rows[:limit] else []
    lines += [f"and {len(rows) - limit} more"] if len(rows) > limit else []
    if least_f1 is not None:
        verdict = "at least" if compared.passes(least_f1) else "less than"
        return "\n".join([*lines, f"onset F1 is {verdict} {least_f1:g}"])
    return "\n".join([*lines, "equal within the tolerances" if compared.diff.equal else "different"])


def _rows(compared: Compared) -> Iterator[tuple[tuple[float, int], str]]:
    """A line for each difference, with what it is sorted by."""
    diff, tolerance = compared.diff, compared.comparison.tolerances.onset
    for mark, singles in (("-", diff.only_a), ("+", diff.only_b)):
        for single in singles:
            yield (single.note.onset, single.note.pitch), _single_row(mark, single, tolerance)
    for pair in diff.changed:
        what = "; ".join(_change(pair, aspect, compared.comparison) for aspect in pair.differs)
        yield (pair.a.onset, pair.a.pitch), f"~ {_place(pair.a)}  {what}"


def _single_row(mark: str, single: Single, tolerance: float) -> str:
    where = f"only in {'A' if mark == '-' else 'B'}"
    if single.nearest is None:
        return f"{mark} {_place(single.note)}  {where}"
    other = "B" if mark == "-" else "A"
    return (
        f"{mark} {_place(single.note)}  {where}, {other}'s is {single.nearest * 1e3:+.1f} ms off "
        f"{_bar(abs(single.nearest), tolerance)}"
    )


def _change(pair: Pair, aspect: str, comparison: Comparison) -> str:
    """What one aspect was and is, with a bar of how far it is off: one sign for each tolerance begun."""
    a, b = pair.a, pair.b
    if aspect == "program":
        return f"program is {_program(b)}"
    if aspect == "velocity":
        return f"velocity {a.velocity} -> {b.velocity} {_bar(abs(b.velocity - a.velocity), comparison.velocity or 1)}"
    off, tolerance = b.offset - a.offset, comparison.tolerances.offset_of(a)
    return f"offset {off * 1e3:+.1f} ms (of {tolerance * 1e3:.0f}) {_bar(abs(off), tolerance)}"


def _bar(distance: float, tolerance: float) -> str:
    length = math.ceil(distance / tolerance - 1e-9) if distance < LONGEST_BAR * tolerance else LONGEST_BAR + 1
    return "#" * length if length <= LONGEST_BAR else "#" * LONGEST_BAR + ">"


def _place(note: Note) -> str:
    if note.is_drum:
        name = pretty_midi.note_number_to_drum_name(note.pitch) or "Drum"
        return f"{note.onset:9.3f} s  {note.pitch:<4} {name:27.27}"
    name = f"{PITCH_NAMES[note.pitch % 12]}{note.pitch // 12 - 1}"
    return f"{note.onset:9.3f} s  {name:<4} {_program(note):27.27}"


def _program(note: Note) -> str:
    return f"{note.program} {pretty_midi.program_to_instrument_name(note.program)}"
