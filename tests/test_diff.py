"""`mt3-run diff` and what it is made of, against mir_eval."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from io import BytesIO

import mir_eval
import numpy as np
import pytest
from PIL import Image, ImageColor

from mt3_runtime import picture
from mt3_runtime.cli import main
from mt3_runtime.errors import OptionError
from mt3_runtime.midi import write_midi
from mt3_runtime.note_diff import Comparison, diff_notes
from mt3_runtime.note_matching import match_notes
from mt3_runtime.notes import Note
from mt3_runtime.picture import draw_differences
from mt3_runtime.scoring import Tolerances, score_notes


def note(onset, duration=0.3, pitch=60, velocity=100, program=0, is_drum=False):
    return Note(onset, onset + duration, pitch, velocity, program, is_drum)


def random_notes(rng, count, grid):
    """Crowded and repeated; on a grid many times are the same, or apart by exactly a tolerance."""
    onsets, durations = rng.uniform(0, 1.5, count), rng.uniform(0.01, 0.6, count)
    if grid:
        onsets, durations = np.round(onsets * grid) / grid, np.maximum(np.round(durations * grid), 1) / grid
    draw = zip(onsets, durations, rng.integers(60, 63, count), rng.integers(0, 3, count), strict=True)
    return [
        note(float(onset), float(duration), int(pitch), program=0 if drum else int(program), is_drum=bool(drum))
        for (onset, duration, pitch, program), drum in zip(draw, rng.random(count) < 0.3, strict=True)
    ]


def pairs_by_mir_eval(reference, notes, **options):
    if not reference or not notes:
        return 0
    sides = [
        (np.array([[n.onset, n.offset] for n in side]), 440 * 2 ** ((np.array([n.pitch for n in side]) - 69) / 12))
        for side in (reference, notes)
    ]
    return len(mir_eval.transcription.match_notes(*sides[0], *sides[1], **options))


def scores_by_mir_eval(notes, reference, tolerances):
    """F1 of each kind, from mir_eval's own matching of what is to be compared."""
    onset = {"onset_tolerance": tolerances.onset}
    ends = {"offset_ratio": tolerances.offset_ratio, "offset_min_tolerance": tolerances.offset}
    drums = [[n for n in side if n.is_drum] for side in (reference, notes)]
    pitched = [[n for n in side if not n.is_drum] for side in (reference, notes)]
    hits = pairs_by_mir_eval(*drums, **onset, offset_ratio=None)
    onsets = pairs_by_mir_eval(*pitched, **onset, offset_ratio=None)
    programs = {n.program for side in pitched for n in side}
    same = sum(
        pairs_by_mir_eval(*[[n for n in side if n.program == program] for side in pitched], **onset, **ends)
        for program in programs
    )
    of_drums, of_pitched = sum(map(len, drums)), sum(map(len, pitched))

    def f1(pairs, count):
        return 2 * pairs / count if count else None

    return (
        f1(onsets + hits, of_drums + of_pitched),
        f1(onsets, of_pitched),
        f1(pairs_by_mir_eval(*pitched, **onset, **ends), of_pitched),
        f1(same, of_pitched),
        f1(hits, of_drums),
    )


@pytest.mark.parametrize("grid", [None, 20, 100, 125, 1000, 20_000])
@pytest.mark.parametrize("tolerances", [Tolerances(), Tolerances(0.1, 0.02, 0.35), Tolerances(0, 0, 0)])
def test_all_scores_are_mir_evals(grid, tolerances):
    rng = np.random.default_rng(grid)
    for _ in range(25):
        reference, notes = (random_notes(rng, rng.integers(0, 60), grid) for _ in range(2))
        scores = score_notes(notes, reference, tolerances)
        found = (
            scores.onset,
            scores.pitched_onset,
            scores.onset_offset,
            scores.onset_offset_program,
            scores.drums,
        )
        assert found == pytest.approx(scores_by_mir_eval(notes, reference, tolerances), abs=1e-12)


