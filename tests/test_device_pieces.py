"""Whole pieces of audio through launches: files, many files, songs with memory and live streams, as step by step."""

from __future__ import annotations

import numpy as np
import pytest

from mt3_runtime import bench
from mt3_runtime.backends.scripted_device import Launched, ScriptedDevice
from mt3_runtime.bench_lengths import bench_lengths
from mt3_runtime.errors import DeviceError, DeviceLostError, OutOfMemoryError
from mt3_runtime.transcriber import Transcriber
from scripted_audio import RATE, Listener, levels, listener, write
from test_live import scripts, side_by_side
from test_song_memory import memories, memory_bundle, order  # noqa: F401
from test_song_memory import scripts as song_scripts

CHUNKS = [1, 4, 16]


class DeviceListener(Listener, ScriptedDevice):
    """A device that hears what `Listener` hears."""


def on_device(bundle, rows, chunk, *, slots=3):
    model = bundle.manifest.model
    backend = DeviceListener(rows, slots=slots, length=model.max_length, channels=model.channels, chunk=chunk)
    busy = Transcriber(bundle, backend, name="scripts")
    busy.extractor = lambda samples, frames: samples[:, :1, None]
    return busy


def told(segments):
    return [(s.index, s.start, s.notes, s.status, s.is_last) for s in segments]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_one_piece(tiny_bundle, chunk, slots):
    samples = levels(tiny_bundle, range(1, 14))
    device, steps = on_device(tiny_bundle, scripts(), chunk, slots=slots), listener(tiny_bundle, scripts(), slots=slots)
    assert told(device.iter_segments(samples, RATE)) == told(steps.iter_segments(samples, RATE))
    one, other = (each.transcribe(samples, RATE) for each in (device, steps))
    assert (one.notes, one.warnings) == (other.notes, other.warnings)
    assert one.provenance.failed_segments == other.provenance.failed_segments == (8,)
    assert one.provenance.truncated_segments == (6,)
    assert one.provenance.tokens == other.provenance.tokens


@pytest.mark.parametrize("chunk", CHUNKS)
def test_channels(channels_bundle, chunk):
    samples = levels(channels_bundle, range(5), cut=0)
    rows = {row: [60 + row] * (row % 4 + 1) + [1] for row in range(15)}
    device, steps = on_device(channels_bundle, rows, chunk, slots=4), listener(channels_bundle, rows, slots=4)
    assert told(device.iter_segments(samples, RATE)) == told(steps.iter_segments(samples, RATE))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("slots", [1, 2, 8])
def test_many_songs_with_memory(memory_bundle, tmp_path, chunk, slots):  # noqa: F811
    lengths = dict(enumerate(np.random.default_rng(5).integers(0, 25, 30).tolist()))
    songs = [range(first, first + count) for first, count in ((0, 7), (7, 1), (8, 9), (17, 3), (20, 6), (26, 4))]
    files = [write(tmp_path / f"{index}.wav", levels(memory_bundle, song)) for index, song in enumerate(songs)]
    files.insert(2, tmp_path / "missing.wav")
    device = on_device(memory_bundle, song_scripts(lengths), chunk, slots=slots)
    steps = listener(memory_bundle, song_scripts(lengths), slots=slots)
    found, other = (dict(each.transcribe_many(files)) for each in (device, steps))
    assert "does not exist" in str(found.pop(2))
    assert [found[index].notes for index in sorted(found)] == [other[index].notes for index in sorted(found)]
    assert memories(device) == memories(steps)
    assert sorted(order(device)) == list(range(30))
    assert not any(getattr(call, "ahead", False) for call in device.backend.launches)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_live_streams_side_by_side(tiny_bundle, chunk):
    songs = {name: range(1 + 6 * at, 7 + 6 * at - at) for at, name in enumerate("abcdef")}
    audio = {name: levels(tiny_bundle, numbers) for name, numbers in songs.items()}
    device, steps = on_device(tiny_bundle, scripts(), chunk), listener(tiny_bundle, scripts())
    found = side_by_side(device, audio)
    for name, samples in audio.items():
        assert told(found[name]) == told(steps.iter_segments(samples, RATE))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_stream_that_is_dropped_in_the_middle_of_a_launch(tiny_bundle, chunk):
    device = on_device(tiny_bundle, {1: [3] * 90, 2: [1134, 1133, 1303, *[3] * 60, 1]}, chunk)
    with device.live() as live:
        for name, number in (("gone", 1), ("here", 2)):
            live.open(name, RATE)
            live.feed(name, levels(tiny_bundle, [number], cut=0))
        assert live.advance() == []
        live.drop("gone")
        found = list(live.drain())
    assert [(name, [note.pitch for note in segment.notes]) for name, segment in found] == [("here", [40])]


# ---- a device that fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["encode", "admit", "launch", "collect"])
@pytest.mark.parametrize("kind", [DeviceLostError, OutOfMemoryError, DeviceError])
def test_a_device_that_fails_ends_everything_and_is_no_fault_of_a_file(tiny_bundle, tmp_path, place, kind):
    files = [write(tmp_path / f"{index}.wav", levels(tiny_bundle, [index, index + 10])) for index in range(1, 6)]
    device = on_device(tiny_bundle, scripts(), 4, slots=2)
    work, calls = getattr(device.backend, place), []

    def failing(*arguments):
        calls.append(place)
        if len(calls) > 2:
            raise kind("the device has failed: start again")
        return work(*arguments)

    setattr(device.backend, place, failing)
    with pytest.raises(kind, match="start again"):
        list(device.transcribe_many(files))
    assert len(calls) == 3
    setattr(device.backend, place, work)
    assert device.transcribe(levels(tiny_bundle, [3]), RATE).notes


# ---- the benchmark ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_a_device_is_timed_in_launches(tiny_bundle, chunk):
    """Every way to decode that the benchmark has, with exactly the launches that its steps need."""
    device = on_device(tiny_bundle, dict.fromkeys(range(4), [5] * 96), chunk, slots=2)
    states = device.backend.encode(np.zeros((1, 1, 1), np.float32))[0][0]
    assert bench._decode(device.backend, states, 2, 9, tiny_bundle.manifest.model) > 0
    launches = [call for call in device.backend.launches if isinstance(call, Launched)]
    assert sum(call.steps for call in launches) == 9
    assert all(call.ahead == bool(index) for index, call in enumerate(launches))
    result = bench_lengths(device.backend, [states] * 4, tiny_bundle.manifest.model, (9, 2), repeat=1)
    assert (result["given"]["rows"], result["given"]["row_steps"], result["all_long"]["row_steps"]) == (4, 22, 36)
