"""Piano rolls, looked at pixel by pixel."""

from __future__ import annotations

import math
import sys
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageColor

from mt3_runtime.errors import DependencyError, OptionError
from mt3_runtime.notes import Note
from mt3_runtime.picture import DRUM_COLOUR, FAMILY_COLOURS, MISSED_COLOUR, draw_piano_roll
from mt3_runtime.scoring import match_onsets


def note(onset, offset, pitch=60, program=0, is_drum=False):
    return Note(onset, offset, pitch, 100, program, is_drum)


def pixels(notes, **options):
    data = draw_piano_roll(notes, **options)
    assert data == draw_piano_roll(notes, **options), "the same notes make the same picture"
    return np.asarray(Image.open(BytesIO(data)))  # [height, width, 3]


def places(image, colour):
    """Rows and columns of a colour, below the legend."""
    hit = (image == ImageColor.getrgb(colour)).all(-1)
    hit[:50] = False
    rows, columns = np.nonzero(hit)
    return sorted(set(rows.tolist())), sorted(set(columns.tolist()))


def test_time_is_120_pixels_a_second_and_pitch_goes_up():
    early, late = (
        places(pixels([note(0, 0.5, 36, 40), note(9, 9.5, 84, 40), note(onset, onset + 2, pitch)], duration=10),
               FAMILY_COLOURS[0])
        for onset, pitch in ((1, 60), (6, 61))
    )  # fmt: skip
    assert late[1][0] - early[1][0] == 5 * 120
    assert len(early[1]) == pytest.approx(2 * 120, abs=3)
    assert early[0][0] - late[0][0] == len(early[0]) + 1, "one row higher, with a gap"


@pytest.mark.parametrize("family", range(16))
def test_each_family_has_its_colour(family):
    image = pixels([note(0, 1, program=8 * family), note(1, 2, program=8 * family + 7)])
    assert len(places(image, FAMILY_COLOURS[family])[1]) > 200
    for other in {*FAMILY_COLOURS, DRUM_COLOUR} - {FAMILY_COLOURS[family]}:
        assert places(image, other)[1] == []


def test_drums_are_below_and_seen_although_short():
    image = pixels([note(0, 1), note(0.5, 0.51, 36, is_drum=True), note(0.7, 0.71, 42, is_drum=True)], duration=20)
    rows, columns = places(image, DRUM_COLOUR)
    assert min(rows) > max(places(image, FAMILY_COLOURS[0])[0])
    assert len(columns) == 10
    gaps = [after - before for before, after in pairwise(rows)]
    assert sorted(gaps)[-2:] == [1, 5], "one row for each drum"


def test_two_instruments_on_one_pitch_are_both_seen():
    image = pixels([note(0, 1), note(0, 1, program=40)], duration=5)
    above, below = places(image, FAMILY_COLOURS[0]), places(image, FAMILY_COLOURS[5])
    assert above[1] == below[1]
    assert max(above[0]) + 1 == min(below[0])


def test_agreement_with_a_reference():
    agreed, missed, extra = note(0, 1, 60), note(2, 3, 62), note(4, 5, 64)
    same = pixels([agreed], reference=[agreed], duration=10)
    assert places(same, MISSED_COLOUR)[1] == []
    image = pixels([agreed, extra], reference=[agreed, missed], duration=10)
    solid, red = places(image, FAMILY_COLOURS[0])[1], places(image, MISSED_COLOUR)[1]
    assert len(solid) == pytest.approx(120, abs=3), "only the agreed note is solid"
    assert len(red) == pytest.approx(120, abs=3)
    assert red[0] - solid[0] == pytest.approx(240, abs=2)
    pale = np.round(np.array(ImageColor.getrgb(FAMILY_COLOURS[0])) * 0x60 / 255 + 255 * (1 - 0x60 / 255))
    columns = np.nonzero((np.abs(image - pale).max(-1) <= 1).any(0))[0]
    assert columns.min() - solid[0] == pytest.approx(480, abs=2)
    assert columns.size == pytest.approx(120, abs=3)


def test_an_outline_shows_where_the_reference_was():
    ends_early = pixels([note(1, 2)], reference=[note(1, 4)], duration=10)
    alone = pixels([note(1, 2)], reference=[], duration=10)
    different = np.nonzero((ends_early != alone)[80:-40].any((0, 2)))[0]
    assert different.max() - different.min() == pytest.approx(360, abs=3)


@pytest.mark.parametrize(
    ("duration", "roll"), [(0.01, 900), (7.5, 900), (10, 1200), (60, 7200), (70, 8000), (36_000, 8000)]
)
def test_width_grows_with_time_up_to_a_limit(duration, roll):
    height, width, _ = pixels([note(0, 0.005)], duration=duration).shape
    assert 0 < width - roll < 80
    assert height < 450


def test_notes_after_the_duration_are_drawn():
    image = pixels([note(19, 20)], duration=10)
    assert image.shape[1] > 2400
    assert places(image, FAMILY_COLOURS[0])[1][-1] < image.shape[1] - 10


@pytest.mark.parametrize("reference", [None, []])
def test_no_notes(reference):
    image = pixels([], reference=reference, title="silence")
    assert image.shape[0] > 200
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 4


def test_only_drums_and_extreme_pitches():
    drums = pixels([note(0, 0.01, pitch, is_drum=True) for pitch in (0, 36, 127)])
    assert drums.shape[0] < 200, "no empty roll above"
    full = pixels([note(0, 1, 0), note(0, 1, 127, 127)])
    assert full.shape[0] > 128 * 8


def test_a_title_fits_whatever_it_is():
    plain = pixels([note(0, 1)], title="x")
    for title in ("long " * 1000, "two\nlines\tand\0more", "cl\udce9", "\u97f3\u697d \U0001f3b9", " "):
        assert pixels([note(0, 1)], title=title).shape == plain.shape
    assert pixels([note(0, 1)]).shape[0] < plain.shape[0]


@pytest.mark.parametrize("duration", [-1, math.nan, math.inf])
def test_bad_duration(duration):
    with pytest.raises(OptionError, match="duration"):
        draw_piano_roll([], duration=duration)


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DependencyError, match=r"pip install 'mt3-runtime\[picture\]'"):
        draw_piano_roll([])


def most_pairs(notes, reference):
    """Try every way to give each note a partner or none."""
    if not notes:
        return 0
    first, rest = notes[0], notes[1:]
    best = most_pairs(rest, reference)
    for index, other in enumerate(reference):
        fits = (first.pitch, first.is_drum) == (other.pitch, other.is_drum) and abs(first.onset - other.onset) <= 0.05
        if fits:
            best = max(best, 1 + most_pairs(rest, reference[:index] + reference[index + 1 :]))
    return best


def test_matching_is_one_to_one_and_as_large_as_possible():
    rng = np.random.default_rng(2)
    sizes = []
    for _ in range(400):
        notes, reference = (
            [note(t, t + 1, int(p), is_drum=bool(d)) for t, p, d in zip(
                rng.integers(0, 24, 5) / 64, rng.choice([60, 60, 61], 5), rng.random(5) < 0.2, strict=True)]
            for _ in range(2)
        )  # fmt: skip
        found, met = match_onsets(notes, reference)
        sizes.append(len(found))
        assert len(found) == len(met) == most_pairs(notes, reference)
        for index in found:
            assert any(
                notes[index].pitch == reference[other].pitch
                and abs(notes[index].onset - reference[other].onset) <= 0.05
                for other in met
            )
    assert set(sizes) >= {1, 2, 3, 4}