def test_a_chain_of_nearest_pairs_is_undone_to_its_end():
    # Every note is nearer to its neighbour's counterpart: only the whole row moved by one leaves nobody single.
    count = 3000
    reference, notes = [note(0.09 * i) for i in range(count)], [note(0.09 * i + 0.05) for i in range(count)]
    assert match_notes(reference, notes) == {i: i for i in range(count)}


def test_the_nearest_are_paired_where_there_is_a_choice():
    assert match_notes([note(1), note(1.02)], [note(1.02)]) == {1: 0}
    assert match_notes([note(1, 0.3), note(1, 0.5)], [note(1, 0.5), note(1, 0.3)]) == {0: 1, 1: 0}


@pytest.mark.parametrize("comparison", [Comparison(), Comparison(programs=False), Comparison(velocity=5)])
@pytest.mark.parametrize("grid", [None, 40, 100])
def test_every_note_is_told_once_and_pairs_are_as_many_as_onsets_allow(grid, comparison):
    rng = np.random.default_rng(grid)
    for _ in range(40):
        a, b = (
            [replace(n, velocity=int(rng.integers(90, 110))) for n in random_notes(rng, rng.integers(0, 50), grid)]
            for _ in range(2)
        )
        diff = diff_notes(a, b, comparison)
        assert Counter([*(p.a for p in diff.pairs), *(s.note for s in diff.only_a)]) == Counter(a)
        assert Counter([*(p.b for p in diff.pairs), *(s.note for s in diff.only_b)]) == Counter(b)
        for pair in diff.pairs:
            assert (pair.a.pitch, pair.a.is_drum) == (pair.b.pitch, pair.b.is_drum)
            assert round(abs(pair.a.onset - pair.b.onset), 6) <= 0.05005
            assert ("program" in pair.differs) == (comparison.programs and pair.a.program != pair.b.program)
            far = abs(pair.a.velocity - pair.b.velocity) > 5
            assert ("velocity" in pair.differs) == (comparison.velocity is not None and far)
        sides = [[[n for n in side if n.is_drum is drum] for side in (a, b)] for drum in (True, False)]
        assert len(diff.pairs) == sum(pairs_by_mir_eval(*side, offset_ratio=None) for side in sides)
        assert diff_notes(a, a, comparison).equal
        assert diff_notes(a, a[::-1], comparison).equal


def test_equal_within_the_tolerances_means_that_a_whole_pairing_agrees():
    rng = np.random.default_rng(8)
    verdicts = Counter()
    for _ in range(300):
        a = random_notes(rng, rng.integers(1, 12), 40)
        b = [
            replace(n, onset=n.onset + d, offset=n.offset + d + e)
            for n, d, e in zip(a, *rng.uniform(0, 0.06, (2, len(a))), strict=True)
        ]
        pitched = [[n for n in side if not n.is_drum] for side in (a, b)]
        hits = pairs_by_mir_eval(*[[n for n in side if n.is_drum] for side in (a, b)], offset_ratio=None)
        whole = hits + sum(
            pairs_by_mir_eval(*[[n for n in side if n.program == program] for side in pitched]) for program in range(3)
        )
        verdicts[diff_notes(a, b).equal] += 1
        assert diff_notes(a, b).equal == (whole == len(a))
    assert min(verdicts[True], verdicts[False]) > 20


def test_two_programs_at_one_time_and_pitch_are_not_mixed_up():
    a = [note(1, program=0), note(1.01, program=40)]
    b = [note(1, program=40), note(1.01, program=0)]
    diff = diff_notes(a, b)
    assert diff.equal
    assert [(pair.a.program, pair.b.program) for pair in diff.pairs] == [(0, 0), (40, 40)]
    # The one that is left is a flute's, though it is nearer in time to the piano.
    diff = diff_notes([note(1, program=0)], [note(1, program=73), note(1.03, program=0)])
    assert [single.note.program for single in diff.only_b] == [73]
    assert not diff.changed


