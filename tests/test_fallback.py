"""Rows that a device cannot compute in half precision are decoded again in fp32, and that is said."""

from __future__ import annotations

import math

import numpy as np
import pytest

from decoding_cases import RULES, check, row, script
from mt3_runtime.backends.scripted import Admitted, ScriptedBackend, Stepped
from mt3_runtime.backends.scripted_device import ScriptedDevice
from mt3_runtime.decoding import Row, decode_rows
from mt3_runtime.errors import DependencyError
from mt3_runtime.transcriber import Transcriber
from scripted_audio import RATE, Listener, levels
from test_song_memory import FIRST, START, filled, memory_bundle, order, tokens_of  # noqa: F401

END, TIE = 1, 1134


class DeviceListener(Listener, ScriptedDevice):
    """A device that hears what `Listener` hears."""


class Fallback:
    """Makes one scripted backend, and counts how often."""

    def __init__(self, scripts, **options):
        self.made, self.backend = 0, Listener(scripts, slots=1, **options)

    def __call__(self):
        self.made += self.made == 0
        return self.backend


def rows_with_encode(keys):
    def states_of(key):
        return lambda backend: backend.encode(np.full((1, 1, 1), key / 1024, np.float32))[0][0]

    return [Row(key, row(key).states, encode=states_of(key)) for key in keys]


@pytest.mark.parametrize("chunk", [None, 1, 4, 16])
@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("step", [0, 1, 17])
def test_a_failed_row_is_decoded_on_the_fallback_alone(chunk, slots, step):
    scripts = {key: script(key, length) for key, length in {0: 3, 1: 40, 3: 17, 4: 29}.items()}
    bad = {key: [*script(key, 30)[:step], math.nan] for key in (2, 5)}
    options = {"slots": slots, "length": 64}
    if chunk is None:
        backend = ScriptedBackend(scripts | bad, **options)
    else:
        backend = ScriptedDevice(scripts | bad, **options, chunk=chunk)
    fallback = Fallback({2: script(2, 30), 5: script(5, 9)}, length=64)
    rows = rows_with_encode([0, 2, 5, 1, 3, 4])
    found = {each.key: each for each in decode_rows(backend, rows, RULES, fallback=fallback)}
    check(found[2], script(2, 30)[:-1], "ended")
    check(found[5], script(5, 9)[:-1], "ended")
    for key, tokens in scripts.items():
        check(found[key], tokens[:-1], "ended")
    assert {key: each.fell_back for key, each in found.items()} == {key: key in (2, 5) for key in range(6)}
    second = [call.keys for call in fallback.backend.calls if isinstance(call, Admitted)]
    assert second == [(2,), (5,)]
    assert sum(call.keys.count(2) for call in backend.calls if isinstance(call, Admitted)) == 1


def test_a_row_that_fails_there_too_has_failed_after_two_attempts():
    fallback = Fallback({2: [7, math.nan]}, length=64)
    backend = ScriptedDevice({2: [7, 8, math.nan], 3: script(3, 4)}, length=64)
    found = {each.key: each for each in decode_rows(backend, rows_with_encode([2, 3]), RULES, fallback=fallback)}
    check(found[2], [7], "failed")
    assert found[2].fell_back
    assert sum(isinstance(call, Admitted) for call in fallback.backend.calls) == 1


def test_without_failure_no_fallback_is_made():
    fallback = Fallback({})
    backend = ScriptedDevice({key: script(key, 9) for key in range(5)}, slots=2, length=64)
    assert len(list(decode_rows(backend, rows_with_encode(range(5)), RULES, fallback=fallback))) == 5
    assert fallback.made == 0


def test_a_row_that_does_not_know_how_it_is_encoded_is_tried_again_where_it_was():
    fallback = Fallback({})
    backend = ScriptedDevice({2: [math.nan]}, retries={2: script(2, 5)}, slots=2, length=64)
    [found] = decode_rows(backend, [row(2)], RULES, fallback=fallback)
    check(found, script(2, 5)[:-1], "ended")
    assert not found.fell_back


def test_the_others_go_on_meanwhile():
    """Every launch of the device goes with one step of the fallback."""
    fallback = Fallback({2: script(2, 40)}, length=64)
    backend = ScriptedDevice({0: script(0, 50), 2: [math.nan]}, slots=2, length=64, chunk=1)
    at = []
    step = fallback.backend.step

    def counting(tokens, positions):
        at.append(len(backend.launches))
        return step(tokens, positions)

    fallback.backend.step = counting
    found = [each.key for each in decode_rows(backend, rows_with_encode([0, 2]), RULES, fallback=fallback)]
    assert found == [2, 0]
    assert len(set(at)) == len(at) == 41


