"""`mt3-run demo`: the embedded clip through the embedded model, beside its reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mt3_runtime.bundle import demo_clip_path
from mt3_runtime.errors import OutputError
from mt3_runtime.files import atomic_write
from mt3_runtime.loading import load
from mt3_runtime.midi_reading import read_midi
from mt3_runtime.picture import check_pillow, draw_piano_roll
from mt3_runtime.scoring import onset_f1

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mt3_runtime.notes import Note
    from mt3_runtime.transcription import Transcription


def run_demo(folder: Path) -> str:
    """Transcribe the demo clip and write demo.mid, demo.json and demo.png into `folder`.

    Returns:
        What was found, how well it agrees with the reference, and where the time went.

    Raises:
        OutputError: the folder cannot be written.
        DependencyError: Pillow or onnxruntime is not installed.
    """
    check_pillow()
    clip = demo_clip_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create folder {folder} ({error.strerror}): choose another --output-dir") from error
    transcription = load().transcribe(clip / "clip.flac")
    reference = read_midi(clip / "reference.mid").notes
    title = f"demo clip: {len(transcription.notes)} notes found, {len(reference)} in the reference"
    picture = draw_piano_roll(transcription.notes, reference=reference, duration=transcription.duration, title=title)
    files = [folder / f"demo.{suffix}" for suffix in ("mid", "json", "png")]
    for path in files[:2]:
        transcription.save(path)
    atomic_write(files[2], picture)
    return _report(transcription, reference, files)


def _report(transcription: Transcription, reference: Sequence[Note], files: list[Path]) -> str:
    provenance = transcription.provenance
    total, notes = sum(provenance.stage_seconds.values()), len(transcription.notes)
    f1 = onset_f1(transcription.notes, reference)
    lines = [f"{transcription.duration:.1f} s of audio in {total:.2f} s on {provenance.device} ({provenance.provider})"]
    lines += [f"  {name:<9} {seconds * 1e3:7.1f} ms" for name, seconds in provenance.stage_seconds.items()]
    lines += [f"{notes} notes, onset F1 {f1:.2f} against the {len(reference)} of the reference"]
    lines += [f"note: {warning}" for warning in transcription.warnings]
    lines += [f"written: {', '.join(map(str, files))}"]
    return "\n".join(lines)
