"""Scores of notes against mir_eval's own functions; intervals against a loop of one resample after the other."""

from __future__ import annotations

from dataclasses import astuple, replace

import mir_eval
import numpy as np
import pytest

from mt3_export.lab.bootstrap import SEED, estimate, ratio_estimate
from mt3_export.lab.note_scores import leakage, score_clip, summarise
from mt3_export.lab.results import Clip, Estimate, F1s, Scored
from mt3_runtime.notes import Note


def note(onset, offset=None, pitch=60, program=0, *, is_drum=False):
    return Note(onset, onset + 0.1 if offset is None else offset, pitch, 100, program, is_drum)


# F1 scores


def mir_eval_f1(notes, other, *, offsets=False, of_drums=None, programs=False):
    """By mir_eval itself, which knows pitches only: drums and programs are moved to octaves of their own."""
    sides = []
    for side in (other, notes):
        kept = [n for n in side if of_drums is None or n.is_drum == of_drums]
        keys = [n.pitch + 128 * n.is_drum + (256 * n.program if programs else 0) for n in kept]
        intervals = np.array([[n.onset, n.offset] for n in kept]).reshape(-1, 2)
        sides += [intervals, 440.0 * 2.0 ** ((np.array(keys, float) - 69.0) / 12.0)]
    if not len(sides[0]) and not len(sides[2]):
        return None
    if not len(sides[0]) or not len(sides[2]):
        return 0.0
    ratio = {"offset_ratio": 0.2, "offset_min_tolerance": 0.05} if offsets else {"offset_ratio": None}
    return mir_eval.transcription.precision_recall_f1_overlap(
        *sides, onset_tolerance=0.05, pitch_tolerance=50.0, **ratio
    )[2]


def by_mir_eval(notes, other):
    """Leakage is counted by instruments' note lists here."""
    have = {(n.is_drum, n.program) for n in (replace(n, program=0) if n.is_drum else n for n in other)}
    leaked = [n for n in notes if (n.is_drum, 0 if n.is_drum else n.program) not in have]
    return F1s(
        onset=mir_eval_f1(notes, other),
        onset_offset=mir_eval_f1(notes, other, offsets=True, of_drums=False),
        onset_offset_program=mir_eval_f1(notes, other, offsets=True, of_drums=False, programs=True),
        drums=mir_eval_f1(notes, other, of_drums=True),
        leakage=len(leaked) / len(notes) if notes else None,
    )


def same(found, expected):
    assert [value is None for value in astuple(found)] == [value is None for value in astuple(expected)]
    pairs = zip(astuple(found), astuple(expected), strict=True)
    assert [a for a, _ in pairs if a is not None] == pytest.approx(
        [value for value in astuple(expected) if value is not None], abs=1e-9
    )


def crowd(rng, grid):
    count = int(rng.integers(0, 40))
    onsets = rng.uniform(0, 2, count) if grid is None else rng.integers(0, 2 * grid, count) / grid
    lengths = rng.uniform(0.02, 1.0, count) if grid is None else rng.integers(1, grid, count) / grid
    kinds = rng.integers(0, 4, count)
    return [
        note(float(onset), float(onset + length), int(pitch), (0, 24, 33, 0)[kind], is_drum=bool(kind == 3))
        for onset, length, pitch, kind in zip(onsets, lengths, rng.integers(60, 63, count), kinds, strict=True)
    ]


@pytest.mark.parametrize("grid", [None, 100])
def test_f1s_are_mir_evals_on_random_notes(grid):
    rng = np.random.default_rng(3)
    for _ in range(40):
        notes, other = crowd(rng, grid), crowd(rng, grid)
        same(score_clip(notes, other), by_mir_eval(notes, other))
        moved = [replace(n, onset=n.onset + 0.01, offset=n.offset + 0.04) for n in other[::2]] + notes[:3]
        same(score_clip(moved, other), by_mir_eval(moved, other))


@pytest.mark.parametrize(
    ("notes", "other"),
    [
        ([], []),
        ([note(1.0)], []),
        ([], [note(1.0)]),
        ([note(1.0)], [note(1.05)]),  # exactly the tolerance
        ([note(1.0)], [note(1.051)]),
        ([note(0.0, 1.0)], [note(0.0, 1.25)]),  # within a fifth of the reference's duration
        ([note(0.0, 1.25)], [note(0.0, 1.0)]),  # and the other way not
        ([note(1.0, is_drum=True, pitch=36)], [note(1.0, pitch=36)]),
        ([note(1.0, is_drum=True, pitch=36)], [note(1.0, is_drum=True, pitch=36)]),
        ([note(1.0, program=1)], [note(1.0, program=2)]),
        ([note(1.0), note(1.0, program=9)], [note(1.0, program=9)]),
        ([note(1.0), note(1.02), note(1.04)], [note(1.02), note(1.06), note(1.09)]),
    ],
)
def test_f1s_are_mir_evals_on_the_edges(notes, other):
    same(score_clip(notes, other), by_mir_eval(notes, other))


