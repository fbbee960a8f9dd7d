"""Segments in which there is nothing to hear: no network is asked, and everything is as if it had said so."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mt3_runtime import cli
from mt3_runtime.audio import load_audio
from mt3_runtime.backends.scripted import Admitted, Stepped
from mt3_runtime.decoding import Row, decode_rows
from mt3_runtime.errors import AudioError, OptionError
from mt3_runtime.features import feature_extractor
from mt3_runtime.loading import load
from mt3_runtime.notes import sort_notes
from mt3_runtime.silence import DIGITAL, OFF, SilenceRule, silence_rule, silent_tokens
from mt3_runtime.vocabulary import Event, Vocabulary
from scripted_audio import LIMIT, RATE, STEP, levels, listener, silence, write
from test_device_pieces import DeviceListener, on_device
from test_live import blocks_of
from test_song_memory import memory_bundle  # noqa: F401
from test_stream_command import stream

END, TIE = 1, 1134
HELD = [TIE, 3 + 10, 1135 + 33, 1133, 1004 + 60, END]  # a note from 0.1 s on, which nothing ends
GOES_ON = [1135 + 33, 1004 + 60, TIE, END]

# ---- what is silent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "peak", "is_silent"),
    [
        (OFF, 0.0, False),
        (DIGITAL, 0.0, True),
        (DIGITAL, 1e-45, False),  # the smallest float32
        (SilenceRule(-80.0), 0.0, True),
        (SilenceRule(-80.0), 0.99e-4, True),
        (SilenceRule(-80.0), 1.01e-4, False),
        (SilenceRule(-60.0), 1e-3 * (1 - 1e-6), True),
        (SilenceRule(-60.0), 1e-3 * (1 + 1e-6), False),
        (SilenceRule(-1e9), 1e-45, False),
        (SilenceRule(-80.0), math.nan, False),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("where", [0, 12_345, -1])
def test_the_peak_decides_wherever_it_is(rule, peak, is_silent, sign, where):
    samples = np.zeros(32_768, np.float32)
    samples[where] = sign * peak
    assert rule.is_silent(samples) is is_silent


@pytest.mark.parametrize("suffix", [".wav", ".mp3"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_zeros_of_a_file_are_zeros_for_the_model(tmp_path, suffix, rate):
    """However it is packed and resampled, silence begins soon after the sound, and lasts until shortly before it."""
    sound = 0.2 * np.random.default_rng(1).normal(size=(rate, 2))
    soundfile.write(tmp_path / f"a{suffix}", np.concatenate([sound, np.zeros((2 * rate, 2)), sound]), rate)
    samples = load_audio(tmp_path / f"a{suffix}")
    assert DIGITAL.is_silent(samples[int(1.3 * RATE) : int(2.7 * RATE)])
    assert not DIGITAL.is_silent(samples[: int(1.3 * RATE)])
    assert not DIGITAL.is_silent(samples[int(2.7 * RATE) :])


def test_a_rule_by_its_name():
    assert [silence_rule(name) for name in ("off", "digital", "auto")] == [OFF, DIGITAL, DIGITAL]
    assert silence_rule("auto", strict_upstream=True) == OFF
    assert silence_rule("digital", strict_upstream=True) == DIGITAL
    assert silence_rule("-80") == silence_rule(-80) == silence_rule(-80.0) == SilenceRule(-80.0)
    assert [str(rule) for rule in (OFF, DIGITAL, SilenceRule(-72.5))] == ["off", "digital", "-72.5 dBFS"]


@pytest.mark.parametrize("asked", ["", "quiet", "-80 dB", "nan", "-inf", None, True, math.nan, [1]])
def test_what_is_no_rule(asked):
    with pytest.raises(OptionError, match=r"is no rule: use auto, off, digital, or a level such as -80 \(dBFS\)$"):
        silence_rule(asked)


@pytest.mark.parametrize("asked", ["0", 0, "3", 1.5])
def test_a_level_that_calls_music_silent(asked):
    with pytest.raises(OptionError, match=r"would call all audio silent: give one below 0, such as -80$"):
        silence_rule(asked)


# ---- as if the network had said it ----------------------------------------------------------------------------------


def alphabet(bundle):
    """Tokens of a few notes, by what they mean."""
    vocabulary = Vocabulary(bundle.manifest.vocabulary)
    events = [Event("tie", 0), Event("velocity", 0), Event("velocity", 1)]
    events += [Event("shift", steps) for steps in (0, 1, 30, 120, 205)]
    events += [Event("pitch", pitch) for pitch in (60, 64)] + [Event("drum", 36)]
    events += [Event("program", program) for program in (0, 33)]
    return [vocabulary.encode(event) for event in events]


def random_row(rng, known):
    """One row: any tokens, mostly behind a tie token; some fail, some never end."""
    tokens = rng.choice(known, rng.integers(0, 16)).tolist()
    tokens.insert(int(rng.integers(0, 3)) if rng.random() < 0.8 else len(tokens), known[0])
    if rng.random() < 0.08:
        return [*tokens, math.nan]
    return [*tokens, *known[:1] * LIMIT] if rng.random() < 0.05 else [*tokens, END]


def random_rows(bundle, count, seed):
    """Scripts of segments 0, which is silence, to count: what each of their channels says."""
    rng, known, channels = np.random.default_rng(seed), alphabet(bundle), bundle.manifest.model.channels
    rows = [[known[0], END]] * channels + [random_row(rng, known) for _ in range(count * channels)]
    return dict(enumerate(rows))


def asked_and_not(bundle, rows, slots):
    """A transcriber that asks the network about silence, and one that does not."""
    return [listener(bundle, rows, slots=slots, silence=rule) for rule in (OFF, DIGITAL)]


def told(segments):
    return [(s.index, s.count, s.start, s.notes, s.status, s.is_last) for s in segments]


def admitted(busy):
    """Row and memory of every admission, but those of segment 0, in order."""
    channels = busy.bundle.manifest.model.channels
    calls = [call for call in busy.backend.calls if isinstance(call, Admitted)]
    pairs = [pair for call in calls for pair in zip(call.keys, call.memories or [()] * len(call.keys), strict=True)]
    return [pair for pair in pairs if pair[0] >= channels]


ALIKE = ("audio_seconds", "segments", "invalid_events", "dropped_events", "truncated_segments", "failed_segments")
KINDS = ["tiny_bundle", "channels_bundle", "memory_bundle"]


@pytest.fixture(params=KINDS)
def bundle(request):
    return request.getfixturevalue(request.param)


quickly = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
songs = st.lists(st.booleans(), min_size=1, max_size=10)


def numbers_of(song, first=1):
    """Segment numbers, 0 where it is silent."""
    return [first + index if is_loud else 0 for index, is_loud in enumerate(song)]


@quickly
@given(song=songs, seed=st.integers(0, 2**32), slots=st.sampled_from([1, 3, 8]), cut=st.sampled_from([0, 500]))
def test_notes_and_times_are_those_of_a_network_that_hears_nothing(bundle, song, seed, slots, cut):
    samples, channels = levels(bundle, numbers_of(song), cut), bundle.manifest.model.channels
    off, skipping = asked_and_not(bundle, random_rows(bundle, len(song), seed), slots)
    one, other = (busy.transcribe(samples, RATE) for busy in (off, skipping))
    assert other.notes == one.notes
    wanted, found = one.provenance, other.provenance
    assert [getattr(found, name) for name in ALIKE] == [getattr(wanted, name) for name in ALIKE]
    silent = [index for index, is_loud in enumerate(song) if not is_loud]
    silent += range(len(song), found.segments)  # MT3 adds a segment of zeros to whole ones
    assert (found.skip_silence, found.silent_segments) == ("digital", tuple(silent))
    assert (wanted.skip_silence, wanted.silent_segments) == ("off", ())
    assert found.tokens == wanted.tokens - len(silent) * channels
    assert found.memory_restarts == tuple(sorted(set(wanted.memory_restarts) - set(silent)))
    restarted = re.compile("know nothing of what was before")
    assert [w for w in other.warnings if not restarted.search(w)] == [
        w for w in one.warnings if not restarted.search(w)
    ]
    assert sorted(admitted(skipping)) == sorted(admitted(off))
    assert not any(key < channels for call in skipping.backend.calls for key in getattr(call, "keys", ()))
    segments = list(skipping.iter_segments(samples, RATE))
    assert told(segments) == told(off.iter_segments(samples, RATE))
    assert [segment.index for segment in segments if segment.is_silent] == silent


@quickly
@given(pieces=st.lists(songs, min_size=1, max_size=4), seed=st.integers(0, 2**32), slots=st.sampled_from([1, 3, 8]))
def test_files_side_by_side_and_live_streams_too(bundle, pieces, seed, slots):
    audio, count = [], 0
    for song in pieces:
        audio.append(levels(bundle, numbers_of(song, first=count + 1)))
        count += len(song)
    off, skipping = asked_and_not(bundle, random_rows(bundle, count, seed), slots)
    alone = [off.transcribe(samples, RATE).notes for samples in audio]
    many = dict(skipping.transcribe_many([(samples, RATE) for samples in audio]))
    assert [many[index].notes for index in range(len(audio))] == alone
    silent = [tuple(index for index, is_loud in enumerate(song) if not is_loud) for song in pieces]
    assert [many[index].provenance.silent_segments for index in range(len(audio))] == silent
    live = listen(skipping, audio, seed)
    assert [tuple(sort_notes(note for segment in found for note in segment.notes)) for found in live] == alone
    assert [tuple(segment.index for segment in found if segment.is_silent) for found in live] == silent
    assert [[segment.start for segment in found] for found in live] == [
        [segment.start for segment in off.iter_segments(samples, RATE)] for samples in audio
    ]


def listen(busy, audio, seed):
    """Segments of several live streams, that come in blocks by turns."""
    found = [[] for _ in audio]
    blocks = [blocks_of(samples, seed=seed + index) for index, samples in enumerate(audio)]
    with busy.live() as live:
        for index in range(len(audio)):
            live.open(index, RATE)
        waiting = set(range(len(audio)))
        while waiting:
            for index in sorted(waiting):
                block = next(blocks[index], None)
                if block is None:
                    waiting.remove(index)
                    live.end(index)
                else:
                    live.feed(index, block)
            for index, segment in live.advance():
                found[index].append(segment)
        for index, segment in live.drain():
            found[index].append(segment)
    return found


@quickly
@given(song=songs, seed=st.integers(0, 2**32), chunk=st.sampled_from([1, 4, 16]))
def test_launches_of_a_device(bundle, song, seed, chunk):
    samples, rows = levels(bundle, numbers_of(song)), random_rows(bundle, len(song), seed)
    device = on_device(bundle, rows, chunk)
    device.silence = DIGITAL
    assert told(device.iter_segments(samples, RATE)) == told(listener(bundle, rows).iter_segments(samples, RATE))


class AudioListener(DeviceListener):
    """A device that computes features itself; counts the segments that came."""

    takes_audio = True

    def encode_audio(self, samples, frames):
        self.counts = [*getattr(self, "counts", []), len(frames)]
        return self.encode(samples[:, :1, None])


def test_a_device_is_not_sent_silence(tiny_bundle):
    busy = listener(tiny_bundle, {}, silence=DIGITAL)
    busy.extractor = feature_extractor(tiny_bundle.manifest.features)
    busy.backend = AudioListener({1: HELD, 2: HELD}, slots=3, length=LIMIT)
    result = busy.transcribe(levels(tiny_bundle, [0, 1, 0, 0, 0, 0, 0, 0, 0, 2]), RATE)
    assert [note.onset for note in result.notes] == pytest.approx([2.04 + 0.1, 18.43 + 0.1])
    assert busy.backend.counts == [1, 1]


# ---- cases by hand --------------------------------------------------------------------------------------------------


def test_a_held_note_ends_where_silence_begins(tiny_bundle):
    busy = listener(tiny_bundle, {1: HELD, 2: GOES_ON, 3: GOES_ON}, silence=DIGITAL)
    result = busy.transcribe(levels(tiny_bundle, [1, 2, 0, 3]), RATE)
    assert [(note.onset, note.offset) for note in result.notes] == [(0.1, 4.09)]
    assert result.provenance.invalid_events == 1  # the tie after the silence has no note to hold


def test_silence_alone_asks_no_network(bundle):
    size = bundle.manifest.features.segment_samples
    busy = listener(bundle, {}, silence=DIGITAL)
    samples, done = np.zeros(20 * size - 500, np.float32), []
    result = busy.transcribe(samples, RATE, progress=lambda *step: done.append(step))
    assert (result.notes, result.warnings) == ((), ("no notes were found",))
    assert result.provenance.silent_segments == tuple(range(20))
    assert (result.provenance.tokens, result.provenance.stage_seconds["encode"]) == (0, 0)
    assert [count for count, _ in done] == list(range(1, 21))
    with busy.live() as live:
        live.open("a", RATE)
        live.feed("a", samples[: size + 1])
        [(_, segment)] = live.drain()
        assert (segment.status, segment.is_silent, segment.notes) == ("ended", True, ())
        assert live.is_idle
        assert live.backlog("a") == 0
    assert busy.backend.calls == []


def test_a_quiet_segment_is_silent_below_the_level_only(tiny_bundle):
    loud = 20 * math.log10(STEP)  # of script 1
    for level, silent in ((loud + 0.1, (0,)), (loud - 0.1, ())):
        busy = listener(tiny_bundle, {1: HELD, 2: HELD}, silence=SilenceRule(level))
        result = busy.transcribe(levels(tiny_bundle, [1, 2]), RATE)
        assert result.provenance.silent_segments == silent
        assert result.provenance.skip_silence == f"{level:g} dBFS"
        assert len(result.notes) == 2 - len(silent)


def test_silence_that_ends_in_the_last_sample_is_heard(tiny_bundle):
    samples = np.zeros(32_768, np.float32)
    samples[-1] = STEP
    busy = listener(tiny_bundle, {0: [TIE, END]}, silence=DIGITAL)
    result = busy.transcribe(samples, RATE)
    assert (result.provenance.segments, result.provenance.silent_segments) == (2, (1,))


def test_silence_after_a_failure_is_told_nothing_and_tells_the_next(memory_bundle):  # noqa: F811
    busy = listener(memory_bundle, {1: [TIE, math.nan], 2: HELD}, silence=DIGITAL)
    result = busy.transcribe(levels(memory_bundle, [1, 0, 2]), RATE)
    assert admitted(busy)[-1][1][:5] == (0, TIE, END, 0, 0)
    assert result.provenance.memory_restarts == ()
    assert result.provenance.failed_segments == (0,)


def test_a_file_that_is_spoiled_behind_its_silence(tiny_bundle, tmp_path):
    spoiled = np.concatenate([silence(40), [np.nan]]).astype(np.float32)
    files = [write(tmp_path / "a.wav", spoiled), write(tmp_path / "b.wav", levels(tiny_bundle, [0, 1]))]
    busy = listener(tiny_bundle, {1: HELD}, silence=DIGITAL, slots=30)
    found = dict(busy.transcribe_many(files))
    assert isinstance(found[0], AudioError)
    assert [note.onset for note in found[1].notes] == pytest.approx([2.04 + 0.1])
    given, stream_ = [], busy.iter_segments(files[0])
    with pytest.raises(AudioError, match="NaN"):
        given.extend(stream_)
    assert [segment.index for segment in given] == list(range(len(given)))
    assert len(given) > 20


def test_rows_that_are_known_take_no_slot(tiny_bundle):
    busy = listener(tiny_bundle, {5: [7, 8, END]}, slots=1)
    said = np.array([TIE], np.int32)
    rows = [Row(0, None, known=said), Row(5, np.full((1, 1), 5, np.float32)), Row(1, None, known=said)]
    decoded = {row.key: row for row in decode_rows(busy.backend, rows, busy.rules)}
    assert {key: (row.tokens.tolist(), row.status) for key, row in decoded.items()} == {
        0: ([TIE], "ended"), 5: ([7, 8], "ended"), 1: ([TIE], "ended"),
    }  # fmt: skip
    assert decoded[0].log_probs.tolist() == [0.0]
    assert decoded[0].seconds == 0
    assert sum(isinstance(call, Stepped) for call in busy.backend.calls) == 3


def test_rows_that_are_known_leave_free_slots_to_others(tiny_bundle):
    busy = listener(tiny_bundle, {5: [7, 8, END], 6: [9, 8, END]}, slots=2)
    said = np.array([TIE], np.int32)
    loud = [Row(key, np.full((1, 1), key, np.float32)) for key in (5, 6)]
    rows = [Row(0, None, known=said), loud[0], Row(1, None, known=said), loud[1]]
    assert {row.key for row in decode_rows(busy.backend, rows, busy.rules)} == {0, 1, 5, 6}
    assert sum(isinstance(call, Stepped) for call in busy.backend.calls) == 3  # side by side from the first


def test_a_long_silence_is_told_bit_by_bit(tiny_bundle):
    busy = listener(tiny_bundle, {}, slots=2)
    said, drawn = np.array([TIE], np.int32), []
    rows = (drawn.append(key) or Row(key, None, known=said) for key in range(1000))
    first = next(decode_rows(busy.backend, rows, busy.rules))
    assert first.key == 0
    assert len(drawn) <= 64
    assert len(list(decode_rows(busy.backend, (Row(key, None, known=said) for key in range(1000)), busy.rules))) == 1000


# ---- the default: what the demo model says of silence ---------------------------------------------------------------


def test_the_demo_model_says_of_silence_what_the_rule_says():
    """Of full segments, and of those of which only so many frames are real; the rest is padding."""
    busy = load(threads=1)
    features, frames = busy.bundle.manifest.features, [256, 255, 97, 2, 1]
    samples = np.zeros((len(frames), features.segment_samples), np.float32)
    states = busy.backend.encode(busy.extractor(samples, frames))
    rows = (Row(index, own[0].copy()) for index, own in enumerate(states))
    decoded = list(decode_rows(busy.backend, rows, busy.rules))
    assert [row.tokens.tolist() for row in decoded] == [silent_tokens(busy.vocabulary)] * len(frames)
    assert {row.status for row in decoded} == {"ended"}


# ---- options --------------------------------------------------------------------------------------------------------


def test_load_takes_a_rule_and_skips_digital_silence_by_default(tiny_folder):
    assert load(tiny_folder, threads=1).silence == DIGITAL
    assert load(tiny_folder, threads=1, skip_silence=-72).silence == SilenceRule(-72.0)
    with pytest.raises(OptionError, match="is no rule"):
        load(tiny_folder, skip_silence="loud")


def test_the_command_says_how_much_was_silent(capsys, tmp_path):
    path, out = tmp_path / "a.wav", tmp_path / "a.json"
    rng = np.random.default_rng(0)
    soundfile.write(path, np.concatenate([np.zeros(4 * RATE), 0.3 * rng.normal(size=RATE // 4)]), RATE)
    command = ["transcribe", str(path), "-o", str(tmp_path / "a.mid"), "--json", str(out), "--device", "cpu"]
    for options, silent, rule in (((), [0], "digital"), (("--skip-silence", "off"), [], "off")):
        assert cli.main([*command, *options]) == 0
        summary = capsys.readouterr().err.splitlines()[0]
        assert summary.endswith(", 1 of 3 segments silent" if silent else "x real time, cpu)")
        provenance = json.loads(out.read_text())["provenance"]
        assert (provenance["silent_segments"], provenance["skip_silence"]) == (silent, rule)


def test_a_level_on_the_command_line(monkeypatch, capsys):
    numbers = np.zeros(3 * RATE, "<i2")
    numbers[::100] = 2  # a peak of -84.3 dBFS
    for level, silent in (("-84", [True, True]), ("-85", [False, False])):
        code, lines, _ = stream(monkeypatch, capsys, numbers.tobytes(), "--rate", RATE, "--skip-silence", level)
        assert code == 0
        assert [line["is_silent"] for line in lines] == silent
        assert [line["notes"] for line in lines] == [[], []]


@pytest.mark.parametrize(("asked", "reason"), [("quiet", "is no rule"), ("0", "give one below 0")])
def test_a_wrong_rule_on_the_command_line(capsys, asked, reason):
    with pytest.raises(SystemExit) as raised:
        cli.main(["transcribe", "a.wav", "--skip-silence", asked])
    assert raised.value.code == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
