"""From audio to a transcription: on scripts where every note is known, on a tiny network for all the rest."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from mt3_runtime.devices import ENCODE_GROUP
from mt3_runtime.errors import AudioError, OptionError
from mt3_runtime.loading import load
from mt3_runtime.midi import midi_warnings
from mt3_runtime.notes import sort_notes
from mt3_runtime.piece import Piece
from mt3_runtime.reading import rows_of
from mt3_runtime.transcriber import Transcriber
from mt3_runtime.unfinished import ranges
from scripted_audio import LIMIT, RATE, SEGMENT, chords, scripted, silence

NAN = math.nan
END, TIE = 1, 1134


def shift(steps):
    return 3 + steps


def pitch(number):
    return 1004 + number


def velocity(bin_):
    return 1132 + bin_


def program(number):
    return 1135 + number


def drum(number):
    return 1263 + number


@pytest.fixture
def tiny(musical_folder):
    return load(musical_folder, threads=1)


def notes_of(each, clip):
    notes = each.transcribe(clip, RATE).notes
    assert len(notes) > 5
    return notes


def by_turns(transcribers, clips):
    """Notes of several clips, one segment of each at a time."""
    streams = [each.iter_segments(clip, RATE) for each, clip in zip(transcribers, clips, strict=True)]
    columns = zip(*zip(*streams, strict=True), strict=True)
    return [tuple(sort_notes(note for segment in column for note in segment.notes)) for column in columns]


# ---- notes over segments --------------------------------------------------------------------------------

HELD = [TIE, shift(10), program(33), velocity(1), pitch(60), END]
VECTORS = {
    "a note": ([HELD], [(0.10, 0.11, 60, 127, 33, False)], 0, 0),
    "a tie": (
        [HELD, [program(33), pitch(60), TIE, shift(50), velocity(0), pitch(60), END]],
        [(0.10, 2.54, 60, 127, 33, False)], 0, 0,
    ),
    "no tie": (
        [HELD, [TIE, shift(50), velocity(1), drum(36), END]],
        [(0.10, 2.04, 60, 127, 33, False), (2.54, 2.55, 36, 127, 0, True)], 0, 0,
    ),
    "a tie over an empty segment": (
        [HELD, [END], [program(33), pitch(60), TIE, shift(5), velocity(0), pitch(60), END]],
        [(0.10, 4.14, 60, 127, 33, False)], 0, 0,
    ),
    "no tie section": (
        [[shift(10), program(33), velocity(1), pitch(60), shift(20), velocity(0), pitch(60), END]], [], 2, 0,
    ),
    "beyond the segment": (
        [[TIE, shift(204), program(0), velocity(1), pitch(60), shift(205), pitch(62), END],
         [program(0), pitch(60), TIE, END]],
        [(2.04, 2.05, 60, 127, 0, False)], 0, 2,
    ),
    "a drum without velocity": ([[TIE, velocity(0), drum(36), END]], [], 1, 0),
    "defaults": ([[TIE, shift(1), pitch(60), END]], [(0.01, 0.02, 60, 100, 0, False)], 0, 0),
    "a last segment has no limit": (
        [[TIE, shift(1000), shift(50), velocity(1), drum(40), END]], [(10.50, 10.51, 40, 127, 0, True)], 0, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("name", VECTORS)
def test_scripted_segments_give_these_notes(tiny_bundle, name, slots):
    scripts, expected, invalid, dropped = VECTORS[name]
    result = scripted(tiny_bundle, *scripts, slots=slots).transcribe(silence(len(scripts)), RATE)
    found = [(n.onset, n.offset, n.pitch, n.velocity, n.program, n.is_drum) for n in result.notes]
    assert len(found) == len(expected)
    for note, wanted in zip(found, expected, strict=True):
        assert note == pytest.approx(wanted, abs=1e-9)
    assert (result.provenance.invalid_events, result.provenance.dropped_events) == (invalid, dropped)
    assert result.provenance.segments == len(scripts)
    assert result.provenance.tokens == sum(len(script) - 1 for script in scripts)


def test_confidence_comes_from_the_log_probabilities_of_the_onset(tiny_bundle):
    [note] = scripted(tiny_bundle, HELD).transcribe(silence(1), RATE).notes
    assert note.confidence == pytest.approx(math.exp(-(13 + 1168 + 1133 + 1064) / 1024 / 4), rel=1e-6)


def test_segments_stand_at_their_start_times(tiny_bundle):
    hits = [[TIE, velocity(1), drum(35 + index), END] for index in range(31)]
    notes = scripted(tiny_bundle, *hits).transcribe(silence(31), RATE).notes
    assert [note.pitch for note in notes] == list(range(35, 66))
    starts = [note.onset for note in notes]
    assert starts[:5] + starts[14:17] == pytest.approx([0, 2.04, 4.09, 6.14, 8.19, 28.67, 30.71, 32.76])
    assert starts[30] == pytest.approx(61.43)


@pytest.mark.parametrize(("samples", "segments"), [(128, 1), (SEGMENT - 1, 1), (SEGMENT, 2), (3 * SEGMENT, 4)])
def test_audio_of_whole_segments_gives_one_more(tiny_bundle, samples, segments):
    result = scripted(tiny_bundle, *[[END]] * segments).transcribe(np.zeros(samples, np.float32), RATE)
    assert result.provenance.segments == segments
    assert result.duration == result.provenance.audio_seconds == samples / RATE


def test_segments_come_in_order_each_with_the_notes_it_completes(tiny_bundle):
    scripts = [
        [*HELD[:-1], *[shift(1)] * 40, END],  # the slowest goes first
        [program(33), pitch(60), TIE, velocity(1), drum(36), END],
        [TIE, END],
        [END],
        [TIE, shift(7), pitch(61), END],
    ]
    found = list(scripted(tiny_bundle, *scripts, slots=8).iter_segments(silence(5), RATE))
    assert [segment.index for segment in found] == [0, 1, 2, 3, 4]
    assert [segment.count for segment in found] == [5] * 5
    assert [segment.start for segment in found] == pytest.approx([0, 2.04, 4.09, 6.14, 8.19])
    assert [segment.status for segment in found] == ["ended"] * 5
    assert [[note.pitch for note in segment.notes] for segment in found] == [[], [36], [60], [], [61]]
    assert found[2].notes[0].offset == pytest.approx(4.09)
    assert found[4].notes[0].offset == pytest.approx(8.27)  # of no note-off: what sounds in the end is flushed


def test_the_first_segment_is_out_before_the_last_is_encoded(tiny_bundle):
    busy = scripted(tiny_bundle, *[HELD] * 20, slots=2)
    stream = busy.iter_segments(silence(20), RATE)
    assert busy.backend._encoded == 0
    assert next(stream).index == 0
    assert busy.backend._encoded == ENCODE_GROUP
    assert len(list(stream)) == 19
    assert busy.backend._encoded == 20


# ---- segments that do not end well ----------------------------------------------------------------------


def hit(number):
    return [TIE, velocity(1), drum(number)]


def test_a_truncated_segment_is_named_and_keeps_its_notes(tiny_bundle):
    endless = hit(41) + [shift(1)] * (LIMIT - 4) + [drum(42), drum(43)]
    result = scripted(tiny_bundle, [*hit(40), END], endless, [*hit(44), END], endless).transcribe(silence(4), RATE)
    assert [note.pitch for note in result.notes] == [40, 41, 42, 44, 41, 42]
    assert result.provenance.truncated_segments == (1, 3)
    assert result.provenance.failed_segments == ()
    assert result.provenance.tokens == 3 + LIMIT + 3 + LIMIT
    assert result.warnings == ("segments 1, 3 reached 96 tokens without end: later notes may be missing",)


def test_a_failed_segment_is_named_and_keeps_its_notes(tiny_bundle):
    broken = [*hit(41), NAN]
    whole = [*hit(42), drum(43), END]
    failing = scripted(tiny_bundle, [*hit(40), END], broken, [*hit(41)[:1], NAN], [END], retries={2: whole})
    result = failing.transcribe(silence(4), RATE)
    assert [note.pitch for note in result.notes] == [40, 41, 42, 43]
    assert result.provenance.failed_segments == (1,)
    assert result.provenance.truncated_segments == ()
    assert result.warnings == (
        "segments 1 gave numbers that are not finite, twice: only the notes before that are kept",
    )


def test_segments_say_how_they_ended(tiny_bundle):
    scripts = [[END], [NAN], [shift(0)] * LIMIT, HELD]
    found = scripted(tiny_bundle, *scripts).iter_segments(silence(4), RATE)
    assert [segment.status for segment in found] == ["ended", "failed", "truncated", "ended"]


def test_everything_worth_knowing_is_in_the_warnings(tiny_bundle):
    many = [TIE, velocity(1)] + [token for number in range(17) for token in (program(number), pitch(60))]
    manifest = tiny_bundle.manifest
    noted = replace(tiny_bundle, manifest=replace(manifest, origin=replace(manifest.origin, notice="for tests only")))
    result = scripted(noted, [*many, NAN], [shift(0)] * LIMIT).transcribe(silence(2), RATE)
    of_midi = midi_warnings(result.notes)
    assert len(of_midi) == 1
    assert result.warnings == (
        "for tests only",
        "segments 1 reached 96 tokens without end: later notes may be missing",
        "segments 0 gave numbers that are not finite, twice: only the notes before that are kept",
        *of_midi,
    )
    assert scripted(tiny_bundle, [END]).transcribe(silence(1), RATE).warnings == ("no notes were found",)


# ---- the same result by every way -----------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "subtype", "channels"), [(16_000, "FLOAT", 1), (44_100, "PCM_16", 2)])
def test_a_file_an_array_and_the_segments_give_the_same_notes(tiny, tmp_path, rate, subtype, channels):
    audio = chords(7.3, 1, rate)
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.stack([audio, audio[::-1]][:channels], axis=1), rate, subtype=subtype)
    samples, _ = soundfile.read(path, dtype={"FLOAT": "float32", "PCM_16": "int16"}[subtype])
    from_file = tiny.transcribe(path)
    assert len(from_file.notes) > 5
    assert tiny.transcribe(str(path)).notes == from_file.notes
    from_array = tiny.transcribe(samples, rate)
    assert from_array.notes == from_file.notes
    assert replace(
        from_array.provenance,
        stage_seconds=from_file.provenance.stage_seconds,
        real_time_factor=from_file.provenance.real_time_factor,
    ) == from_file.provenance  # fmt: skip
    segments = list(tiny.iter_segments(path))
    assert tuple(sort_notes(note for segment in segments for note in segment.notes)) == from_file.notes
    assert len(segments) == from_file.provenance.segments == 4


@pytest.mark.parametrize("bad", [np.nan, 2e12])
def test_segments_before_what_is_no_sound_are_given(tiny, tmp_path, bad):
    """Of a file that cannot be used from 20 s on, whatever is wrong with it."""
    samples, found = np.tile(chords(11, 2)[: 2 * RATE], 13), []
    samples[20 * RATE :] = bad
    soundfile.write(tmp_path / "bad.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"bad\.wav"):
        found.extend(segment.index for segment in tiny.iter_segments(tmp_path / "bad.wav"))
    assert len(found) >= 3
    assert found == list(range(len(found)))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_number_of_slots_does_not_change_the_notes(tiny, musical_folder, slots):
    notes, wanted = (notes_of(each, chords(11, 2)) for each in (load(musical_folder, slots=slots), tiny))
    for note, other in zip(notes, wanted, strict=True):
        assert replace(note, confidence=None) == replace(other, confidence=None)
        assert note.confidence == pytest.approx(other.confidence, abs=1e-4)


def test_a_transcription_leaves_nothing_behind_for_the_next(tiny, musical_folder):
    first, second = chords(5, 3), chords(6, 4)
    fresh = notes_of(load(musical_folder, threads=1), second)
    assert notes_of(tiny, first) != fresh
    assert notes_of(tiny, second) == fresh


def test_progress_is_told_after_every_segment(tiny_bundle):
    told = []
    scripted(tiny_bundle, *[HELD] * 5).transcribe(silence(5), RATE, progress=lambda *step: told.append(step))
    assert told == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_a_rate_belongs_to_samples_and_not_to_a_file(tiny_bundle, tmp_path):
    busy = scripted(tiny_bundle, HELD)
    soundfile.write(tmp_path / "a.wav", silence(1), RATE)
    for call in (busy.transcribe, lambda *audio: next(busy.iter_segments(*audio))):
        with pytest.raises(OptionError, match=r"pass sample_rate in Hz$"):
            call(silence(1))
        for path in (tmp_path / "a.wav", str(tmp_path / "a.wav")):
            with pytest.raises(OptionError, match=r"leave sample_rate out$"):
                call(path, RATE)
        with pytest.raises(AudioError, match=r"missing\.wav' does not exist"):
            call(tmp_path / "missing.wav")
    assert len(busy.transcribe(tmp_path / "a.wav").notes) == 1


def test_a_row_keeps_no_states_but_its_own(tiny_bundle):
    busy = scripted(tiny_bundle, *[HELD] * 9)
    rows = list(rows_of(Piece(busy), silence(9), RATE))
    assert [row.key for row in rows] == [(0, segment, 0) for segment in range(9)]
    assert all(row.states.base is None for row in rows)


# ---- one at a time --------------------------------------------------------------------------------------


def test_a_busy_transcriber_refuses_its_own_thread(tiny_bundle):
    busy = scripted(tiny_bundle, *[[*hit(40), END]] * 4)
    stream = busy.iter_segments(silence(4), RATE)
    next(stream)
    for call in (busy.transcribe, lambda *audio: next(busy.iter_segments(*audio))):
        with pytest.raises(OptionError, match=r"let it finish, or close its iterator first$"):
            call(silence(4), RATE)
    assert [segment.index for segment in stream] == [1, 2, 3]  # unharmed


def test_a_callback_cannot_start_another_transcription(tiny_bundle):
    busy = scripted(tiny_bundle, [END], [END])
    with pytest.raises(OptionError, match="in the middle"):
        busy.transcribe(silence(1), RATE, progress=lambda *_: busy.transcribe(silence(1), RATE))
    assert busy.transcribe(silence(1), RATE).notes == ()


def interrupt(stream):
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)


@pytest.mark.parametrize(
    "leave", [lambda stream: stream.close(), list, lambda stream: None, interrupt], ids=["close", "end", "drop", "stop"]
)
def test_an_iterator_that_is_left_frees_the_transcriber(tiny, leave):
    audio = chords(9, 5)
    wanted = notes_of(tiny, audio)
    streams = [tiny.iter_segments(audio, RATE)]
    next(streams[0])
    leave(streams.pop())
    assert notes_of(tiny, audio) == wanted


def test_an_error_in_the_callback_frees_the_transcriber(tiny_bundle):
    busy = scripted(tiny_bundle, *[HELD] * 2)

    def stop(done, count):
        raise RuntimeError(f"{done} of {count}")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="1 of 1"):
            busy.transcribe(silence(1), RATE, progress=stop)


def test_other_threads_wait_for_their_turn(tiny):
    first, second = chords(9, 5), chords(5, 6)
    wanted = [notes_of(tiny, audio) for audio in (first, second)]
    assert wanted[0] != wanted[1]
    stream = tiny.iter_segments(first, RATE)
    notes = list(next(stream).notes)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(notes_of, tiny, second)
        time.sleep(0.3)  # enough for a whole transcription, if it did not wait
        assert not other.done()
        notes += [note for segment in stream for note in segment.notes]
        assert other.result(timeout=30) == wanted[1]
    assert tuple(sort_notes(notes)) == wanted[0]


def test_threads_at_once_get_each_its_own_result(tiny):
    clips = [chords(seconds, seed) for seed, seconds in enumerate([3, 5, 4, 6], start=10)]
    wanted = [notes_of(tiny, clip) for clip in clips]
    barrier = threading.Barrier(4)

    def run(clip):
        barrier.wait()
        return [notes_of(tiny, clip) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, clips))
    assert found == [[notes] * 3 for notes in wanted]


def test_without_turns_two_transcriptions_would_spoil_each_other(tiny_bundle, monkeypatch):
    """The planted fault of the tests above, on one thread so that it comes out every time."""
    monkeypatch.setattr(Transcriber, "_turn", lambda self: nullcontext())
    busy = scripted(tiny_bundle, *[HELD, [shift(0)] * LIMIT, HELD] * 2)
    with pytest.raises(AssertionError, match="read at position"):
        by_turns([busy, busy], [silence(3), silence(3)])


def test_two_transcribers_work_side_by_side(musical_folder):
    pair = [load(musical_folder, threads=1), load(musical_folder, slots=2, threads=1)]
    clips = [chords(9, 5), chords(8.5, 6)]
    wanted = [notes_of(each, clip) for each, clip in zip(pair, clips, strict=True)]
    assert by_turns(pair, clips) == wanted
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(notes_of, pair * 2, clips * 2)) == wanted * 2


def test_runs_of_segments_are_written_short():
    assert ranges([]) == ""
    assert ranges([4]) == "4"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
