"""Scores of notes, clip by clip and over all clips."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Literal

from mt3_export.lab.bootstrap import LOSSES, SCORES, estimate
from mt3_export.lab.results import F1s, Scored
from mt3_runtime.scoring import score_notes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mt3_export.lab.results import Clip, Estimate
    from mt3_runtime.notes import Note

Against = Literal["fp32", "reference"]
NAMES = tuple(field.name for field in fields(F1s))
LEAKAGE = "leakage"  # the one score of which more is worse


def score_clip(notes: Sequence[Note], other: Sequence[Note]) -> F1s:
    """How well notes agree with other ones: what fp32 heard in the same clip, or what was played in it."""
    scores = score_notes(notes, other)
    return F1s(
        onset=scores.onset,
        onset_offset=scores.onset_offset,
        onset_offset_program=scores.onset_offset_program,
        drums=scores.drums,
        leakage=leakage(notes, other),
    )


def leakage(notes: Sequence[Note], other: Sequence[Note]) -> float | None:
    """The share of notes on programs of which `other` has no note; drums are one program. None without notes."""
    known = {_program(note) for note in other}
    return sum(_program(note) not in known for note in notes) / len(notes) if notes else None


def summarise(clips: Sequence[Clip], reference_clips: Sequence[Clip], against: Against) -> Scored:
    """Means over the clips that have a score, and what is lost where fp32 has it too.

    A loss is fp32's score less this one's, clip by clip; of leakage, this one's less fp32's: a loss above zero is
    always worse. Against its own notes fp32 scores 1, and leaks 0. Against a reference, who has no score of a clip (no
    drums were played, and it heard none) has lost nothing there, and is taken to score 1 where the other one has one.

    Args:
        clips: Of one combination.
        reference_clips: Of fp32, in the same order; the same object as `clips` for fp32 itself, which loses nothing.
        against: Which scores of the clips.

    Raises:
        ValueError: the clips are not the same.
    """
    names = [[clip.name for clip in side] for side in (clips, reference_clips)]
    if names[0] != names[1]:
        raise ValueError("the clips of a combination are not those of fp32")
    ours = [_scores(clip, against) for clip in clips]
    theirs = [_own(clip, against) for clip in reference_clips]
    bounds = LOSSES if against == "reference" else SCORES
    pairs = [
        pair
        for pair, mine in zip(zip(ours, theirs, strict=True), clips, strict=True)
        if clips is not reference_clips and (against == "fp32" or mine.against_reference is not None)
    ]
    return Scored(
        scores=_estimates({name: [score[name] for score in ours if name in score] for name in NAMES}, SCORES),
        loss=_estimates({name: _losses(name, pairs, _silent(name, against)) for name in NAMES}, bounds),
    )


def _program(note: Note) -> int | None:
    return None if note.is_drum else note.program


def _scores(clip: Clip, against: Against) -> dict[str, float]:
    """The scores that a clip has, by name."""
    scores = clip.against_fp32 if against == "fp32" else clip.against_reference
    values = {} if scores is None else {name: getattr(scores, name) for name in NAMES}
    return {name: value for name, value in values.items() if value is not None}


def _own(clip: Clip, against: Against) -> dict[str, float]:
    """The scores of fp32, by name."""
    return _scores(clip, against) if against == "reference" else {name: float(name != LEAKAGE) for name in NAMES}


def _silent(name: str, against: Against) -> float | None:
    """The score of who rightly heard nothing; None where that is no score."""
    return 1.0 if against == "reference" and name != LEAKAGE else None


def _losses(
    name: str, pairs: Iterable[tuple[Mapping[str, float], Mapping[str, float]]], silent: float | None
) -> list[float]:
    sign, losses = -1.0 if name == LEAKAGE else 1.0, []
    for ours, theirs in pairs:
        if name in ours or name in theirs:
            mine, wanted = ours.get(name, silent), theirs.get(name, silent)
            if mine is not None and wanted is not None:
                losses.append(sign * (wanted - mine))
    return losses


def _estimates(values: Mapping[str, Sequence[float]], bounds: tuple[float, float]) -> dict[str, Estimate]:
    found = {name: estimate(each, bounds) for name, each in values.items()}
    return {name: value for name, value in found.items() if value is not None}