def test_what_differs_in_a_pair():
    reference = note(1, duration=1)
    within, beyond = replace(reference, offset=2.2), replace(reference, offset=2.2002)
    assert diff_notes([reference], [within]).equal
    [pair] = diff_notes([reference], [beyond]).pairs
    assert pair.differs == ("offset",)
    assert diff_notes([reference], [beyond], Comparison(offsets=False)).equal
    [pair] = diff_notes([reference], [replace(beyond, program=5, velocity=90)], Comparison(velocity=9)).pairs
    assert pair.differs == ("program", "offset", "velocity")
    drum = note(1, pitch=36, is_drum=True)
    assert diff_notes([drum], [replace(drum, offset=9)]).equal
    assert not diff_notes([drum], [replace(drum, is_drum=False)]).pairs


@pytest.mark.parametrize(
    "values", [{"onset": -0.1}, {"onset": 11}, {"onset": float("nan")}, {"offset": float("inf")}, {"offset_ratio": -1}]
)
def test_tolerances_have_bounds(values):
    with pytest.raises(OptionError, match="give"):
        Tolerances(**values)


# The command


@pytest.fixture
def files(tmp_path):
    """A reference, and a file with one difference of each kind."""
    notes = [note(i, pitch=60 + i, program=8 * i) for i in range(6)] + [note(2.5, pitch=38, is_drum=True)]
    other = [*notes[:5], notes[6], note(5.1, pitch=65, program=40)]
    other[1] = replace(notes[1], offset=notes[1].offset + 0.25)
    other[2] = replace(notes[2], program=73)
    other[3] = replace(notes[3], velocity=60)
    paths = tmp_path / "a.mid", tmp_path / "b.mid"
    for path, written in zip(paths, (notes, other), strict=True):
        write_midi(written, path)
    return paths


