"""Streams of blocks give what the whole audio gives, as soon as it can be given, beside each other."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mt3_runtime.backends.scripted import Stepped
from mt3_runtime.errors import AudioError, OptionError, SampleError
from mt3_runtime.loading import load
from mt3_runtime.notes import sort_notes
from scripted_audio import RATE, SEGMENT, chords, levels, listener

END, TIE = 1, 1134
ROWS = 40


def drum(number):
    return 1263 + number


def scripts():
    """Row k is a drum of its own; they end after 4 to 30 tokens, one never, one fails twice."""
    lengths = np.random.default_rng(3).integers(0, 26, ROWS).tolist()
    rows = {key: [TIE, 1133, drum(20 + key), *[3] * lengths[key], END] for key in range(ROWS)}
    return rows | {7: [TIE, 1133, *[3] * 200], 9: [TIE, 1133, drum(31), float("nan")]}


def blocks_of(samples, seed):
    """The samples in blocks of random lengths, empty ones among them."""
    rng, first = np.random.default_rng(seed), 0
    while first < len(samples):
        length = int(rng.choice([0, 1, 100, 5_000, 40_000, 150_000]))
        yield samples[first : first + length]
        first += length


def exact(notes):
    return sort_notes(notes)


def near(notes):
    """Without the last digits of confidences, which may depend on how many segments were encoded together."""
    return [(n.onset, n.offset, n.pitch, n.velocity, n.program, n.is_drum, round(n.confidence, 4)) for n in notes]


# ---- the notes of the whole audio -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_gives_the_notes_of_the_whole(tiny_bundle, seed):
    samples = levels(tiny_bundle, range(1, 14), cut=[500, 0, 32_767, 128][seed])
    busy = listener(tiny_bundle, scripts(), slots=3)
    whole = busy.transcribe(samples, RATE)
    segments = list(busy.stream(blocks_of(samples, seed), RATE))
    assert exact([note for segment in segments for note in segment.notes]) == list(whole.notes)
    assert [segment.index for segment in segments] == list(range(whole.provenance.segments))
    assert [segment.is_last for segment in segments] == [False] * (len(segments) - 1) + [True]
    assert [segment.status for segment in segments][6:9] == ["truncated", "ended", "failed"]
    assert [segment.start for segment in segments] == [each.start for each in busy.iter_segments(samples, RATE)]


@pytest.mark.parametrize("rate", [16_000, 44_100, 22_050])
def test_a_real_network_hears_the_same_at_any_rate(musical_folder, rate):
    audio = chords(9.5, seed=1, rate=rate)
    stereo = np.stack([audio, 0.5 * audio], axis=1)
    busy = load(musical_folder, slots=3, threads=1)
    whole = busy.transcribe(stereo, rate)
    streamed = [note for each in busy.stream(blocks_of(stereo, seed=rate), rate) for note in each.notes]
    assert near(sort_notes(streamed)) == near(whole.notes)
    assert len(streamed) > 10


def test_channels_are_streamed_too(channels_bundle):
    samples = levels(channels_bundle, range(5), cut=0)
    busy = listener(channels_bundle, {row: [60 + row, END] for row in range(15)}, slots=4)
    whole = list(busy.iter_segments(samples, RATE))
    streamed = list(busy.stream(blocks_of(samples, seed=2), RATE))
    assert [(each.index, each.notes, each.is_last) for each in streamed] == [
        (each.index, each.notes, each.is_last) for each in whole
    ]
    assert len(streamed) == 5


@pytest.mark.parametrize("kind", ["int16", "float64", "uint8"])
def test_blocks_of_other_types(tiny_bundle, kind):
    samples = levels(tiny_bundle, [1, 2, 3])
    scale, centre = {"int16": (2**15, 0), "float64": (1, 0), "uint8": (128, 128)}[kind]
    numbers = [32, 64, 96]  # levels that eight bits hold
    samples = levels(tiny_bundle, numbers)
    busy = listener(tiny_bundle, {n: [TIE, 1133, drum(n - 10), END] for n in numbers})
    found = [n.pitch for s in busy.stream([(samples * scale + centre).astype(kind)], RATE) for n in s.notes]
    assert found == [22, 54, 86]


# ---- as soon as it can be given -------------------------------------------------------------------------


def test_a_segment_is_given_before_the_next_block_is_asked_for(tiny_bundle):
    asked = []

    def blocks():
        for number in range(1, 5):
            asked.append(number)
            yield levels(tiny_bundle, [number], cut=0)

    busy = listener(tiny_bundle, scripts())
    given = [(segment.index, len(asked)) for segment in busy.stream(blocks(), RATE)]
    assert given == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4)]  # after the last sample comes a segment of zeros


def test_segments_of_one_block_are_decoded_side_by_side(tiny_bundle):
    busy = listener(tiny_bundle, scripts(), slots=4)
    list(busy.stream([levels(tiny_bundle, [1, 2, 3, 4], cut=0)], RATE))
    assert max(len(call.keys) for call in busy.backend.calls if isinstance(call, Stepped)) == 4


def test_an_error_of_a_block_comes_after_the_segments_before_it(tiny_bundle):
    busy = listener(tiny_bundle, scripts())
    blocks = [levels(tiny_bundle, [1, 2], cut=0), np.full(10, np.nan, np.float32)]
    stream, found = busy.stream(blocks, RATE), []
    with pytest.raises(AudioError, match="NaN"):
        found.extend(segment.index for segment in stream)
    assert found == [0, 1, 2]  # the last one ends what sounds
    assert busy.transcribe(levels(tiny_bundle, [3]), RATE).notes


@pytest.mark.parametrize(
    ("bad", "reason"), [(np.nan, "NaN or infinite"), (-np.inf, "NaN or infinite"), (2e12, r"reaches 1e\+12")]
)
@pytest.mark.parametrize("first", [170_000, 300_001])
def test_the_samples_before_one_that_is_no_sound_count(musical_folder, bad, reason, first):
    """Whatever block it is in, and wherever a long one is taken in parts."""
    stereo = np.stack([chords(9.5, seed=2, rate=44_100)] * 2, axis=1).astype(np.float32)
    busy = load(musical_folder, slots=3, threads=1)
    whole = near(busy.transcribe(stereo[:first], 44_100).notes)
    assert len(whole) > 3
    stereo[first, 1], stereo[first + 1] = bad, np.nan
    for blocks in ([stereo], [stereo[:99_999], stereo[99_999:].tolist()], blocks_of(stereo, seed=first)):
        found = []
        with pytest.raises(SampleError, match=reason):
            found.extend(note for segment in busy.stream(blocks, 44_100) for note in segment.notes)
        assert near(sort_notes(found)) == whole


def test_an_error_of_the_source_is_the_callers_own(tiny_bundle):
    def blocks():
        yield np.zeros(100, np.float32)
        raise ConnectionError("gone")

    busy = listener(tiny_bundle, scripts())
    with pytest.raises(ConnectionError, match="gone"):
        list(busy.stream(blocks(), RATE))
    assert busy.transcribe(levels(tiny_bundle, [3]), RATE).notes


def test_too_little_audio_is_refused_as_it_is_offline(tiny_bundle):
    busy = listener(tiny_bundle, scripts())
    for blocks in ([], [np.zeros(127, np.float32)]):
        with pytest.raises(AudioError, match="fewer than 128"):
            list(busy.stream(blocks, RATE))


def side_by_side(transcriber, audio):
    """The segments of streams by name, all of them fed in random blocks in turn."""
    found = {name: [] for name in audio}
    with transcriber.live() as live:
        sources = {name: blocks_of(samples, seed=index) for index, (name, samples) in enumerate(audio.items())}
        for name in audio:
            live.open(name, RATE)
        while sources or not live.is_idle:
            for name in list(sources):
                block = next(sources[name], None)
                if block is None:
                    live.end(name)
                    del sources[name]
                else:
                    live.feed(name, block)
            for name, segment in live.advance():
                found[name].append(segment)
    return found


# ---- many streams ---------------------------------------------------------------------------------------


def test_streams_fill_the_slots_side_by_side(tiny_bundle):
    """Six streams in random blocks, three slots: each as if alone, in order, and the slots are full."""
    songs = {name: range(1 + 6 * at, 7 + 6 * at - at) for at, name in enumerate("abcdef")}
    audio = {name: levels(tiny_bundle, numbers) for name, numbers in songs.items()}
    busy = listener(tiny_bundle, scripts(), slots=3)
    whole = {name: list(busy.iter_segments(samples, RATE)) for name, samples in audio.items()}
    busy.backend.calls.clear()
    found = side_by_side(busy, audio)
    for name in songs:
        assert [(s.index, s.start, s.notes, s.status, s.is_last) for s in found[name]] == [
            (s.index, s.start, s.notes, s.status, s.is_last) for s in whole[name]
        ]
    widths = [len(call.keys) for call in busy.backend.calls if isinstance(call, Stepped)]
    assert sum(width == 3 for width in widths) > len(widths) / 2


def test_a_long_block_keeps_nobody_waiting(tiny_bundle):
    busy = listener(tiny_bundle, {key: [TIE, *[3] * 20, END] for key in range(20)}, slots=2)
    with busy.live() as live:
        for name in ("long", "short"):
            live.open(name, RATE)
        live.feed("long", levels(tiny_bundle, range(12)))
        live.feed("short", levels(tiny_bundle, [15], cut=0))
        order = [name for name, _ in live.drain()]
    assert order.index("short") <= 1


def test_a_stream_that_is_dropped_gives_nothing_and_disturbs_nobody(tiny_bundle):
    busy = listener(tiny_bundle, {1: [TIE, *[3] * 30, END], 2: [TIE, 1133, drum(40), *[3] * 30, END]})
    with busy.live() as live:
        for name, number in (("gone", 1), ("here", 2)):
            live.open(name, RATE)
            live.feed(name, levels(tiny_bundle, [number], cut=0))
        for _ in range(5):
            assert live.advance() == []
        live.drop("gone")
        found = list(live.drain())
        live.open("gone", RATE)  # the name is free
    assert [(name, [note.pitch for note in segment.notes]) for name, segment in found] == [("here", [40])]


def test_a_name_is_free_when_its_last_segment_was_given(tiny_bundle):
    busy = listener(tiny_bundle, scripts())
    with busy.live() as live:
        found = []
        for numbers in ([1, 2], [3]):
            live.open("again", RATE)
            live.feed("again", levels(tiny_bundle, numbers))
            live.end("again")
            with pytest.raises(OptionError, match="'again' is open already: take its last segment"):
                live.open("again", RATE)
            for call in (live.end, lambda key: live.feed(key, [0.0])):
                with pytest.raises(OptionError, match="'again' has ended"):
                    call("again")
            found += [(segment.index, segment.is_last, segment.notes[0].pitch) for _, segment in live.drain()]
        live.open("again", RATE)
        live.feed("again", levels(tiny_bundle, [4, 5]))
        live.end("again")
        live.drop("again")  # its tail is not wanted
        assert live.advance() == []
        assert live.is_idle
    assert found == [(0, False, 21), (1, True, 22), (0, True, 23)]


def test_the_backlog_tells_who_falls_behind(tiny_bundle):
    busy = listener(tiny_bundle, scripts(), slots=2)
    with busy.live() as live:
        live.open("a", RATE)
        assert live.backlog("a") == 0
        live.feed("a", levels(tiny_bundle, [1, 2, 3, 4, 5], cut=0))
        counts = [live.backlog("a")]
        while not live.is_idle:
            counts += [live.backlog("a")] * len(live.advance())
        assert counts[0] == 5
        assert counts == sorted(counts, reverse=True)
        assert live.backlog("a") == 0


# ---- what can go wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["encode", "admit", "step", "notes"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
def test_after_an_error_nothing_goes_on_as_if_nothing_had_been(tiny_bundle, place, error):
    busy = listener(tiny_bundle, scripts(), slots=2)

    def failing(*_, **__):
        raise error("no more")

    with busy.live() as live:
        for name, number in (("a", 1), ("b", 2)):
            live.open(name, RATE)
            live.feed(name, levels(tiny_bundle, [number, number], cut=0))
        live.advance()
        kept = None if place == "notes" else getattr(busy.backend, place)
        if place == "notes":
            live._pieces[0].piece._state.decode_segment = failing
        else:
            setattr(busy.backend, place, failing)
        live.feed("a", levels(tiny_bundle, [3], cut=0))
        with pytest.raises(error, match="no more"):
            list(live.drain())
        if kept:
            setattr(busy.backend, place, kept)
        assert live.is_idle  # no loop goes on for ever
        for call in (live.advance, lambda: live.open("c", RATE), lambda: live.end("a"), lambda: live.backlog("a")):
            with pytest.raises(OptionError, match=f"lost to an error .{error.__name__}.*begin another"):
                call()
    assert [note.pitch for note in busy.transcribe(levels(tiny_bundle, [3]), RATE).notes] == [23]


def test_streams_end_with_their_block(tiny_bundle):
    busy = listener(tiny_bundle, scripts())
    with busy.live() as live:
        live.open("a", RATE)
        live.feed("a", levels(tiny_bundle, [1], cut=0))
    assert live.is_idle
    for call in (live.advance, lambda: live.feed("a", [0.0]), lambda: live.open("b", RATE)):
        with pytest.raises(OptionError, match=r"block of live\(\) has ended"):
            call()


def test_streams_belong_to_one_thread(tiny_bundle):
    busy, refused = listener(tiny_bundle, scripts()), []
    with busy.live() as live:
        live.open("a", RATE)

        def meddle():
            for call in (live.advance, lambda: live.feed("a", [0.0]), lambda: live.end("a")):
                with pytest.raises(OptionError, match="another thread: hand it the blocks through a queue"):
                    call()
                refused.append(call)

        thread = threading.Thread(target=meddle)
        thread.start()
        thread.join()
        live.feed("a", levels(tiny_bundle, [1], cut=0))
        assert [segment.index for _ in range(40) for _, segment in live.advance()] == [0]
    assert len(refused) == 3


def test_misuse_is_refused_and_nothing_is_lost(tiny_bundle):
    busy = listener(tiny_bundle, scripts())
    samples = levels(tiny_bundle, [1, 2], cut=0)
    with busy.live() as live:
        live.open("a", RATE)
        with pytest.raises(OptionError, match="'a' is open already: take"):
            live.open("a", RATE)
        with pytest.raises(AudioError, match="rate 'x': give a whole number"):
            live.open("b", "x")
        with pytest.raises(AudioError, match="4000 Hz"):
            live.open("b", 4000)
        for call in (live.end, live.drop, lambda key: live.feed(key, samples)):
            with pytest.raises(OptionError, match="no stream 'b' is open: open it first"):
                call("b")
        live.feed("a", np.zeros((0, 5)))  # nothing, whatever its shape
        live.feed("a", [])
        live.feed("a", samples[:70])
        bad = samples.copy()
        bad[-1] = np.inf
        for block, reason in (
            (bad, "NaN or infinite"),
            (2e12 * (1 + samples), r"stream 'a' reaches 2e\+12, which is no sound: scale it to -1\.\.1"),
            (np.stack([samples, samples], 1), "2 channels after 1"),
            (np.zeros((4, 9), np.float32), "9 channels, not 1 to 8"),
            (np.array(["x"]), "of type"),
            ([[1.0], [1.0, 2.0]], "ragged"),
        ):
            with pytest.raises(AudioError, match=reason):
                live.feed("a", block)
        live.feed("a", samples[70:])
        live.end("a")
        found = [segment.notes for _, segment in live.drain()]
    assert [note.pitch for notes in found for note in notes][:2] == [21, 22]


def test_a_transcriber_is_busy_while_it_listens(tiny_bundle):
    busy = listener(tiny_bundle, scripts())
    samples = levels(tiny_bundle, [1])
    with busy.live(), pytest.raises(OptionError, match="in the middle of another"):
        busy.transcribe(samples, RATE)
    stream = busy.stream(iter([levels(tiny_bundle, [1], cut=0), samples]), RATE)
    next(stream)
    done = threading.Event()
    other = threading.Thread(target=lambda: (busy.transcribe(samples, RATE), done.set()))
    other.start()
    assert not done.wait(0.2)
    stream.close()
    other.join(10)
    assert done.is_set()


@pytest.mark.parametrize("script", [[TIE, END], [3] * 96, [TIE, float("nan")]], ids=["ended", "truncated", "failed"])
def test_a_stream_that_never_ends_holds_nothing(tiny_bundle, script):
    """Two hundred segments; at no time are more than those of one block held, nor a list of all that was wrong."""
    busy = listener(tiny_bundle, {0: script}, slots=2)
    segment, given = np.zeros(SEGMENT, np.float32), 0
    with busy.live() as live:
        live.open("radio", RATE)
        piece = live._pieces[0].piece
        for number in range(200):
            live.feed("radio", segment)
            for _, found in live.drain():
                assert found.index == number
                given += 1
            assert not piece.has_rows
            assert not piece._under_way
            busy.backend.calls.clear()
        assert not any(piece._unfinished.segments(status) for status in ("truncated", "failed"))
    assert given == 200
