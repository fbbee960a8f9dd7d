"""Many files through one scheduler: each as if it were alone, and none at another's expense."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bundle_cases import no_open_files_left
from mt3_runtime import stopwatch
from mt3_runtime.audio import open_audio
from mt3_runtime.backends.scripted import Stepped
from mt3_runtime.errors import AudioError, Mt3Error, OptionError
from mt3_runtime.loading import load
from mt3_runtime.transcription import Transcription
from scripted_audio import RATE, chords, levels, listener, write

END, TIE = 1, 1134
ROWS = 60


def drum(number):
    return 1263 + number


def velocity(bin_):
    return 1132 + bin_


def scripts():
    """Rows of many lengths; row k is a drum of its own, some never end and one fails twice."""
    lengths = np.random.default_rng(8).integers(0, 40, ROWS).tolist()
    rows = {key: [TIE, velocity(1), drum(20 + key), *[3] * lengths[key], END] for key in range(1, ROWS)}
    return rows | {7: [TIE, velocity(1), *[3] * 200], 11: [TIE, velocity(1), drum(31), float("nan")], 12: [END]}


@pytest.fixture
def files(tmp_path, tiny_bundle):
    """Writes a file of segments with these numbers."""

    def make(name, numbers):
        return write(tmp_path / f"{name}.wav", levels(tiny_bundle, numbers))

    return make


def songs(files, tiny_bundle):
    """Five pieces, of which one is in memory."""
    numbers = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10], [11, 12], [13, 14, 15, 16], [17, 18, 19, 20, 21, 22]]
    sources = [files(f"song{index}", row) for index, row in enumerate(numbers)]
    sources[3] = (levels(tiny_bundle, numbers[3]), RATE)
    return sources


def alone(busy, source):
    return busy.transcribe(*source) if isinstance(source, tuple) else busy.transcribe(source)


def plain(result):
    """A result without its times."""
    provenance = replace(result.provenance, stage_seconds={}, real_time_factor=0.0)
    return replace(result, provenance=provenance)


def results(busy, sources, **options):
    found = dict(busy.transcribe_many(sources, **options))
    assert sorted(found) == list(range(len(found)))
    return found


def pitches(result):
    return [note.pitch for note in result.notes]


# ---- as if alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 40])
def test_each_result_is_that_of_the_file_alone(tiny_bundle, files, slots):
    sources = songs(files, tiny_bundle)
    busy = listener(tiny_bundle, scripts(), slots=slots)
    found = results(busy, sources)
    assert len(found) == 5
    for index, source in enumerate(sources):
        assert plain(found[index]) == plain(alone(busy, source))
    assert pitches(found[0]) == [21, 22, 23, 24, 25, 26, 28, 29]
    assert found[0].provenance.truncated_segments == (6,)
    assert found[2].provenance.failed_segments == (0,)
    assert pitches(found[4]) == list(range(37, 43))


def test_results_come_as_they_are_finished(tiny_bundle, files):
    busy = listener(tiny_bundle, {1: [TIE, *[3] * 50, END], 2: [END], 3: [3, END]}, slots=3)
    sources = [files("slow", [1]), files("quick", [2]), files("third", [3])]
    assert [index for index, _ in busy.transcribe_many(sources)] == [1, 2, 0]


def test_a_real_network_gives_each_file_its_own_result(musical_folder, tmp_path):
    """The order is the worst: every file has rows beside those of others, and a broken one is among them."""
    clips = [chords(seconds, seed) for seed, seconds in enumerate([3, 7, 4, 5])]
    sources = [write(tmp_path / f"{index}.wav", clip) for index, clip in enumerate(clips)]
    sources.insert(2, tmp_path / "missing.wav")
    sources[3] = (clips[2], RATE)
    busy = load(musical_folder, slots=5, threads=1)
    found = results(busy, sources)
    assert isinstance(found.pop(2), AudioError)
    for index, result in found.items():
        wanted = alone(busy, sources[index])
        assert len(wanted.notes) > 2
        for note, other in zip(result.notes, wanted.notes, strict=True):
            assert replace(note, confidence=None) == replace(other, confidence=None)
            assert note.confidence == pytest.approx(other.confidence, abs=1e-4)
        assert plain(result).provenance == plain(wanted).provenance


# ---- slots and files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_every_slot_is_busy_until_the_queue_is_empty(tiny_bundle, files, slots):
    busy = listener(tiny_bundle, scripts(), slots=slots)
    results(busy, songs(files, tiny_bundle))
    live = [len(call.keys) for call in busy.backend.calls if isinstance(call, Stepped)]
    drain = next((index for index, count in enumerate(live) if count < slots), len(live))
    assert live[:drain] == [slots] * drain
    assert drain > len(live) / 3
    assert sorted(live[drain:], reverse=True) == live[drain:]


@pytest.mark.parametrize("slots", [1, 3])
def test_sources_are_taken_only_when_slots_are_free(tiny_bundle, files, slots):
    path = files("song", [2, 3])
    busy, taken, done = listener(tiny_bundle, scripts(), slots=slots), 0, 0

    def sources():
        nonlocal taken
        for _ in range(30):
            taken += 1
            yield path

    stream = busy.transcribe_many(sources())
    assert taken == 0
    for _ in stream:
        done += 1
        assert taken <= done + slots
    assert (taken, done) == (30, 30)


def test_one_file_is_open_at_a_time(tiny_bundle, files, monkeypatch):
    opened, most = 0, 0

    @contextmanager
    def counting(*arguments, **options):
        nonlocal opened, most
        with open_audio(*arguments, **options) as stream:
            opened += 1
            most = max(most, opened)
            yield stream
            opened -= 1

    monkeypatch.setattr("mt3_runtime.reading.open_audio", counting)
    sources = [files(f"song{index}", [2, 3, 5]) for index in range(6)]
    assert len(results(listener(tiny_bundle, scripts(), slots=8), sources)) == 6
    assert (opened, most) == (0, 1)


# ---- files that fail ----------------------------------------------------------------------------------------


def broken(files, tiny_bundle, tmp_path):
    """Sources that fail, by what is wrong: at once, or after their first 16 s have been read."""
    late = levels(tiny_bundle, [30] * 30)
    late[-5] = np.nan
    return {
        "missing": (tmp_path / "missing.wav", "does not exist"),
        "a folder": (tmp_path, "folder"),
        "too short": (write(tmp_path / "short.wav", np.zeros(100)), "100 samples"),
        "spoiled late": (write(tmp_path / "late.wav", late), "NaN or infinite"),
        "samples without a rate": (np.zeros(500, np.float32), "pairs of samples and their rate"),
        "samples with no rate": ((np.zeros(500, np.float32), None), "pass sample_rate"),
        "a triple": ((np.zeros(500), RATE, 3), "pairs of samples"),
        "not finite": ((np.full(500, np.inf), RATE), "NaN or infinite"),
    }


CASES = [
    "missing", "a folder", "too short", "spoiled late", "samples without a rate", "samples with no rate", "a triple",
    "not finite",
]  # fmt: skip


@pytest.mark.parametrize("place", [0, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_a_source_that_fails_gives_its_error_and_harms_no_other(tiny_bundle, files, tmp_path, case, place):
    sources, (bad, words) = songs(files, tiny_bundle), broken(files, tiny_bundle, tmp_path)[case]
    busy = listener(tiny_bundle, scripts(), slots=4)
    wanted = [plain(alone(busy, source)) for source in sources]
    sources.insert(place, bad)
    with no_open_files_left():
        found = results(busy, sources)
    error = found.pop(place)
    assert isinstance(error, Mt3Error)
    assert words in str(error)
    assert [plain(found[index]) for index in sorted(found)] == wanted


@pytest.mark.parametrize("sources", ["a.wav", Path("a.wav"), b"a.wav", 3], ids=str)
def test_one_path_is_no_list_of_paths(tiny_bundle, sources):
    with pytest.raises(OptionError, match=r"is no list of sources: give a list of them, or use transcribe$"):
        next(listener(tiny_bundle, scripts()).transcribe_many(sources))


def test_only_failures(tiny_bundle, files, tmp_path):
    busy = listener(tiny_bundle, scripts())
    bad = broken(files, tiny_bundle, tmp_path)
    found = results(busy, [source for source, _ in bad.values()])
    for error, (_, words) in zip((found[index] for index in range(len(bad))), bad.values(), strict=True):
        assert isinstance(error, Mt3Error)
        assert words in str(error)
    assert results(busy, []) == {}


def test_rows_of_a_file_that_fails_late_leave_their_slots(tiny_bundle, files, tmp_path):
    endless = {30: [TIE, *[3] * 200]}
    late = broken(files, tiny_bundle, tmp_path)["spoiled late"][0]
    busy = listener(tiny_bundle, scripts() | endless | {31: [5, END]}, slots=12)
    found = results(busy, [late, files("good", [31, 31])])
    assert isinstance(found[0], AudioError)
    assert isinstance(found[1], Transcription)
    stepped = [call.keys for call in busy.backend.calls if isinstance(call, Stepped)]
    # 24 rows take all their 96 steps before the reading comes to the spoiled sample; those admitted next take none
    assert len(stepped) == 2 * 96 + 2
    assert stepped[-1] == (31, 31)


def test_an_error_of_the_iterable_comes_out_and_frees_the_transcriber(tiny_bundle, files):
    busy, path = listener(tiny_bundle, scripts(), slots=1), files("song", [2])

    def sources():
        yield path
        raise OSError("list gone")

    with no_open_files_left(), pytest.raises(OSError, match="list gone"):
        list(busy.transcribe_many(sources()))
    assert pitches(busy.transcribe(path)) == [22]


# ---- leaving early --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("leave", [lambda stream: stream.close(), lambda stream: None], ids=["close", "drop"])
def test_an_iterator_that_is_left_leaves_nothing_behind(tiny_bundle, files, count, leave):
    sources = songs(files, tiny_bundle)
    busy = listener(tiny_bundle, scripts(), slots=2)
    wanted = plain(alone(busy, sources[0]))
    with no_open_files_left():
        streams = [busy.transcribe_many([files("first", [1]), files("next", [12]), *sources])]
        for _ in range(count):
            next(streams[0])
        leave(streams.pop())
        assert plain(alone(busy, sources[0])) == wanted


def test_a_busy_transcriber_refuses_its_own_thread(tiny_bundle, files):
    sources = songs(files, tiny_bundle)
    busy = listener(tiny_bundle, scripts())
    stream = busy.transcribe_many(sources)
    next(stream)
    for call in (lambda: busy.transcribe(sources[1]), lambda: next(busy.transcribe_many(sources))):
        with pytest.raises(OptionError, match=r"let it finish, or close its iterator first$"):
            call()
    assert len(list(stream)) == 4


def test_threads_wait_for_their_turn(tiny_bundle, files):
    sources = songs(files, tiny_bundle)
    busy, barrier = listener(tiny_bundle, scripts()), threading.Barrier(3)

    def run(_):
        barrier.wait()
        return {index: plain(result) for index, result in busy.transcribe_many(sources)}

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    assert found[0] == found[1] == found[2]


# ---- progress and seconds -----------------------------------------------------------------------------------


def test_progress_tells_which_source_and_how_far(tiny_bundle, files):
    told = []
    sources = songs(files, tiny_bundle)
    results(listener(tiny_bundle, scripts(), slots=4), sources, progress=lambda *step: told.append(step))
    for index, count in enumerate([9, 1, 2, 4, 6]):
        assert [step[1:] for step in told if step[0] == index] == [(done + 1, count) for done in range(count)]


def test_the_seconds_of_all_files_add_up_to_the_whole(tiny_bundle, files, monkeypatch):
    """Every call takes its time on a clock that stands still otherwise."""
    now = 0.0
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now)

    def costs(seconds, call):
        def slow(*arguments):
            nonlocal now
            now += seconds
            return call(*arguments)

        return slow

    busy = listener(tiny_bundle, scripts(), slots=4)
    busy.extractor = costs(3, busy.extractor)
    for name, seconds in {"encode": 16, "admit": 0.5, "step": 1, "move": 0.25}.items():
        monkeypatch.setattr(busy.backend, name, costs(seconds, getattr(busy.backend, name)))
    found = results(busy, songs(files, tiny_bundle))
    spent = [result.provenance.stage_seconds for result in found.values()]
    assert sum(sum(stages.values()) for stages in spent) == pytest.approx(now, rel=1e-12)
    groups = [3, 1, 1, 1, 2]  # of four segments at most
    for index, count in enumerate(groups):
        assert found[index].provenance.stage_seconds["features"] == 3 * count
        assert found[index].provenance.stage_seconds["encode"] == 16 * count
    assert all(stages["decode"] > 0 for stages in spent)
    assert all(
        result.provenance.real_time_factor == pytest.approx(sum(stages.values()) / result.duration)
        for result, stages in zip(found.values(), spent, strict=True)
    )