def run(capsys, *arguments):
    code = main(["diff", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_exit_code(files, capsys):
    a, b = files
    assert run(capsys, a, a)[0] == 0
    code, out, err = run(capsys, a, b)
    assert (code, err) == (1, "")
    assert "6  in both: 4 agree, 1 with another program, 1 with another offset\n" in out
    assert out.endswith("different\n")
    loose = "--programs", "off", "--offsets", "off", "--onset-tolerance", "101"
    assert run(capsys, a, b, *loose)[0] == 0
    assert run(capsys, a, b, *loose, "--velocities", "40")[0] == 0
    assert run(capsys, a, b, *loose, "--velocities", "39")[0] == 1
    assert run(capsys, a, b, *loose, "--velocities", "off")[0] == 0


def test_a_gate_of_f1(files, capsys):
    a, b = files  # 6 of 7 onsets
    assert run(capsys, a, b, "--f1", 6 / 7)[0] == 0
    code, out, _ = run(capsys, a, b, "--f1", "0.86")
    assert code == 1
    assert out.endswith("onset F1 is less than 0.86\n")
    assert json.loads(run(capsys, a, b, "--f1", "0.85", "--json")[1])["passes"] is True


def test_differences_are_listed_up_to_a_limit(files, capsys):
    rows = [
        line for line in run(capsys, *files, "--velocities", "10")[1].splitlines() if line[:2] in {"- ", "+ ", "~ "}
    ]
    assert [row.split()[:4] for row in rows] == [
        ["~", "1.000", "s", "C#4"],
        ["~", "2.000", "s", "D4"],
        ["~", "3.000", "s", "D#4"],
        ["-", "5.000", "s", "F4"],
        ["+", "5.100", "s", "F4"],
    ]
    assert "offset +250.0 ms (of 60) #####" in rows[0]
    assert "16 Church Organ" not in rows[1]
    assert "program is 73 Flute" in rows[1]
    assert "velocity 100 -> 60 ####" in rows[2]
    assert "only in A, B's is +100.0 ms off ##" in rows[3]
    shown = run(capsys, *files, "--velocities", "10", "--limit", "2")[1]
    assert rows[1] in shown
    assert rows[2] not in shown
    assert "\nand 3 more\n" in shown
    assert "and 5 more" in run(capsys, *files, "--velocities", "10", "--limit", "0")[1]


def test_json_has_all_of_it(files, capsys):
    code, out, _ = run(capsys, *files, "--json", "--limit", "1")
    data = json.loads(out)
    assert code == 1
    assert data["equal"] is data["passes"] is False
    assert data["counts"] == {
        "both": 6, "agree": 4, "other_program": 1, "other_offset": 1, "only_a": 1, "only_b": 1,
    }  # fmt: skip
    assert [len(data[name]) for name in ("only_a", "only_b", "changed")] == [1, 1, 2]
    assert data["changed"][0]["differs"] == ["offset"]
    assert data["only_a"][0]["nearest"] == pytest.approx(0.1)
    assert data["scores"]["onset"] == pytest.approx(6 / 7)
    assert data["scores"]["pitched_onset"] == pytest.approx(5 / 6)
    assert data["scores"]["drums"] == 1
    assert data["compared"]["tolerances"] == {"onset": 0.05, "offset": 0.05, "offset_ratio": 0.2}
    assert data["a"]["notes"] == data["b"]["notes"] == 7


def test_files_without_notes(files, tmp_path, capsys):
    write_midi([], tmp_path / "empty.mid")
    code, out, _ = run(capsys, tmp_path / "empty.mid", tmp_path / "empty.mid", "--f1", "1")
    assert code == 0
    assert "      -  onset F1, all notes" in out
    assert run(capsys, files[0], tmp_path / "empty.mid", "--f1", "0.01")[0] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--f1", "1.5"], "--f1 is 1.5: give a number from 0 to 1"),
        (["--onset-tolerance", "-1"], "the onset tolerance is -1 ms: give 0 to 10000"),
        (["--offset-ratio", "nan"], "the offset ratio is nan"),
        (["--picture", "roll.mid"], "end its name with .png"),
        (["--picture", "nowhere/roll.png"], "create the folder first"),
    ],
)
def test_options_that_make_no_sense(files, options, said, capsys):
    code, out, err = run(capsys, *files, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


# The picture


def columns(image, colour):
    """Number of columns in which a colour fills some pixels, below the legend; letters have fewer."""
    return int(((image[90:] == ImageColor.getrgb(colour)).all(-1).sum(0) >= 3).sum())


def test_the_picture_tells_the_kinds_apart_by_colour(files, tmp_path, capsys):
    run(capsys, *files, "--velocities", "10", "--picture", tmp_path / "roll.png")
    image = np.asarray(Image.open(tmp_path / "roll.png"))
    width = 0.3 * picture.PIXELS_PER_SECOND * max(1, 900 / (5.4 * picture.PIXELS_PER_SECOND))
    assert columns(image, picture.ONLY_A_COLOUR) == pytest.approx(width, abs=4)
    assert columns(image, picture.ONLY_B_COLOUR) == pytest.approx(width, abs=4)
    assert columns(image, picture.OTHER_PROGRAM_COLOUR) == pytest.approx(width, abs=5)
    longer = width * (1 + 0.25 / 0.3)
    assert columns(image, picture.CHANGED_COLOUR) == pytest.approx(longer + width, abs=10), "the later offset too"
    assert columns(image, picture.SAME_COLOUR) == pytest.approx(3 * width, abs=9), "two notes and a drum"


def test_a_picture_of_equal_notes_is_grey():
    notes = [note(0), note(1, pitch=64), note(2, pitch=36, is_drum=True)]
    image = np.asarray(Image.open(BytesIO(draw_differences(diff_notes(notes, notes), title="x"))))
    assert columns(image, picture.SAME_COLOUR) > 60
    for colour in (picture.ONLY_A_COLOUR, picture.ONLY_B_COLOUR, picture.CHANGED_COLOUR, picture.OTHER_PROGRAM_COLOUR):
        assert columns(image, colour) == 0
    assert draw_differences(diff_notes([], []))
