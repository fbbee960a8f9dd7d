"""Seconds by stage, on a clock that only moves when told to."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from mt3_runtime import reading, stopwatch, transcriber
from mt3_runtime.backends.scripted import Admitted, ScriptedBackend, Stepped
from mt3_runtime.note_decoding import NoteDecoder
from mt3_runtime.stopwatch import Stopwatch


@pytest.fixture
def sleep(monkeypatch):
    """Let seconds pass."""
    now = 1000.0

    def pass_time(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now)
    return pass_time


def test_stages_add_up_over_their_visits_and_the_rest_is_not_counted(sleep):
    clock = Stopwatch()
    sleep(64)
    for seconds in (1, 2):
        with clock.stage("a"):
            sleep(seconds)
        sleep(32)
        with clock.stage("b"):
            sleep(8)
    assert clock.seconds == {"a": 3, "b": 16}


def test_a_stage_inside_another_stops_its_clock(sleep):
    clock = Stopwatch()
    with clock.stage("outer"):
        sleep(1)
        with clock.stage("inner"):
            sleep(2)
            with clock.stage("innermost"):
                sleep(4)
            sleep(8)
        sleep(16)
        with clock.stage("inner"):
            sleep(32)
        sleep(64)
    assert clock.seconds == {"outer": 81, "inner": 42, "innermost": 4}


def test_a_stage_inside_itself_is_counted_once(sleep):
    clock = Stopwatch()
    with clock.stage("a"):
        sleep(1)
        with clock.stage("a"):
            sleep(2)
        sleep(4)
    assert clock.seconds == {"a": 7}


def test_a_stage_that_fails_ends(sleep):
    clock = Stopwatch()

    @clock.stage("outer")
    def fail():
        sleep(1)
        with clock.stage("inner"):
            sleep(2)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    sleep(4)
    with clock.stage("outer"):
        sleep(8)
    assert clock.seconds == {"outer": 9, "inner": 2}


def test_making_items_counts_and_using_them_does_not(sleep):
    clock = Stopwatch()

    def items():
        for item in "abc":
            sleep(1)
            with clock.stage("deeper"):
                sleep(16)
            yield item
        sleep(2)

    used = []
    for item in clock.each("make", items()):
        used.append(item)
        with clock.stage("use"):
            sleep(100)
        sleep(1000)
    assert used == ["a", "b", "c"]
    assert clock.seconds == {"make": 5, "deeper": 48, "use": 300}


def test_items_left_over_and_items_that_fail_leave_no_stage_open(sleep):
    clock = Stopwatch()

    def items():
        sleep(1)
        yield 1
        sleep(2)
        raise OSError("gone")

    abandoned = clock.each("make", items())
    assert next(abandoned) == 1
    abandoned.close()
    sleep(64)
    with pytest.raises(OSError, match="gone"):
        list(clock.each("make", items()))
    sleep(64)
    with clock.stage("other"):
        sleep(8)
    assert clock.seconds == {"make": 4, "other": 8}


def test_an_item_that_says_stop_is_not_the_end_of_the_caller(sleep):
    clock = Stopwatch()
    assert list(clock.each("make", iter([]))) == []
    assert list(clock.each("make", [None, 0, False])) == [None, 0, False]
    assert clock.seconds == {"make": 0}


def test_real_seconds():
    clock = Stopwatch()
    before = time.perf_counter()
    with clock.stage("a"):
        time.sleep(0.02)
        with clock.stage("b"):
            time.sleep(0.03)
    wall = time.perf_counter() - before
    assert clock.seconds["a"] >= 0.02
    assert clock.seconds["b"] >= 0.03
    assert sum(clock.seconds.values()) <= wall


def test_a_transcription_counts_every_second_once_and_in_its_stage(sleep, tiny_bundle, monkeypatch):
    def costs(seconds, function):
        def slow(*arguments, **options):
            sleep(seconds)
            return function(*arguments, **options)

        return slow

    scripts = dict(enumerate([[5, 6, 1], [1], [7, 1], [8, 9, 10, 11, 1], [1], [12, math.nan]]))
    backend = ScriptedBackend(scripts, slots=2, length=96)
    busy = transcriber.Transcriber(tiny_bundle, backend, name="scripts")
    busy.extractor = costs(3, busy.extractor)
    monkeypatch.setattr(reading, "prepare_audio", costs(7, reading.prepare_audio))
    monkeypatch.setattr(NoteDecoder, "decode_segment", costs(0.25, NoteDecoder.decode_segment))
    for name, seconds in {"encode": 16, "admit": 0.5, "step": 1}.items():
        monkeypatch.setattr(backend, name, costs(seconds, getattr(backend, name)))
    before, samples = stopwatch.perf_counter(), 6 * 32_768 - 500

    result = busy.transcribe(np.zeros(samples), 16_000, progress=lambda *_: sleep(1000))  # the caller's own time

    steps, admissions = (sum(isinstance(call, kind) for call in backend.calls) for kind in (Stepped, Admitted))
    assert result.provenance.stage_seconds == {
        "read": 7,
        "features": 2 * 3,  # four segments, then two
        "encode": 2 * 16,
        "decode": steps + admissions / 2,
        "notes": 6 * 0.25,
    }
    total = sum(result.provenance.stage_seconds.values())
    assert stopwatch.perf_counter() - before == total + 6 * 1000
    assert result.provenance.real_time_factor == pytest.approx(total / (samples / 16_000))
