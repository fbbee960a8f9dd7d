"""The note state machine against published vectors and against a second, slow implementation."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import chain, count, permutations

import numpy as np
import pytest

from mt3_runtime.errors import OptionError
from mt3_runtime.note_decoding import DecodingStatistics, NoteDecoder, SegmentTokens, tokens_to_notes
from mt3_runtime.notes import Note, sort_notes
from mt3_runtime.specs import VocabularySpec
from mt3_runtime.vocabulary import Event, Vocabulary

VOCABULARY = Vocabulary(VocabularySpec())
FIRST = "tie | shift 10 | program 33 | velocity 1 | pitch 60"


def ids(text):
    words = [event.split() for event in text.split("|") if event.strip()]
    return [VOCABULARY.encode(Event(word[0], int(word[1]) if word[1:] else 0)) for word in words]


def decode(*segments):
    return tokens_to_notes([SegmentTokens(start, ids(text)) for text, start in segments], VOCABULARY)


# segments, expected (onset, offset, pitch, velocity, program, is_drum), invalid, dropped
VECTORS = {
    "one note": ([(FIRST, 0.0)], [(0.10, 0.11, 60, 127, 33, False)], 0, 0),
    "tied": (
        [(FIRST, 0.0), ("program 33 | pitch 60 | tie | shift 50 | velocity 0 | pitch 60", 2.04)],
        [(0.10, 2.54, 60, 127, 33, False)], 0, 0,
    ),
    "not tied": (
        [(FIRST, 0.0), ("tie | shift 50 | velocity 1 | drum 36", 2.04)],
        [(0.10, 2.04, 60, 127, 33, False), (2.54, 2.55, 36, 127, 0, True)], 0, 0,
    ),
    "empty segment between": (
        [(FIRST, 0.0), ("", 2.04), ("program 33 | pitch 60 | tie | shift 5 | velocity 0 | pitch 60", 4.09)],
        [(0.10, 4.14, 60, 127, 33, False)], 0, 0,
    ),
    "no tie token": (
        [("shift 10 | program 33 | velocity 1 | pitch 60 | shift 20 | velocity 0 | pitch 60", 0.0)],
        [], 2, 0,
    ),
    "beyond the next segment": (
        [("tie | shift 204 | program 0 | velocity 1 | pitch 60 | shift 205 | pitch 62", 0.0),
         ("program 0 | pitch 60 | tie", 2.04)],
        [(2.04, 2.05, 60, 127, 0, False)], 0, 2,
    ),
    "drum without velocity": ([("tie | velocity 0 | drum 36", 0.0)], [], 1, 0),
    "defaults": ([("tie | shift 1 | pitch 60", 0.0)], [(0.01, 0.02, 60, 100, 0, False)], 0, 0),
    "long shift": (
        [("tie | shift 1000 | shift 50 | velocity 1 | drum 40", 0.0)],
        [(10.50, 10.51, 40, 127, 0, True)], 0, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name):
    segments, expected, invalid, dropped = VECTORS[name]
    notes, statistics = decode(*segments)
    assert statistics == DecodingStatistics(invalid, dropped)
    assert len(notes) == len(expected)
    for note, (onset, offset, *rest) in zip(notes, expected, strict=True):
        assert (note.onset, note.offset) == pytest.approx((onset, offset), abs=1e-12)
        assert [note.pitch, note.velocity, note.program, note.is_drum] == rest
        assert note.confidence is None


def test_padding_and_unknown_are_invalid_and_only_the_end_token_ends():
    tokens = [0, 2, 1400, *ids(FIRST), 2, 1, *ids("shift 20 | pitch 61")]
    notes, statistics = tokens_to_notes([SegmentTokens(0.0, tokens)], VOCABULARY)
    assert [note.pitch for note in notes] == [60]
    assert statistics == DecodingStatistics(invalid_events=4, dropped_events=0)


def test_a_note_is_given_out_by_the_segment_that_completes_it():
    decoder = NoteDecoder(VOCABULARY)
    assert decoder.decode_segment(ids(FIRST + " | drum 38"), None, 0.0, 2.04) == [
        Note(0.1, 0.1 + 0.01, 38, 127, 0, is_drum=True)
    ]
    assert decoder.decode_segment(ids("program 33 | pitch 60 | tie | shift 9 | pitch 60"), None, 2.04, 4.09) == [
        Note(0.1, 2.04 + 9 / 100, 60, 127, 33, is_drum=False)
    ]
    assert decoder.decode_segment([], None, 4.09, None) == []
    assert decoder.flush() == [Note(2.04 + 9 / 100, 2.04 + 9 / 100 + 0.01, 60, 127, 33, is_drum=False)]
    assert decoder.flush() == []


def test_segments_may_come_in_any_order():
    segments = [SegmentTokens(start, ids(text)) for text, start in VECTORS["tied"][0]]
    assert tokens_to_notes(segments[::-1], VOCABULARY) == tokens_to_notes(segments, VOCABULARY)


def test_arrays_of_numpy_are_tokens_too():
    log_probs = np.log(np.array([0.5, 0.5, 0.5, 0.5, 0.5], np.float32))
    [note], _ = tokens_to_notes([SegmentTokens(0.0, np.array(ids(FIRST)), log_probs)], VOCABULARY)
    assert type(note.pitch) is int
    assert note.confidence == pytest.approx(0.5, abs=1e-6)


def test_confidence_is_the_geometric_mean_over_the_onset():
    text = "tie | shift 5 | program 3 | velocity 1 | pitch 60 | pitch 64 | shift 9 | drum 36 | tie | pitch 67"
    probabilities = [0.1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.25]
    segment = SegmentTokens(0.0, ids(text), [math.log(p) for p in probabilities])
    notes, _ = tokens_to_notes([segment], VOCABULARY)
    by_pitch = {note.pitch: note.confidence for note in notes}
    assert by_pitch == {
        60: pytest.approx((0.9 * 0.8 * 0.7 * 0.6) ** (1 / 4)),
        64: pytest.approx(0.5),
        36: pytest.approx((0.4 * 0.3) ** (1 / 2)),
        67: pytest.approx(0.25),
    }


@pytest.mark.parametrize(("log_prob", "confidence"), [(-math.inf, 0.0), (1e-3, 1.0), (2000.0, 1.0), (math.nan, None)])
def test_confidence_of_strange_log_probabilities(log_prob, confidence):
    segment = SegmentTokens(0.0, ids("tie | pitch 60"), [0.0, log_prob])
    [note], _ = tokens_to_notes([segment], VOCABULARY)
    assert note.confidence == confidence


def test_bad_arguments_change_nothing():
    decoder = NoteDecoder(VOCABULARY)
    decoder.decode_segment(ids(FIRST), None, 0.0, None)
    for start in (math.nan, math.inf, -0.01):
        with pytest.raises(OptionError, match="cannot start at"):
            decoder.decode_segment(ids("tie"), None, start, None)
    with pytest.raises(OptionError, match="1 log-probabilities for 2 tokens"):
        decoder.decode_segment(ids("tie | pitch 3"), [0.0], 1.0, None)
    assert [note.pitch for note in decoder.flush()] == [60]
    assert decoder.statistics == DecodingStatistics(0, 0)


# ---- a second implementation, from the description: classify, place in time, then keep books -----------

LAST_IDS = [(2, "special"), (1003, "shift"), (1131, "pitch"), (1133, "velocity"), (1134, "tie"),
            (1262, "program"), (1390, "drum")]  # fmt: skip
FIRST_IDS = {"shift": 3, "pitch": 1004, "velocity": 1132, "tie": 1134, "program": 1135, "drum": 1263}


def classify(token):
    if token < 0:
        return "nothing", 0
    for last, kind in LAST_IDS:
        if token <= last:
            return kind, token - FIRST_IDS.get(kind, 0)
    return "nothing", 0


def place(tokens, start, max_time):
    """List every event that is no shift with its time and the tokens that led to it; count the rest."""
    if 1 in tokens:
        tokens = tokens[: tokens.index(1)]
    events, run, led = [], [], []
    now, invalid = start, 0
    for number, (kind, value) in enumerate(map(classify, tokens)):
        if kind in ("special", "nothing"):
            invalid += 1
        elif kind == "shift":
            run.append(value)
            led.append(number)
            now = start + sum(run) / 100
            if max_time is not None and max_time != 0 and now > max_time:
                return events, invalid, len(tokens) - number
        else:
            run = []
            led.append(number)
            events.append((now, kind, value, led[:]))
            if kind in ("pitch", "drum", "tie"):
                led = []
    return events, invalid, 0


class Book:
    """Notes are rows; a row without an end is sounding."""

    def __init__(self):
        self.rows, self.latest, self.velocity, self.program = [], 0.0, 100, 0
        self.invalid = self.dropped = 0
        self.seen = Counter()

    def close(self, row, now):
        row["end"] = max(now, row["onset"] + 0.01)
        self.seen["short"] += now < row["onset"] + 0.01

    def open_rows(self):
        return [row for row in self.rows if row["end"] is None]

    def segment(self, tokens, log_probs, start, max_time):
        events, invalid, dropped = place(tokens, start, max_time)
        self.invalid += invalid
        self.dropped += dropped
        self.seen["dropped"] += dropped > 0
        done_before = [id(row) for row in self.rows if row["end"] is not None]
        tie_seen, kept = False, []
        for now, kind, value, led in events:
            if now < self.latest:
                self.invalid += 1
                self.seen["past"] += 1
                continue
            self.latest = now
            if kind == "velocity":
                self.velocity = 127 * value
            elif kind == "program":
                self.program = value
            elif kind == "tie":
                if tie_seen:
                    self.invalid += 1
                    self.seen["second tie"] += 1
                    continue
                tie_seen = True
                for row in self.open_rows():
                    if not any(row is other for other in kept):
                        self.close(row, now)
                        self.seen["ended by tie"] += 1
            else:
                confidence = None
                if log_probs is not None:
                    used = [log_probs[number] for number in led]
                    confidence = math.exp(sum(used) / len(used))
                self.sound(kind, value, now, tie_seen, kept, confidence)
        return [row for row in self.rows if row["end"] is not None and id(row) not in done_before]

    def sound(self, kind, value, now, tie_seen, kept, confidence):
        row = {"onset": now, "end": None, "pitch": value, "velocity": self.velocity, "program": self.program,
               "drum": kind == "drum", "confidence": confidence}  # fmt: skip
        if kind == "drum":
            if self.velocity == 0:
                self.invalid += 1
                self.seen["silent drum"] += 1
            else:
                self.rows.append(row | {"program": 0, "end": now + 0.01})
                self.seen["drum"] += 1
            return
        old = [r for r in self.open_rows() if (r["pitch"], r["program"]) == (value, self.program)]
        if not tie_seen:
            if not old or any(old[0] is other for other in kept):
                self.invalid += 1
                self.seen["bad tie"] += 1
            else:
                kept.append(old[0])
                self.seen["tied"] += 1
        elif self.velocity == 0 and not old:
            self.invalid += 1
            self.seen["stray off"] += 1
        else:
            for r in old:
                self.close(r, now)
            self.seen["off" if self.velocity == 0 else "re-onset" if old else "onset"] += 1
            if self.velocity > 0:
                self.rows.append(row)

    def finish(self):
        rows = self.open_rows()
        for row in rows:
            self.latest = max(self.latest, row["onset"] + 0.01)
        for row in rows:
            self.close(row, self.latest)
        self.seen["flushed"] += len(rows)
        return rows


def as_notes(rows):
    return sort_notes(
        Note(r["onset"], r["end"], r["pitch"], r["velocity"], r["program"], r["drum"], r["confidence"]) for r in rows
    )


class Dice:
    """Seeded random numbers, one at a time without NumPy's cost for each call."""

    def __init__(self, seed):
        generator = np.random.default_rng(seed)
        self._blocks = chain.from_iterable(generator.random(4096).tolist() for _ in count())

    def random(self):
        return next(self._blocks)

    def uniform(self, low, high):
        return low + self.random() * (high - low)

    def below(self, limit):
        return int(self.random() * limit)

    def choice(self, options):
        return options[self.below(len(options))]


