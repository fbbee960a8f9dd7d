"""From a folder and a device name to a transcriber."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace

import numpy as np
import pytest

from mt3_runtime import loading
from mt3_runtime.devices import default_slots
from mt3_runtime.errors import BundleError, DeviceError, OptionError
from mt3_runtime.graphs import graph_specs
from mt3_runtime.loading import load
from mt3_runtime.version import __version__

RATE = 16_000


def outcome(transcriber, audio):
    result = transcriber.transcribe(audio, RATE)
    counts = (result.provenance.tokens, result.provenance.invalid_events, result.provenance.dropped_events)
    assert min(counts) > 0
    return result.notes, counts


def test_auto_is_the_cpu(tiny_folder):
    audio = np.random.default_rng(0).normal(0, 0.1, 5 * RATE)
    chosen, asked = load(tiny_folder, "auto"), load(tiny_folder, "cpu")
    assert chosen.backend.device == asked.backend.device == "cpu"
    assert outcome(chosen, audio) == outcome(asked, audio)


def test_slots_and_threads_reach_the_backend(tiny_folder):
    assert load(tiny_folder).backend.slots == 8
    backend = load(str(tiny_folder), slots=3, threads=2).backend
    assert (backend.slots, backend.threads) == (3, 2)


def test_slots_by_default_hold_four_segments_of_a_model_with_channels(tiny_bundle, channels_bundle):
    manifest = channels_bundle.manifest
    model = replace(manifest.model, channels=13)
    many = replace(manifest, model=model, contracts=tuple(graph_specs(model, manifest.features).values()))
    assert default_slots(tiny_bundle.manifest, "cpu") == 8
    assert default_slots(manifest, "cpu") == 12
    assert default_slots(many, "cpu") == 52


def test_provenance_says_what_ran(tiny_folder):
    transcriber, audio = load(tiny_folder, threads=1), np.random.default_rng(1).normal(0, 0.1, 20 * RATE)
    before = time.perf_counter()
    result = transcriber.transcribe(audio, RATE)
    wall = time.perf_counter() - before
    provenance = result.provenance
    assert (provenance.model, provenance.bundle) == ("tiny", str(tiny_folder))
    assert provenance.bundle_sha256 == hashlib.sha256((tiny_folder / "manifest.json").read_bytes()).hexdigest()
    assert (provenance.device, provenance.provider) == ("cpu", "CPUExecutionProvider")
    assert (provenance.precision, provenance.runtime_version) == ("fp32", __version__)
    assert (result.duration, provenance.audio_seconds, provenance.segments) == (20, 20, 10)
    assert min(provenance.stage_seconds.values()) > 0
    assert wall / 2 < sum(provenance.stage_seconds.values()) <= wall
    assert provenance.real_time_factor == pytest.approx(sum(provenance.stage_seconds.values()) / 20)


@pytest.mark.parametrize("device", ["gpu", "CPU", "", "cpu:0"])
def test_a_device_that_does_not_exist_is_an_error(tiny_folder, device):
    with pytest.raises(DeviceError, match=f"^device '{device}' does not exist: use auto, cpu, cuda, tensorrt, "):
        load(tiny_folder, device)


def test_precision_is_checked(tiny_folder):
    known = "auto, fp32, fp16, bf16, int8, w8, w4, qdq"
    with pytest.raises(OptionError, match=rf"^precision 'int4' does not exist: use one of {known}$"):
        load(tiny_folder, precision="int4")
    with pytest.raises(
        OptionError, match="fp16 is for GPUs, the CPU has fp32, int8, w8, w4, qdq: leave --precision out"
    ):
        load(tiny_folder, "cpu", precision="fp16")
    assert load(tiny_folder, "cpu", precision="fp32").backend.precision == "fp32"


@pytest.mark.parametrize("name", ["slots", "threads"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "2"])
def test_slots_and_threads_are_whole_numbers_from_one(tiny_folder, name, value):
    with pytest.raises(OptionError, match=f"^{name} is {value!r}: give a whole number of 1 or more$"):
        load(tiny_folder, **{name: value})


def test_slots_and_threads_beyond_every_machine(tiny_folder):
    with pytest.raises(OptionError, match=r"^threads is 2147483648: give at most 1024,"):
        load(tiny_folder, threads=2**31)
    for slots in (10**13, 10**20):
        with pytest.raises(OptionError, match=f"^there is no memory for {slots} slots of .* tokens: give fewer$"):
            load(tiny_folder, "cpu", slots=slots)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BundleError, match=r"missing does not exist: name a folder made by mt3-export bundle$"):
        load(tmp_path / "missing")


def test_no_folder_means_the_demo(tiny_folder, monkeypatch):
    monkeypatch.setattr(loading, "demo_bundle_path", lambda: tiny_folder)
    result = load().transcribe(np.zeros(RATE), RATE)
    assert result.provenance.bundle == "embedded demo"
    assert result.provenance.model == "tiny"
