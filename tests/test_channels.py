"""Segments of several channels, as YourMT3 has them: each channel is a row, and a segment is all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import mido
import numpy as np
import pytest

from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import OptionError
from mt3_runtime.graphs import graph_specs
from mt3_runtime.loading import load
from mt3_runtime.transcriber import Transcriber
from scripted_audio import RATE, levels, listener, write

LIMIT = 96  # max_length of the tiny model
SECOND = 32_767 / 16_000  # start of segment 1
END, TIE = 1, 339
EMPTY = [TIE, END]


def shift(steps):
    return 3 + steps


def pitch(number):
    return 209 + number


def velocity(bin_):
    return 337 + bin_


def program(number):
    return 340 + number


def drum(number):
    return 468 + number


def note(program_, number, onset=10, offset=20):
    return [TIE, shift(onset), program(program_), velocity(1), pitch(number), shift(offset), velocity(0), pitch(number),
            END]  # fmt: skip


def transcriber(bundle, *segments, **options):
    """Each segment is the rows of its three channels; audio of segment n has level n + 1."""
    rows = [row for segment in [[EMPTY] * 3, *segments] for row in segment]
    return listener(bundle, dict(enumerate(rows)), **options)


def transcribe(bundle, *segments, **options):
    busy = transcriber(bundle, *segments, **options)
    return busy.transcribe(levels(bundle, range(1, len(segments) + 1)), RATE)


def shape(notes):
    return [(n.onset, n.offset, n.program, n.pitch, n.is_drum) for n in notes]


def approx(*rows):
    return [pytest.approx(row, abs=1e-9) for row in rows]


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 26])
def test_notes_of_all_channels_are_put_together(channels_bundle, slots):
    segments = [
        [note(0, 60), EMPTY, [TIE, shift(5), drum(36), END]],
        [EMPTY, note(33, 40), EMPTY],
        [note(48, 70, 1, 2), note(33, 41, 3, 4), EMPTY],
    ]
    result = transcribe(channels_bundle, *segments, slots=slots)
    assert shape(result.notes) == approx(
        (0.05, 0.06, 0, 36, True),
        (0.10, 0.20, 0, 60, False),
        (2.15, 2.25, 33, 40, False),
        (4.11, 4.12, 48, 70, False),
        (4.13, 4.14, 33, 41, False),
    )
    provenance = result.provenance
    assert (provenance.segments, provenance.invalid_events, provenance.dropped_events) == (3, 0, 0)
    assert provenance.tokens == sum(len(row) - 1 for segment in segments for row in segment)
    assert result.warnings == ()


def test_each_channel_has_its_own_state(channels_bundle):
    """A tie is looked up in the channel that says it: the same words elsewhere mean nothing."""
    held = [TIE, shift(10), program(33), velocity(1), pitch(60), END]
    close = [program(33), pitch(60), TIE, shift(50), program(33), velocity(0), pitch(60), END]
    [note_] = transcribe(channels_bundle, [held, EMPTY, EMPTY], [close, EMPTY, EMPTY]).notes
    assert note_.offset == pytest.approx(2.55)
    [note_] = transcribe(channels_bundle, [held, EMPTY, EMPTY], [EMPTY, close, EMPTY]).notes
    assert note_.offset == pytest.approx(SECOND)


def test_a_segment_is_out_when_its_last_channel_is(channels_bundle):
    slow = [TIE, *[shift(1)] * 40, END]
    busy = transcriber(channels_bundle, [EMPTY, slow, note(0, 60)], [note(0, 61)] * 3, [EMPTY] * 3, slots=9)
    found = list(busy.iter_segments(levels(channels_bundle, [1, 2, 3]), RATE))
    assert [segment.index for segment in found] == [0, 1, 2]
    assert [segment.count for segment in found] == [3, 3, 3]
    assert [segment.start for segment in found] == pytest.approx([0, SECOND, 2 * SECOND])
    steps = [call.keys for call in busy.backend.calls if hasattr(call, "positions")]
    assert max(index for index, keys in enumerate(steps) if 4 in keys) == 41  # row 4 is the slow one, and held up all
    assert max(index for index, keys in enumerate(steps) if 6 in keys) < 12


def test_a_first_token_never_ends_a_row(channels_bundle):
    result = transcribe(channels_bundle, [[END, *note(0, 60)], EMPTY, [END, END]])
    assert [n.pitch for n in result.notes] == [60]
    assert result.provenance.tokens == len(note(0, 60)) + 1 + 1


def test_unfinished_rows_are_named_by_segment_and_channel(channels_bundle):
    endless, broken = [TIE] + [shift(0)] * LIMIT, [TIE, math.nan]
    segments = [
        [endless, EMPTY, broken],
        [endless, EMPTY, EMPTY],
        [EMPTY, endless, broken],
        [note(0, 60), broken, EMPTY],
    ]
    busy = transcriber(channels_bundle, *segments, slots=5)
    audio = levels(channels_bundle, [1, 2, 3, 4])
    result = busy.transcribe(audio, RATE)
    assert result.provenance.truncated_segments == (0, 1, 2)
    assert result.provenance.failed_segments == (0, 2, 3)
    truncated, failed = result.warnings[:2]
    assert truncated.startswith("channels 0 of segments 0-1; channels 1 of segments 2 reached 96 tokens without end: ")
    assert failed.startswith("channels 1 of segments 3; channels 2 of segments 0, 2 gave numbers that are not finite")
    assert [n.pitch for n in result.notes] == [60]
    statuses = [segment.status for segment in busy.iter_segments(audio, RATE)]
    assert statuses == ["failed", "truncated", "failed", "failed"]


def test_channels_alike_are_named_together(channels_bundle):
    endless = [TIE] + [shift(0)] * LIMIT
    busy = transcriber(channels_bundle, *[[endless] * 3] * 2, slots=5)
    (truncated, *_) = busy.transcribe(levels(channels_bundle, [1, 2]), RATE).warnings
    assert truncated.startswith("channels 0-2 of segments 0-1 reached 96 tokens")


def test_what_the_notes_have_to_tell_is_in_the_warnings(channels_bundle):
    untied = [shift(20), program(0), velocity(1), pitch(50), shift(30), velocity(0), pitch(50), END]
    kept = transcribe(channels_bundle, [untied, EMPTY, EMPTY])
    strict = transcribe(channels_bundle, [untied, EMPTY, EMPTY], strict_upstream=True)
    assert [n.pitch for n in strict.notes] == []
    assert (strict.provenance.strict_upstream, kept.provenance.strict_upstream) == (True, False)
    assert any("without a tie token" in warning and "left out" in warning for warning in strict.warnings)
    assert any("without a tie token" in warning and "read all the same" in warning for warning in kept.warnings)


def test_strict_means_the_published_vectors(channels_bundle):
    """The first vector of the authors' code: a note without an end lasts 10 ms; otherwise it lasts to the end."""
    held = [TIE, shift(10), program(33), velocity(1), pitch(60), END]
    rows = [held, EMPTY, EMPTY]
    assert shape(transcribe(channels_bundle, rows, strict_upstream=True).notes) == approx((0.1, 0.11, 33, 60, False))
    [note_] = transcribe(channels_bundle, rows).notes
    assert note_.offset == pytest.approx((32_767 - 500) / RATE)