def random_tokens(rng):
    """Token ids of one segment: mostly what a network would say, sometimes noise."""
    if rng.random() < 0.08:
        return [rng.below(1603) - 3 for _ in range(rng.below(30))]
    tokens = []
    for _ in range(rng.below(4)):
        tokens += [1135 + rng.choice([0, 33])] * (rng.random() < 0.6) + [1004 + rng.choice([60, 61, 62])]
    tokens += [1134] * (rng.random() < 0.85)
    step = 0
    for _ in range(rng.below(9)):
        if rng.random() < 0.7:
            step += rng.choice([0, 0, 1, 5, 30, 100])
            part = rng.below(step + 1) if rng.random() < 0.2 else 0
            tokens += [3 + part] * (part > 0) + [3 + step - part]
        tokens += [1135 + rng.choice([0, 33])] * (rng.random() < 0.4)
        tokens += [1132 + (rng.random() < 0.55)] * (rng.random() < 0.6)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            tokens.append(1004 + rng.choice([60, 61, 62]) if rng.random() < 0.8 else 1263 + rng.choice([36, 42]))
        if rng.random() < 0.06:
            tokens.append(rng.choice([0, 2, 1134, 1391, 1535, 3, rng.below(1536)]))
    if rng.random() < 0.7:
        tokens += [1, 0, 1200]
    return tokens