def test_an_unwanted_row_is_not_decoded_there():
    unwanted = set()
    fallback = Fallback({2: script(2, 5)}, length=64)
    backend = ScriptedDevice({2: [math.nan], 3: script(3, 30)}, slots=2, length=64)
    stream = decode_rows(
        backend, rows_with_encode([2, 3]), RULES, wanted=lambda key: key not in unwanted, fallback=fallback
    )
    unwanted.add(2)
    assert [each.key for each in stream] == [3]
    assert not [call for call in fallback.backend.calls if isinstance(call, Stepped)]


# ---- whole pieces of audio --------------------------------------------------------------------------------


def device_listener(bundle, scripts, fallback, *, slots=3, chunk=4):
    model = bundle.manifest.model
    backend = DeviceListener(scripts, slots=slots, length=model.max_length, channels=model.channels, chunk=chunk)
    backend.precision = "fp16"
    busy = Transcriber(bundle, backend, name="scripts", fallback=fallback)
    busy.extractor = lambda samples, frames: samples[:, :1, None]
    return busy


def drums(number, length=0):
    return [TIE, 1133, 1283 + number, *[3] * length, END]


def test_a_transcription_says_how_many_rows_fell_back(tiny_bundle):
    scripts = {key: drums(key, 3 * key) for key in range(1, 8)}
    fallback = Fallback(scripts, length=96)
    bad = {3: [TIE, math.nan], 6: [math.nan]}
    busy = device_listener(tiny_bundle, scripts | bad, fallback)
    result = busy.transcribe(levels(tiny_bundle, range(1, 8)), RATE)
    assert [note.pitch for note in result.notes] == [20 + key for key in range(1, 8)]
    assert result.provenance.fallback_rows == 2
    assert result.provenance.failed_segments == ()
    assert "2 rows were decoded again in fp32: fp16 gave numbers that are not finite" in result.warnings
    again = busy.transcribe(levels(tiny_bundle, [1, 2]), RATE)
    assert (again.provenance.fallback_rows, again.warnings) == (0, ())


def test_of_several_channels_the_one_that_failed_is_decoded_again(channels_bundle):
    scripts = {number: [60 + number, END] for number in range(9)}
    fallback = Fallback(scripts, length=96, channels=3)
    busy = device_listener(channels_bundle, scripts | {4: [math.nan]}, fallback)
    plain = device_listener(channels_bundle, scripts, None)
    samples = levels(channels_bundle, range(3), cut=0)
    assert busy.transcribe(samples, RATE).notes == plain.transcribe(samples, RATE).notes
    assert [call.keys for call in fallback.backend.calls if isinstance(call, Admitted)] == [(4,)]


def test_a_chain_with_memory_goes_on_behind_it(memory_bundle):  # noqa: F811
    good = {key: [*tokens_of(key, key), END] for key in range(1, 5)}
    fallback = Fallback(good, length=96)
    busy = device_listener(memory_bundle, good | {2: [TIE, math.nan]}, fallback)
    result = busy.transcribe(levels(memory_bundle, range(1, 5)), RATE)
    assert [note.pitch for note in result.notes] == [21, 22, 23, 24]
    assert order(busy) == [1, 2, 3, 4]
    [told] = [call.memories for call in fallback.backend.calls if isinstance(call, Admitted)]
    assert told == (filled(START, *tokens_of(1, 1), END),)
    told = {call.keys[0]: call.memories[0] for call in busy.backend.calls if isinstance(call, Admitted)}
    assert told[1] == FIRST
    assert told[3] == filled(START, *tokens_of(2, 2), END)
    assert result.provenance.memory_restarts == ()


def test_live_streams_fall_back_too(tiny_bundle):
    scripts = {key: drums(key) for key in range(1, 5)}
    busy = device_listener(tiny_bundle, scripts | {2: [math.nan]}, Fallback(scripts, length=96))
    found = [note.pitch for each in busy.stream([levels(tiny_bundle, range(1, 5))], RATE) for note in each.notes]
    assert found == [21, 22, 23, 24]


def test_a_fallback_that_cannot_be_made_is_an_error_and_no_segment_is_lost_in_silence(tiny_bundle):
    def missing():
        raise DependencyError("onnxruntime cannot be imported: pip install it")

    busy = device_listener(tiny_bundle, {1: [math.nan]}, missing)
    with pytest.raises(DependencyError, match="pip install it"):
        busy.transcribe(levels(tiny_bundle, [1]), RATE)
