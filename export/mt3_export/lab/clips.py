"""All clips through one combination: their notes as MIDI and as scores, and the rows that they were made of."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.lab.dataset import load_reference
from mt3_export.lab.listening import listen, read_samples
from mt3_export.lab.material import is_usable, read_rows, save_rows
from mt3_export.lab.note_scores import score_clip
from mt3_export.lab.results import REFERENCE, Clip, FreeRun
from mt3_runtime.files import atomic_write
from mt3_runtime.notes import Note

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mt3_export.lab.job import Job
    from mt3_export.lab.listening import Said
    from mt3_runtime.transcriber import Transcriber


@dataclass(frozen=True, slots=True, eq=False)
class HeardClips:
    """Scores of every clip and its rows; `free` is None for fp32 itself."""

    clips: tuple[Clip, ...]
    rows: list[tuple[Said, ...]]
    free: FreeRun | None

    @property
    def fallback_rows(self) -> int:
        """Rows that were decoded again in fp32."""
        return sum(said.fell_back for rows in self.rows for said in rows)


def hear_clips(job: Job, transcriber: Transcriber, say: Callable[[int, int], None]) -> HeardClips:
    """Transcribe and score every clip; fp32's rows and notes are kept for the combinations that come after it.

    Args:
        job: names the clips.
        transcriber: what is looked at.
        say: is told how many clips are done, and of how many.

    Raises:
        AudioError: a clip cannot be read.
        OptionError: a reference cannot be read.
        OutputError: a file cannot be written.
    """
    is_reference = job.name == REFERENCE
    known = None if is_reference else read_notes(job.reference_notes)
    clips, rows, notes = [], [], []
    rate = transcriber.bundle.manifest.features.sample_rate
    for done, sound in enumerate(job.clips):
        say(done, len(job.clips))
        heard = listen(transcriber, read_samples(sound.file.audio, rate, job.seconds))
        found = heard.transcription
        path = job.midi(sound.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
        own = found.notes if known is None else known[done]
        played = load_reference(sound.file, job.seconds) if sound.reference else None
        against = None if played is None else score_clip(found.notes, played)
        clips.append(Clip(sound.name, found.duration, len(found.notes), score_clip(found.notes, own), against))
        rows.append(heard.rows)
        if is_reference:
            notes.append(found.notes)
    if is_reference:
        save_rows(job.reference_rows, rows)
        save_notes(job.reference_notes, notes)
    free = None if is_reference else free_run(job, read_rows(job.reference_rows, len(rows)), rows)
    return HeardClips(tuple(clips), rows, free)


def free_run(job: Job, wanted: Sequence[Sequence[Said]], found: Sequence[Sequence[Said]]) -> FreeRun:
    """Where rows that decode on their own part from fp32's."""
    names, first, lengths = [], [], []
    channels = len({said.channel for rows in wanted for said in rows}) > 1
    for sound, ours, theirs in zip(job.clips, found, wanted, strict=True):
        for mine, reference in zip(ours, theirs, strict=True):
            if is_usable(reference):
                names.append(f"{sound.name}:{mine.segment}" + (f":{mine.channel}" if channels else ""))
                first.append(divergence_step(reference, mine))
                lengths.append(len(reference.tokens) + (reference.status == "ended"))
    return FreeRun(tuple(names), tuple(first), tuple(lengths))


def divergence_step(wanted: Said, found: Said) -> int:
    """The step at which the first other token was chosen, the end being one; -1 if none was."""
    shared = min(len(wanted.tokens), len(found.tokens))
    others = (wanted.tokens[:shared] != found.tokens[:shared]).nonzero()[0]
    if others.size:
        return int(others[0])
    same = len(wanted.tokens) == len(found.tokens) and wanted.status == found.status
    return -1 if same else shared


def save_notes(path: Path, clips: Sequence[Sequence[Note]]) -> None:
    """Write the notes of all clips, exactly."""
    rows = [[list(dataclasses.astuple(note)) for note in notes] for notes in clips]
    atomic_write(path, json.dumps(rows).encode())


def read_notes(path: Path) -> list[list[Note]]:
    """What `save_notes` wrote."""
    return [[Note(*values) for values in notes] for notes in json.loads(path.read_bytes())]