def random_stream(rng):
    """Segments of one piece: (tokens, log-probabilities, start, the next start, another limit)."""
    starts = [0.0, 2.04, 4.09, 6.14, 8.19][: 1 + rng.below(4)]
    if rng.random() < 0.2:
        starts = sorted(rng.uniform(0, 5) for _ in starts)
    stream = []
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        tokens = random_tokens(rng)
        # multiples of 1/64: sums are exact, so that their order does not matter
        log_probs = [-rng.below(200) / 64 for _ in tokens] if rng.random() < 0.9 else None
        limit = rng.choice([following, None, 0.0, start + rng.below(150) / 100, rng.uniform(0, 9)])
        stream.append((tokens, log_probs, start, following, limit))
    return stream


def test_random_streams_decode_as_in_the_second_implementation():
    rng = Dice(20240612)
    seen: Counter[str] = Counter()
    for _ in range(10_000):
        stream = random_stream(rng)
        decoder, book = NoteDecoder(VOCABULARY), Book()
        for tokens, log_probs, start, _, limit in stream:
            notes = decoder.decode_segment(tokens, log_probs, start, limit)
            assert sort_notes(notes) == as_notes(book.segment(tokens, log_probs, start, limit))
        assert sort_notes(decoder.flush()) == as_notes(book.finish())
        assert decoder.statistics == DecodingStatistics(book.invalid, book.dropped)
        seen += book.seen
    rare = {reason: times for reason, times in seen.items() if times < 500}
    assert not rare, "the streams must reach every branch often"
    assert len(seen) == 14