def test_f1s_by_hand():
    other = [note(0.0), note(1.0), note(2.0, program=24), note(3.0, pitch=36, is_drum=True)]
    notes = [note(0.0), note(1.0, 2.0), note(2.0), note(3.0, pitch=38, is_drum=True), note(5.0, program=40)]
    found = score_clip(notes, other)
    assert found == F1s(2 * 3 / 9, 2 * 2 / 7, 2 * 1 / 7, 0.0, 1 / 5)


def test_leakage_by_hand():
    guitar, bass, piano = note(0.0, program=24), note(0.0, program=33), note(0.0)
    kick, snare = note(0.0, pitch=36, is_drum=True), note(0.0, pitch=38, is_drum=True)
    assert leakage([guitar, bass, kick, kick], [guitar, snare]) == 1 / 4
    assert leakage([guitar, bass], [guitar, bass, piano]) == 0
    assert leakage([guitar, kick], []) == 1
    assert leakage([], [guitar]) is None
    # Drums stand at program 0, and are no piano.
    assert leakage([kick], [piano]) == leakage([piano], [kick]) == 1
    assert leakage([kick], [replace(snare, program=8)]) == 0


# Intervals


def slow(parts, wholes):
    """Every resample by itself, drawn from one generator from the first to the last."""
    rng = np.random.default_rng(SEED)
    ratios = []
    for _ in range(2000):
        drawn = [int(rng.integers(len(parts))) for _ in parts]
        ratios.append(sum(parts[i] for i in drawn) / sum(wholes[i] for i in drawn))
    ratios.sort()
    low, high = (ratios[int(place)] + (place % 1) * (ratios[int(place) + 1] - ratios[int(place)]) for place in PLACES)
    return Estimate(sum(parts) / sum(wholes), low, high)


PLACES = (0.025 * 1999, 0.975 * 1999)


def test_a_mean_and_its_interval_are_those_of_the_slow_loop():
    rng = np.random.default_rng(1)
    for count in (2, 3, 17, 40):
        values = rng.random(count).tolist()
        assert astuple(estimate(values)) == pytest.approx(astuple(slow(values, [1] * count)), abs=1e-12)
        wholes = rng.integers(1, 300, count).tolist()
        parts = [int(rng.integers(whole + 1)) for whole in wholes]
        assert astuple(ratio_estimate(parts, wholes)) == pytest.approx(astuple(slow(parts, wholes)), abs=1e-12)


def test_resamples_are_the_same_however_many_are_held_at_a_time(monkeypatch):
    values = np.random.default_rng(4).random(600)  # more than counts are kept of
    whole = estimate(values)
    for block in (600 * 7, 1):  # 2,000 is no multiple of 7
        monkeypatch.setattr("mt3_export.lab.bootstrap.BLOCK", block)
        assert astuple(estimate(values)) == pytest.approx(astuple(whole), abs=1e-12)


def test_the_same_values_give_the_same_interval():
    values = list(np.random.default_rng(2).random(20))
    assert estimate(values) == estimate(tuple(values)) == estimate(np.array(values))
    assert astuple(estimate([0.7] * 9)) == pytest.approx((0.7, 0.7, 0.7), abs=1e-15)
    found = estimate([0.1] * 7)
    assert found.low <= found.mean <= found.high


def test_one_value_says_nothing_of_the_others():
    assert estimate([0.8]) == Estimate(0.8, 0.0, 1.0)
    assert estimate([0.1], (-1.0, 1.0)) == Estimate(0.1, -1.0, 1.0)
    assert ratio_estimate([30], [40]) == Estimate(0.75, 0.0, 1.0)
    assert ratio_estimate([0, 30, 0], [0, 40, 0]) == Estimate(0.75, 0.0, 1.0)
    assert estimate([]) is None
    assert ratio_estimate([], []) is None
    assert ratio_estimate([0, 0], [0, 0]) is None


def test_segments_without_tokens_change_nothing():
    assert ratio_estimate([3, 0, 5, 0], [4, 0, 9, 0]) == ratio_estimate([3, 5], [4, 9])


@pytest.mark.parametrize(
    ("parts", "wholes"), [([1.0, float("nan")], [1, 1]), ([1, 1], [1, float("inf")]), ([1], [-1]), ([1, 2], [1])]
)
def test_numbers_that_make_no_sense_are_refused(parts, wholes):
    with pytest.raises(ValueError):
        ratio_estimate(parts, wholes)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    """400 sets of 30 uniform values; the count's own deviation is a percent, as is what the method falls short by."""
    rng = np.random.default_rng(5)
    held, widths = 0, []
    for _ in range(400):
        found = estimate(rng.random(30))
        held += found.low <= 0.5 <= found.high
        widths.append(found.high - found.low)
    assert 0.90 <= held / 400 <= 0.98
    # 3.92 standard errors of the mean of 30 uniform values.
    assert np.mean(widths) == pytest.approx(3.92 * (1 / 12) ** 0.5 / 30**0.5, rel=0.05)


# Summaries


NONE = F1s(None, None, None, None, None)


def clip(name, against_fp32, against_reference=NONE):
    return Clip(name, 10.0, 5, against_fp32, against_reference)


