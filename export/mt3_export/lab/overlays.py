"""Piano rolls of fp32's notes and the chosen precision's over each other, for the worst and the median clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.lab.advice import loss_of
from mt3_export.lab.results import REFERENCE
from mt3_export.lab.wording import counted, f1
from mt3_runtime.errors import DependencyError, Mt3Error
from mt3_runtime.midi_reading import read_midi
from mt3_runtime.note_diff import diff_notes
from mt3_runtime.picture import draw_differences

if TYPE_CHECKING:
    from pathlib import Path

    from mt3_export.lab.results import Clip, Combination, Results


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file with its title and caption; where `png` is empty, the caption says why there is none."""

    title: str
    caption: str
    png: bytes


def draw_overlays(results: Results, folder: Path, choice: str | None) -> tuple[Picture, ...]:
    """Draw the clip whose onset F1 against fp32 is the worst, and the one whose is the median.

    They are the chosen combination's; where that is fp32, those of the fastest other one, or, if none was timed, of
    the one that loses most.

    Args:
        results: Of the run.
        folder: That of the run: notes are read from midi/COMBINATION/CLIP.mid in it.
        choice: Name of the recommended combination.
    """
    shown = _shown(results, choice)
    if shown is None:
        return (Picture("No piano rolls", "There are no notes to compare with fp32's.", b""),)
    pictures: list[Picture] = []
    for what, clip in _clips(shown):
        title = f"{what}: {clip.name}"
        try:
            pictures.append(_draw(folder, shown, clip, title))
        except DependencyError as error:
            return (Picture("No piano rolls", f"{error}", b""),)
        except Mt3Error as error:
            pictures.append(Picture(title, f"Not drawn: {error}", b""))
    return tuple(pictures)


def _shown(results: Results, choice: str | None) -> Combination | None:
    others = [c for c in results.combinations if c.outcome == "done" and c.name != REFERENCE and _ranked(c)]
    chosen = next((c for c in others if c.name == choice), None)
    if chosen:
        return chosen
    timed = [(c.speed.times_realtime, c) for c in others if c.speed]
    if timed:
        return max(timed, key=lambda pair: pair[0])[1]

    def lost(combination: Combination) -> float:
        loss = loss_of(results, combination)
        return loss.mean if loss else 0.0

    return max(others, key=lost, default=None)


def _ranked(combination: Combination) -> list[tuple[float, Clip]]:
    """Clips that have a score, worst first; of equal ones the one with most notes, where most is to be seen."""
    scored = [(c.against_fp32.onset, c) for c in combination.clips if c.against_fp32.onset is not None]
    return sorted(scored, key=lambda pair: (pair[0], -pair[1].notes, pair[1].name))


def _clips(combination: Combination) -> list[tuple[str, Clip]]:
    ranked = [clip for _, clip in _ranked(combination)]
    worst, median = ranked[0], ranked[len(ranked) // 2]
    return [("Worst clip", worst)] + [("Median clip", median)] * (median is not worst)


def _draw(folder: Path, combination: Combination, clip: Clip, title: str) -> Picture:
    ours, theirs = (
        read_midi(folder.joinpath("midi", name, *f"{clip.name}.mid".split("/"))).notes
        for name in (REFERENCE, combination.name)
    )
    diff = diff_notes(ours, theirs)
    png = draw_differences(diff, title=f"{clip.name}: A is {REFERENCE}, B is {combination.name}")
    same = len(diff.pairs) - len(diff.changed)
    score = "" if clip.against_fp32.onset is None else f", onset F1 {f1(clip.against_fp32.onset)}"
    caption = (
        f"{combination.name} over fp32{score}: {counted(same, 'note')} the same, {len(diff.changed):,} with another "
        f"program or offset, {len(diff.only_a):,} in fp32 only, {len(diff.only_b):,} in {combination.name} only."
    )
    return Picture(title, caption, png)