def tracks(path):
    """Programs in the file."""
    messages = [message for track in mido.MidiFile(path).tracks for message in track]
    return sorted(message.program for message in messages if message.type == "program_change")


def test_midi_is_written_in_the_style_of_the_family(channels_bundle, tmp_path):
    rows = [note(41, 60), note(42, 50), EMPTY]  # viola and cello, both strings
    merged, fine = (transcribe(channels_bundle, rows, fine_programs=fine) for fine in (False, True))
    assert merged.notes == fine.notes
    assert [n.program for n in merged.notes] == [41, 42]
    merged.save(tmp_path / "merged.mid")
    fine.save(tmp_path / "fine.mid")
    assert set(tracks(tmp_path / "merged.mid")) == {48}
    assert set(tracks(tmp_path / "fine.mid")) == {41, 42}
    assert {i.program for i in merged.to_midi().instruments} == {48}
    assert {i.program for i in fine.to_midi().instruments} == {41, 42}


@pytest.mark.parametrize("option", ["strict_upstream", "fine_programs"])
def test_options_of_yourmt3_are_refused_for_others(tiny_folder, channels_bundle, option):
    with pytest.raises(
        OptionError,
        match=rf"^only YourMT3 models have an option {option} \(--\S+ \S+\), and tiny is none",
    ):
        load(tiny_folder, **{option: True})
    backend = transcriber(channels_bundle).backend
    assert Transcriber(channels_bundle, backend, name="scripts", **{option: True}).name == "scripts"


