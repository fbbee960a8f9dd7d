"""Notes of YourMT3 against published vectors and against a plain implementation that works on whole files."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from mt3_runtime.errors import OptionError
from mt3_runtime.note_decoding import DecodingStatistics, SegmentTokens
from mt3_runtime.notes import sort_notes
from mt3_runtime.specs import VocabularySpec
from mt3_runtime.vocabulary import Event, Vocabulary
from mt3_runtime.yourmt3_notes import YourMt3NoteDecoder
from yourmt3_streams import END, SEGMENT_SECONDS, Dice, good_stream, starts_of, wild_stream
from yourmt3_whole_file import WholeFile

VOCABULARY = Vocabulary(VocabularySpec(max_shift_steps=205))
FIRST = "tie | shift 10 | program 33 | velocity 1 | pitch 60 | end"
HELD = "program 33 | pitch 60 | tie | end"
CLOSE = "program 33 | pitch 60 | tie | shift 50 | program 33 | velocity 0 | pitch 60 | end"
SECOND = SEGMENT_SECONDS  # start of segment 1; segment 3 starts at 6.1438 s, which rounds down to 6.14


def ids(text):
    words = [event.split() for event in text.split("|") if event.strip()]
    return [
        END if word == ["end"] else VOCABULARY.encode(Event(word[0], int(word[1]) if word[1:] else 0)) for word in words
    ]


def decode_stream(stream, duration, *, strict):
    """All notes in canonical order, and the decoder; a stream is (start, one row for each channel)."""
    decoder = YourMt3NoteDecoder(VOCABULARY, len(stream[0][1]), strict_upstream=strict)
    ends = [start for start, _ in stream[1:]] + [None]
    notes = []
    for (start, rows), end in zip(stream, ends, strict=True):
        notes += decoder.decode_segment([SegmentTokens(start, *row) for row in rows], end)
    return sort_notes([*notes, *decoder.flush(duration)]), decoder


def decode(*texts, strict=False, duration=None):
    stream = [(start, [(ids(text),)]) for start, text in zip(starts_of(len(texts)), texts, strict=True)]
    return decode_stream(stream, duration or len(texts) * SEGMENT_SECONDS, strict=strict)


def assert_notes(notes, expected):
    sounds = [(note.program, note.pitch, note.is_drum) for note in notes]
    assert sounds == [(*row[2:4], len(row) == 5) for row in expected]
    for note, row in zip(notes, expected, strict=True):
        assert (note.onset, note.offset) == pytest.approx(row[:2], abs=1e-12)
        assert (note.velocity, note.confidence) == (100, None)


# segments -> (onset, offset, program, pitch[, is_drum]) as upstream has them, invalid, dropped
VECTORS = {
    "one note": ([FIRST], [(0.10, 0.11, 33, 60)], 0, 0),
    "tied": ([FIRST, CLOSE], [(0.10, 2.55, 33, 60)], 0, 0),
    "segment without tie": (
        [FIRST, "shift 20 | program 0 | velocity 1 | pitch 50 | end"], [(0.10, SECOND, 33, 60)], 0, 4,
    ),
    "not tied": (
        [FIRST, "tie | shift 20 | program 0 | velocity 1 | pitch 50 | shift 40 | velocity 0 | pitch 50 | end"],
        [(0.10, SECOND, 33, 60), (2.25, 2.45, 0, 50)], 0, 0,
    ),
    "longer than 10 s": ([FIRST, *[HELD] * 5, CLOSE], [(0.10, 0.11, 33, 60)], 0, 0),
    "drum": (["tie | shift 5 | drum 36 | end"], [(0.05, 0.06, 0, 36, True)], 0, 0),
    "shift of nothing": (["tie | shift 0 | program 0 | velocity 1 | pitch 50 | end"], [(0.0, 0.01, 0, 50)], 1, 0),
    "first token ends nothing": (["end | " + FIRST, CLOSE], [(0.10, 2.55, 33, 60)], 1, 0),
    "cut at the longest length": ([FIRST[:-6], CLOSE], [(0.10, 2.55, 33, 60)], 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name):
    texts, expected, invalid, dropped = VECTORS[name]
    notes, decoder = decode(*texts, strict=True)
    assert_notes(notes, expected)
    assert decoder.statistics == DecodingStatistics(invalid, dropped)


# ---- what upstream loses: segments, as upstream, as we have it, what each says of it --------------------

TIE_AND_OFF = "tie | shift 20 | program 0 | velocity 1 | pitch 50 | shift 30 | velocity 0 | pitch 50 | end"
AT_ONCE = "program 33 | velocity 1 | pitch 60 | shift 50 | velocity 0 | pitch 60 | end"
LOSSES = {
    "no tie": (
        [FIRST, TIE_AND_OFF.removeprefix("tie | "), CLOSE],
        [(0.10, SECOND, 33, 60)],
        [(0.10, 4.60, 33, 60), (2.25, 2.35, 0, 50)],
        "segments without a tie token, left out; what sounded ends there: 1",
        "segments without a tie token, read all the same: 1",
    ),
    "no tie, program and ties before the shift": (
        [FIRST, "program 33 | pitch 60 | shift 20 | velocity 0 | pitch 60 | velocity 1 | pitch 62 | end", "tie | end"],
        [(0.10, SECOND, 33, 60)],
        [(0.10, 2.25, 33, 60), (2.25, 2 * SECOND, 33, 62)],
        "segments without a tie token, left out; what sounded ends there: 1",
        "segments without a tie token, read all the same: 1",
    ),
    "no tie, all at the start": (
        [FIRST, "drum 36 | program 33 | pitch 60 | velocity 1 | pitch 62", "tie | end"],
        [(0.10, SECOND, 33, 60)],
        [(0.10, 2 * SECOND, 33, 60), (2.05, 2 * SECOND, 33, 62), (2.05, 2.06, 0, 36, True)],
        "segments without a tie token, left out; what sounded ends there: 1",
        "segments without a tie token, read all the same: 1",
    ),
    "an empty row": (
        [FIRST, "end", CLOSE],
        [(0.10, SECOND, 33, 60)],
        [(0.10, 4.60, 33, 60)],
        "segments without a tie token, left out; what sounded ends there: 1",
        "segments without a tie token, read all the same: 1",
    ),
    "never ended": (
        [FIRST, HELD],
        [(0.10, 0.11, 33, 60)],
        [(0.10, 2 * SECOND, 33, 60)],
        "notes without an end, cut to 10 ms: 1",
        "notes without an end, held to the end of the audio: 1",
    ),
    "longer than 10 s": (
        [FIRST, *[HELD] * 5, CLOSE],
        [(0.10, 0.11, 33, 60)],
        [(0.10, 12.79, 33, 60)],
        "notes longer than 10 s, cut to 10 ms: 1",
        "notes longer than 10 s, kept at their length: 1",
    ),
    "forced offset behind a new onset": (
        ["tie | end"] * 2 + [FIRST, "tie | " + AT_ONCE],
        [(4.20, 6.14, 33, 60), (6.14, 6.15, 33, 60)],
        [(4.20, 6.14, 33, 60), (6.14, 6.64, 33, 60)],
        "notes ended by a segment before their own: 1",
        "ends of notes told by a segment before their own, ignored: 1",
    ),
    "offset that reaches into the next segment": (
        ["tie | end"] * 2 + [
            "tie | shift 5 | program 33 | velocity 1 | pitch 60 | shift 205 | velocity 0 | pitch 60 | end",
            "tie | " + AT_ONCE,
        ],
        [(4.15, 6.14, 33, 60), (6.14, 6.15, 33, 60)],
        [(4.15, 6.14, 33, 60), (6.14, 6.64, 33, 60)],
        "notes ended by a segment before their own: 1",
        "ends of notes told by a segment before their own, ignored: 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_what_upstream_loses_is_kept(name):
    texts, upstream, ours, lost, kept = LOSSES[name]
    notes, decoder = decode(*texts, strict=True)
    assert_notes(notes, upstream)
    assert decoder.warnings == (lost,)
    notes, decoder = decode(*texts)
    assert_notes(notes, ours)
    assert decoder.warnings == (kept,)


def test_an_untied_onset_beyond_its_segment_lasts_10_ms():
    late = "tie | shift 205 | program 33 | velocity 1 | pitch 60 | end"
    texts = [late, "tie | end", "tie | shift 100 | program 33 | velocity 1 | pitch 60 | end", "tie | end"]
    again = (5.10, 3 * SECOND, 33, 60)
    assert_notes(decode(*texts, strict=True)[0], [(2.05, 5.10, 33, 60), again])
    assert_notes(decode(*texts)[0], [(2.05, 2.06, 33, 60), again])


@pytest.mark.parametrize(("shift", "offset"), [(181, 10.0), (182, 10.01)])
def test_ten_seconds_are_not_longer_than_ten_seconds(shift, offset):
    texts = ["tie | program 33 | velocity 1 | pitch 60 | end", *[HELD] * 3, CLOSE.replace("50", str(shift))]
    assert_notes(decode(*texts)[0], [(0.0, offset, 33, 60)])
    assert_notes(decode(*texts, strict=True)[0], [(0.0, offset if offset == 10.0 else 0.01, 33, 60)])


def test_channels_are_mixed():
    stream = [
        (0.0, [(ids("tie | shift 10 | program 33 | velocity 1 | pitch 60 | shift 90 | velocity 0 | pitch 60"),),
               (ids("tie | shift 50 | program 33 | velocity 1 | pitch 60 | drum 36 | end"),),
               (ids("tie | shift 10 | program 33 | velocity 1 | pitch 60 | shift 20 | velocity 0 | pitch 60"),)]),
        (SECOND, [(ids("tie | end"),)] * 3),
    ]  # fmt: skip
    expected = [(0.10, 0.50, 33, 60), (0.50, 0.51, 0, 36, True), (0.50, SECOND, 33, 60)]
    for strict in (True, False):
        notes, decoder = decode_stream(stream, 4.0, strict=strict)
        assert_notes(sorted(notes, key=lambda note: (note.onset, not note.is_drum)), expected)
        assert decoder.statistics == DecodingStatistics(0, 1)  # of two that start at once the longer stays
        assert decoder.warnings == ()


def test_confidence_is_the_geometric_mean_over_the_onset():
    text = "program 3 | tie | shift 5 | velocity 1 | pitch 60 | pitch 64 | shift 9 | drum 36 | pad | tie | pitch 67"
    tokens = ids(text.replace("pad | ", ""))
    tokens.insert(8, 0)
    probabilities = [0.05, 0.1, 0.9, 0.7, 0.6, 0.5, 0.4, 0.3, 0.15, 0.2, 0.25]
    row = (np.array(tokens), np.log(probabilities))
    notes, _ = decode_stream([(0.0, [row])], 2.0, strict=False)
    assert {note.pitch: note.confidence for note in notes} == {
        60: pytest.approx((0.9 * 0.7 * 0.6) ** (1 / 3)),
        64: pytest.approx(0.5),
        36: pytest.approx((0.4 * 0.3) ** (1 / 2)),
        67: pytest.approx(0.25),
    }


def test_notes_are_given_out_as_soon_as_they_are_settled():
    decoder = YourMt3NoteDecoder(VOCABULARY, 2)
    rows = {
        0.0: ("tie | shift 5 | program 1 | velocity 1 | pitch 60 | shift 9 | velocity 0 | pitch 60 | drum 36", FIRST),
        SECOND: ("tie | shift 5 | program 33 | velocity 1 | pitch 60 | shift 9 | velocity 0 | pitch 60", HELD),
        2 * SECOND: ("tie", CLOSE),
        3 * SECOND: ("tie", "tie"),
    }
    given = [
        decoder.decode_segment([SegmentTokens(start, ids(text)) for text in texts], start + SECOND)
        for start, texts in rows.items()
    ]
    # The other channel's (0.1, ...) still sounds in segment 1, so that its (2.1, 2.14) has to wait.
    assert [[(note.onset, note.program) for note in notes] for notes in given] == [
        [(0.05, 1), (0.09, 0)], [], [(0.1, 33), (2.1, 33)], [],
    ]  # fmt: skip
    assert decoder.flush(9.0) == []


def test_bad_arguments_change_nothing():
    decoder = YourMt3NoteDecoder(VOCABULARY, 2)
    decoder.decode_segment([SegmentTokens(1.0, ids(FIRST))] * 2, 3.0)
    row, late = SegmentTokens(3.0, ids("tie")), SegmentTokens(3.5, ids("tie"))
    refused = {
        "give one row for each channel": [([row], 4.0), ([row, late], 4.0), ([], None)],
        "in order": [([SegmentTokens(start, [])] * 2, None) for start in (2.99, -1.0, math.nan, math.inf)],
        "give the start of the next one": [([row] * 2, end) for end in (2.9, math.nan, math.inf)],
        "0 log-probabilities for 1 tokens": [([row, SegmentTokens(3.0, ids("tie"), [])], 4.0)],
    }
    for message, cases in refused.items():
        for rows, end in cases:
            with pytest.raises(OptionError, match=message):
                decoder.decode_segment(rows, end)
    for duration in (-1.0, math.nan, math.inf):
        with pytest.raises(OptionError, match="audio cannot last"):
            decoder.flush(duration)
    assert_notes(decoder.flush(8.0), [(1.10, 8.0, 33, 60)])
    with pytest.raises(OptionError, match="in order"):
        decoder.decode_segment([SegmentTokens(9.0, ids("tie"))] * 2, None)
    with pytest.raises(OptionError, match="0 channels cannot be decoded"):
        YourMt3NoteDecoder(VOCABULARY, 0)


# ---- random streams ------------------------------------------------------------------------------------

WARNED = {
    "no tie": "without a tie token",
    "endless": "without an end",
    "long": "longer than 10 s",
    "overruled": "segment",
}


def with_log_probs(dice, stream):
    """Multiples of 1/64, whose sums are exact in any order; some rows have none."""

    def scored(row):
        return row, [-dice.below(200) / 64 for _ in row] if dice.chance(0.9) else None

    return [(start, [scored(row) for row in rows]) for start, rows in stream]


@pytest.mark.parametrize("strict", [True, False])
def test_wild_streams_decode_as_whole_files(strict):
    dice = Dice(20240707 + strict)
    seen = Counter()
    for _ in range(1500):
        stream = with_log_probs(dice, wild_stream(dice, known=range(-2, 600)))
        duration = dice.uniform(0, 20)
        notes, decoder = decode_stream(stream, duration, strict=strict)
        whole = WholeFile(stream, duration, keep=not strict)
        assert notes == whole.as_notes()
        assert decoder.statistics == DecodingStatistics(whole.invalid, whole.dropped)
        counts = {reason: whole.seen[reason] for reason in WARNED if whole.seen[reason]}
        assert [int(text.rsplit(": ", 1)[1]) for text in decoder.warnings] == list(counts.values())
        assert all(WARNED[reason] in text for reason, text in zip(counts, decoder.warnings, strict=True))
        seen += whole.seen
    rare = {reason: times for reason, times in seen.items() if times < 30}
    assert not rare, "the streams must reach every branch often"
    assert len(seen) == (13 if strict else 15)


def test_good_streams_lose_nothing_in_either_mode():
    dice = Dice(3)
    total = 0
    for _ in range(500):
        stream, said, hits = good_stream(dice)
        duration = len(stream) * SEGMENT_SECONDS
        scored = with_log_probs(dice, stream)
        notes, decoder = decode_stream(scored, duration, strict=False)
        assert decode_stream(scored, duration, strict=True)[0] == notes
        assert decoder.statistics == DecodingStatistics(0, 0)
        assert decoder.warnings == ()
        assert [note.onset for note in notes if note.is_drum] == hits
        found = sorted((note.onset, note.pitch, note.program, note.offset) for note in notes if not note.is_drum)
        said.sort(key=lambda row: (row[0], row[2:], row[1]))
        assert [(onset, pitch, program) for onset, pitch, program, _ in found] == [(on, *rest) for on, _, *rest in said]
        assert [row[3] for row in found] == pytest.approx([row[1] for row in said], abs=1e-9)
        total += len(notes)
    assert total > 5000


def test_notes_of_good_streams_are_given_out_when_they_end():
    dice = Dice(8)
    total = 0
    for _ in range(100):
        stream, said, _ = good_stream(dice)
        decoder = YourMt3NoteDecoder(VOCABULARY, 2)
        out = set()
        for start, rows in stream:
            end = start + SEGMENT_SECONDS
            given = decoder.decode_segment([SegmentTokens(start, row) for row in rows], end)
            out |= {(note.pitch, note.program, round(note.onset, 2)) for note in given}
            for onset, offset, pitch, program in said:
                nearest = min((abs(other[0] - offset) for other in said if other[2:] == (pitch, program)), default=9)
                if offset < end - 0.01 and nearest > 0.001:  # those that meet may wait for one another
                    assert (pitch, program, round(onset, 2)) in out
                    total += 1
    assert total > 2000