THEIRS = (
    clip("a", F1s(1.0, 1.0, 1.0, None, 0.0), F1s(0.9, 0.8, 0.7, None, 0.1)),
    clip("b", F1s(1.0, 1.0, 1.0, 1.0, 0.0), F1s(0.8, 0.6, 0.5, 0.9, 0.0)),
    clip("c", F1s(1.0, None, None, 1.0, 0.0), F1s(1.0, None, None, 0.7, 0.0)),
)
OURS = (
    clip("a", F1s(0.98, 0.9, 0.8, 0.0, 0.2), F1s(0.88, 0.82, 0.6, 0.0, 0.3)),
    clip("b", F1s(0.9, 0.7, 0.6, 1.0, 0.1), F1s(0.82, 0.6, 0.5, 0.8, 0.0)),
    clip("c", F1s(0.0, None, None, 0.0, None), F1s(0.0, None, None, 0.0, None)),
)


def test_against_fp32_the_loss_is_what_is_missing_to_one():
    found = summarise(OURS, THEIRS, "fp32")
    scores = {"onset": [0.98, 0.9, 0], "onset_offset": [0.9, 0.7], "onset_offset_program": [0.8, 0.6]}
    scores |= {"drums": [0, 1, 0], "leakage": [0.2, 0.1]}
    assert found.scores == {name: estimate(values) for name, values in scores.items()}
    assert found.loss.keys() == scores.keys()
    for name, values in scores.items():
        lost = values if name == "leakage" else [1 - value for value in values]
        assert astuple(found.loss[name]) == pytest.approx(astuple(estimate(lost)), abs=1e-12)


def test_against_a_reference_losses_are_paired():
    found = summarise(OURS, THEIRS, "reference")
    assert found.scores["drums"] == estimate([0, 0.8, 0])
    lost = {
        "onset": [0.02, -0.02, 1.0],
        "onset_offset": [-0.02, 0.0],
        "onset_offset_program": [0.1, 0.0],
        "drums": [1.0, 0.1, 0.7],  # in the first clip fp32 heard none, and none were played
        "leakage": [0.2, 0.0],  # this one's less fp32's
    }
    assert found.loss.keys() == lost.keys()
    for name, values in lost.items():
        assert astuple(found.loss[name]) == pytest.approx(astuple(estimate(values, (-1.0, 1.0))), abs=1e-12)


def test_who_hears_nothing_where_nothing_is_has_lost_nothing():
    quiet, loud = (F1s(0.5, None, None, drums, 0.0) for drums in (None, 0.0))
    gains = summarise((clip("a", NONE, quiet),), (clip("a", NONE, loud),), "reference").loss
    losses = summarise((clip("a", NONE, loud),), (clip("a", NONE, quiet),), "reference").loss
    neither = summarise((clip("a", NONE, quiet),), (clip("a", NONE, quiet),), "reference").loss
    assert (gains["drums"].mean, losses["drums"].mean) == (-1.0, 1.0)
    assert "drums" not in neither


def test_pairing_makes_intervals_narrow():
    """Clips are easy or hard for both; what one loses hardly varies."""
    rng = np.random.default_rng(6)
    levels = rng.uniform(0.2, 1.0, 60)
    theirs = tuple(clip(str(i), NONE, F1s(float(x), None, None, None, None)) for i, x in enumerate(levels))
    ours = tuple(clip(str(i), NONE, F1s(float(x) - 0.01, None, None, None, None)) for i, x in enumerate(levels))
    found = summarise(ours, theirs, "reference")
    assert found.scores["onset"].high - found.scores["onset"].low > 0.1
    assert astuple(found.loss["onset"]) == pytest.approx((0.01, 0.01, 0.01), abs=1e-12)


def test_fp32_itself_loses_nothing_and_what_equals_it_loses_zero():
    for against in ("fp32", "reference"):
        assert summarise(THEIRS, THEIRS, against).loss == {}
        equal = tuple(replace(each) for each in THEIRS)
        found = summarise(equal, THEIRS, against)
        assert found.scores == summarise(THEIRS, THEIRS, against).scores
        assert set(found.loss) == {"onset", "onset_offset", "onset_offset_program", "drums", "leakage"}
        assert {astuple(loss)[0] for loss in found.loss.values()} == {0.0}


def test_one_clip_alone_has_the_widest_intervals():
    found = summarise(OURS[:1], THEIRS[:1], "reference")
    assert astuple(found.scores["onset"]) == (0.88, 0.0, 1.0)
    assert astuple(found.loss["onset"]) == pytest.approx((0.02, -1.0, 1.0), abs=1e-12)
    assert astuple(summarise(OURS[:1], THEIRS[:1], "fp32").loss["onset"]) == pytest.approx((0.02, 0.0, 1.0), abs=1e-12)


def test_without_references_there_are_no_scores():
    bare = tuple(replace(each, against_reference=None) for each in OURS)
    assert summarise(bare, THEIRS, "reference") == Scored({}, {})
    assert summarise((), (), "fp32") == Scored({}, {})


def test_the_clips_must_be_the_same():
    for other in (OURS[:2], OURS[::-1]):
        with pytest.raises(ValueError, match="not those of fp32"):
            summarise(other, THEIRS, "fp32")
