"""Onset F1 against mir_eval, which finds the largest matching by another algorithm."""

from __future__ import annotations

import mir_eval
import numpy as np
import pytest

from mt3_runtime.notes import Note
from mt3_runtime.scoring import match_onsets, onset_f1


def note(onset, pitch=60, *, is_drum=False, program=0):
    return Note(onset, onset + 0.1, pitch, 100, program, is_drum)


def random_notes(rng, count, grid):
    """Crowded: every onset has several candidates, and where there is a grid many are exactly 50 ms away."""
    onsets = rng.uniform(0, 2, count) if grid is None else rng.integers(0, 2 * grid, count) / grid
    return [
        note(float(onset), int(pitch), program=int(program), is_drum=bool(is_drum))
        for onset, pitch, program, is_drum in zip(
            onsets, rng.integers(60, 63, count), rng.integers(0, 128, count), rng.random(count) < 0.4, strict=True
        )
    ]


def arrays(notes):
    """Intervals and pitches for mir_eval; drums, far away from every pitch, for it knows none."""
    intervals = np.array([[note.onset, note.offset] for note in notes])
    hertz = 440 * 2 ** ((np.array([note.pitch + 200 * note.is_drum for note in notes]) - 69) / 12)
    return intervals, hertz


@pytest.mark.parametrize("grid", [None, 100, 125, 1000])
def test_the_score_is_mir_evals(grid):
    rng = np.random.default_rng(grid)
    for _ in range(60):
        notes, reference = (random_notes(rng, rng.integers(1, 50), grid) for _ in range(2))
        scores = mir_eval.transcription.precision_recall_f1_overlap(
            *arrays(reference), *arrays(notes), onset_tolerance=0.05, offset_ratio=None
        )
        assert onset_f1(notes, reference) == pytest.approx(scores[2], abs=1e-12)
        found, met = match_onsets(notes, reference)
        assert len(found) == len(met) == round(scores[0] * len(notes))
        assert found <= set(range(len(notes)))
        assert met <= set(range(len(reference)))


def test_the_notes_that_matched_are_named_by_their_places():
    notes = [note(3.0), note(1.0, 61), note(1.02), note(9.0)]
    reference = [note(1.0), note(5.0), note(3.04), note(9.06)]
    assert match_onsets(notes, reference) == ({0, 2}, {0, 2})
    assert onset_f1(notes, reference) == pytest.approx(0.5)


def test_fifty_milliseconds_on_a_grid_are_within_whatever_float64_makes_of_them():
    for step in range(1000):
        early, late = [note(step / 100)], [note((step + 5) / 100)]
        assert onset_f1(early, late) == onset_f1(late, early) == 1
        late = [note((step + 6) / 100)]
        assert onset_f1(early, late) == onset_f1(late, early) == 0


def test_one_note_matches_one_note():
    assert match_onsets([note(1.0), note(1.01), note(1.02)], [note(1.01)])[1] == {0}
    assert onset_f1([note(1.0), note(1.01), note(1.02)], [note(1.01)]) == pytest.approx(2 / 4)
    # Whoever pairs the two nearest first leaves the other two alone.
    assert onset_f1([note(1.0), note(1.05)], [note(1.04), note(1.09)]) == 1


def test_drums_match_drums_of_the_same_kind_and_instruments_do_not_matter():
    assert onset_f1([note(1.0, 36, is_drum=True)], [note(1.0, 36)]) == 0
    assert onset_f1([note(1.0, 36, is_drum=True)], [note(1.0, 38, is_drum=True)]) == 0
    assert onset_f1([note(1.0, 36, is_drum=True)], [note(1.0, 36, is_drum=True)]) == 1
    assert onset_f1([note(1.0, program=3)], [note(1.0, program=90)]) == 1


def test_nothing_agrees_with_nothing_only():
    assert onset_f1([], []) == 1
    assert onset_f1([note(1.0)], []) == onset_f1([], [note(1.0)]) == 0
    assert match_onsets([], [note(1.0)]) == (set(), set())