def test_segment_by_segment_equals_all_at_once():
    rng = Dice(7)
    total = 0
    for _ in range(1500):
        stream = random_stream(rng)
        decoder = NoteDecoder(VOCABULARY)
        parts = [decoder.decode_segment(t, p, start, following) for t, p, start, following, _ in stream]
        notes = [note for part in [*parts, decoder.flush()] for note in part]
        segments = [SegmentTokens(start, tokens, log_probs) for tokens, log_probs, start, *_ in stream]
        assert tokens_to_notes(segments, VOCABULARY) == (sort_notes(notes), decoder.statistics)
        total += len(notes)
    assert total > 5000


def test_the_canonical_order():
    base = Note(1.0, 2.0, 60, 100, 5, is_drum=False)
    ordered = [
        replace(base, onset=0.5, program=9), replace(base, program=4, pitch=90), replace(base, pitch=59),
        base, replace(base, velocity=101), replace(base, offset=2.5), replace(base, program=0, is_drum=True),
    ]  # fmt: skip
    for shuffled in permutations(ordered):
        assert sort_notes(shuffled) == ordered


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("onset", -0.1), ("onset", 2.0), ("onset", math.nan), ("offset", math.inf), ("pitch", 128),
        ("pitch", -1), ("pitch", 60.5), ("velocity", 0), ("velocity", 128), ("program", 128),
        ("confidence", 1.1), ("confidence", math.nan),
    ],
)  # fmt: skip
def test_a_note_refuses_what_it_cannot_be(field, value):
    note = Note(1.0, 2.0, 60, 100, 5, is_drum=False)
    with pytest.raises(OptionError, match=r"note.*: give "):
        replace(note, **{field: value})