@pytest.mark.parametrize("slots", [1, 4, 13])
def test_many_files_of_many_channels(channels_bundle, tmp_path, slots):
    segments = [[note(0, 40 + i), note(33, 60 + i, 1 + i, 60), EMPTY] for i in range(8)]
    segments[3][1], segments[5][2] = [TIE] + [shift(0)] * LIMIT, [TIE, drum(40), math.nan]
    busy = transcriber(channels_bundle, *segments, slots=slots)
    numbers = [[1, 2, 3], [4], [5, 6, 7], [8, 4]]
    sources = [write(tmp_path / f"{i}.wav", levels(channels_bundle, row)) for i, row in enumerate(numbers)]
    alone = [busy.transcribe(source) for source in sources]
    found = dict(busy.transcribe_many(sources))
    for index, wanted in enumerate(alone):
        result = found[index]
        assert result.notes == wanted.notes
        times = {"stage_seconds": {}, "real_time_factor": 0.0}
        assert replace(result.provenance, **times) == replace(wanted.provenance, **times)
    assert {result.provenance.truncated_segments for result in alone} == {(), (0,), (1,)}


# ---- a real network ---------------------------------------------------------------------------------------


class Spread(OrtBackend):
    """Three channels of one segment: the states of the encoder, and those turned by one and two features."""

    def encode(self, features):
        states = super().encode(features)  # [segments, 1, frames, d_model]
        return np.concatenate([np.roll(states, channel, axis=-1) for channel in range(3)], axis=1)


@pytest.fixture(scope="module")
def spread(musical_folder):
    """A transcriber of three channels with any number of slots."""
    bundle = open_bundle(musical_folder)
    model = replace(bundle.manifest.model, family="yourmt3", channels=3)
    contracts = tuple(graph_specs(model, bundle.manifest.features).values())
    spoken = replace(bundle, manifest=replace(bundle.manifest, model=model, contracts=contracts))
    return lambda slots: Transcriber(spoken, Spread(bundle, slots=slots, threads=1), name="spread")


@pytest.fixture(scope="module")
def noise():
    rng = np.random.default_rng(3)
    return [(rng.normal(0, 0.1, int(seconds * RATE)).astype(np.float32), RATE) for seconds in (3, 7, 2)]


def comparable(result):
    times = {"stage_seconds": {}, "real_time_factor": 0.0}
    return [replace(n, confidence=None) for n in result.notes], replace(result.provenance, **times)


@pytest.fixture(scope="module")
def one_by_one(spread, noise):
    """Every row decoded by itself."""
    results = [spread(1).transcribe(*clip) for clip in noise]
    assert all(len(result.notes) > 5 for result in results)
    return results


@pytest.mark.parametrize("slots", [3, 4, 20])
def test_channels_of_a_real_network_do_not_hear_each_other(spread, noise, one_by_one, slots):
    many = dict(spread(slots).transcribe_many(noise))
    for index, wanted in enumerate(one_by_one):
        assert comparable(many[index]) == comparable(wanted)
        for n, other in zip(many[index].notes, wanted.notes, strict=True):
            assert n.confidence == pytest.approx(other.confidence, abs=1e-4)
