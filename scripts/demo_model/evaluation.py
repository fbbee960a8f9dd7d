"""The score of a model on clips it has never heard, as a table."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from demo_model.agreement import Agreement, average, compare
from demo_model.clips import VALIDATION
from demo_model.held_out import ROWS, held_out_clips
from demo_model.listening import transcribe_clips
from demo_model.scores import KINDS
from demo_model.settings import FEATURES
from demo_model.synthesis import RATE
from mt3_export.bundle_writer import export_bundle
from mt3_export.checkpoint import Checkpoint, load_checkpoint
from mt3_runtime.loading import load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from demo_model.clips import Clip
    from mt3_runtime.notes import Note
    from mt3_runtime.specs import ModelSpec


@dataclass(frozen=True, slots=True)
class Row:
    """The mean scores of `clips` clips of one kind, and how long they are together in seconds."""

    kind: str
    clips: int
    seconds: float
    agreement: Agreement


def evaluate(transcribe: Callable[[Clip], Sequence[Note]], count: int) -> list[Row]:
    """Score `count` clips of every kind of `ROWS`."""
    rows = []
    for kind in ROWS:
        seconds, agreements = 0.0, []
        for clip in held_out_clips(kind, count):
            agreements.append(compare(transcribe(clip), clip.notes))
            seconds += len(clip.audio) / RATE
        rows.append(Row(kind, count, seconds, average(agreements)))
    return rows


def evaluate_file(path: Path, count: int) -> list[Row]:
    """Score a bundle, or a checkpoint by way of a bundle of its own, with the runtime.

    Raises:
        Mt3Error: the bundle or checkpoint cannot be used.
    """
    if path.is_dir():
        return _evaluate_bundle(path, count)
    with tempfile.TemporaryDirectory() as folder:
        return _evaluate_bundle(export_bundle(load_checkpoint(path), Path(folder) / "bundle"), count)


def _evaluate_bundle(path: Path, count: int) -> list[Row]:
    transcriber = load(path, "cpu")
    return evaluate(lambda clip: transcriber.transcribe(clip.audio, RATE).notes, count)


def validate(model: ModelSpec, weights: Mapping[str, Tensor], count: int) -> dict[str, float]:
    """Scores on a few clips of every kind of `ROWS`, by name, as the log keeps them."""
    tensors = {key: tensor.detach().float() for key, tensor in weights.items()}
    checkpoint = Checkpoint(model, FEATURES, tensors, "training", None)
    scores: dict[str, float] = {}
    for kind in ROWS:
        clips = list(held_out_clips(kind, count, VALIDATION))
        heard = transcribe_clips(checkpoint, clips)
        mean = average([compare(notes, clip.notes) for notes, clip in zip(heard, clips, strict=True)])
        for name in ("onset", "instrument", "drums"):
            value = getattr(mean, name)
            if value is not None:
                scores[f"{name}.{kind}"] = round(value, 4)
    return scores


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| clips | seconds | onset F1 | onset + program F1 | onset + offset F1 (no drums) | drums F1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        scores = row.agreement
        drums = scores.drums if KINDS[row.kind].drums else None  # hits that are none count as onsets
        shown = " | ".join(
            "-" if value is None else f"{value:.3f}"
            for value in (scores.onset, scores.instrument, scores.offset, drums)
        )
        lines.append(f"| {row.clips} of {ROWS[row.kind]} | {row.seconds:.0f} | {shown} |")
    return "\n".join(lines)
