"""The graphs of real bundles on a GPU that is not there: token by token what the CPU backend decodes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from conftest import TINY_FEATURES, TINY_MODEL
from decoding_cases import follow
from memory_cases import END, SPAN, TIE
from mt3_runtime.backends.device_rows import DeviceOptions, DeviceRows
from mt3_runtime.backends.fake_gpu import FakeGpu, FakeGraphs, fake_backend, session_function
from mt3_runtime.backends.ort import OrtBackend, open_session
from mt3_runtime.bundle import demo_bundle_path, demo_clip_path, open_bundle
from mt3_runtime.decoding import decode_rows
from mt3_runtime.errors import OptionError
from mt3_runtime.graphs import graph_specs
from mt3_runtime.rows import DecodingRules, Row
from mt3_runtime.transcriber import Transcriber

ROWS, STEPS = 7, 24
RULES = DecodingRules(start_token=0, end_token=None, max_tokens=STEPS)


@pytest.fixture(scope="module")
def features():
    shape = (ROWS, TINY_FEATURES.segment_frames, TINY_FEATURES.bins)
    return np.random.default_rng(3).normal(-5, 3, shape).astype(np.float32)


@pytest.fixture(scope="module")
def told():
    ids, generator = np.zeros((ROWS, SPAN), np.int32), np.random.default_rng(4)
    for row, count in zip(ids, (0, 3, 40, 500, SPAN, 17, 0), strict=True):
        row[:count] = generator.integers(2, TINY_MODEL.vocab_size, count)
    ids[0, :2] = TIE, END
    return ids


def on_fake(bundle, slots, chunk, *, eager, **graphs):
    options = DeviceOptions(slots, precision="fp32", chunk=chunk)
    return fake_backend(bundle, options, gpu=FakeGpu(eager=eager), **graphs)


def decode(backend, features, told=None, rules=RULES, limits=None):
    states = [backend.encode(one[None])[0] for one in features]
    rows = [
        Row((segment, channel), state, memory=None if told is None else told[segment], limit=limits and limits[segment])
        for segment, channels in enumerate(states)
        for channel, state in enumerate(channels)
    ]
    decoded = {row.key: row for row in decode_rows(backend, rows, rules)}
    assert len(decoded) == len(rows)
    return decoded


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, row in wanted.items():
        assert found[key].tokens.tolist() == row.tokens.tolist()
        assert found[key].status == row.status
        np.testing.assert_allclose(found[key].log_probs, row.log_probs, atol=1e-4)


@pytest.mark.parametrize(("slots", "chunk", "eager"), [(1, 4, False), (3, 1, True), (5, 8, False), (8, 5, True)])
def test_mt3_decodes_as_on_the_cpu(tiny_bundle, features, slots, chunk, eager):
    limits = [24, 3, 17, 1, 24, 9, 12]
    wanted = decode(OrtBackend(tiny_bundle, slots=1, threads=1), features, limits=limits)
    assert len({tuple(row.tokens[:8].tolist()) for row in wanted.values()}) > 4
    backend = on_fake(tiny_bundle, slots, chunk, eager=eager, lengths=(8, 16, 96))
    assert_same(decode(backend, features, limits=limits), wanted)
    assert backend.captured or chunk == 8  # nothing is captured that comes once


@pytest.mark.parametrize("kind", ["context", "prefix"])
def test_mr_mt3_decodes_as_on_the_cpu(request, features, told, kind):
    bundle = request.getfixturevalue(f"{kind}_bundle")
    wanted = decode(OrtBackend(bundle, slots=1, threads=1), features, told)
    backend = on_fake(bundle, 4, 8, eager=False, lengths=(40, 48, 128))
    assert_same(decode(backend, features, told), wanted)


def test_thirteen_channels_decode_as_on_the_cpu(tiny_bundle, features):
    """YourMT3's shape around the tiny decoder: an encoder that weighs its features anew for each channel."""
    model = replace(tiny_bundle.manifest.model, family="yourmt3", channels=13)
    contracts = tuple(graph_specs(model, TINY_FEATURES).values())
    manifest = SimpleNamespace(model=model, features=TINY_FEATURES, contracts=contracts)

    weights = np.random.default_rng(6).normal(size=(13, model.d_model)).astype(np.float32)

    def encode(arrays):
        for channel in range(13):
            arrays["states"][:, channel] = arrays["features"][..., : model.d_model] * weights[channel]

    functions = {"encoder": encode}
    for spec in contracts[1:]:
        session = open_session(tiny_bundle, tiny_bundle.graph(spec.name, "ort", "fp32"), threads=1)
        functions[spec.name] = session_function(session, spec.output_names)
    gpu = FakeGpu()
    options = DeviceOptions(16, precision="fp32", chunk=4)
    backend = DeviceRows(manifest, gpu, FakeGraphs(gpu, functions), options, device="fake:0", provider="FakeGpu")
    found = decode(backend, features[:2])
    cpu = OrtBackend(tiny_bundle, slots=13, threads=1)
    for segment in range(2):
        cpu.admit(0, np.stack([features[segment, :, : model.d_model] * one for one in weights]))
        wanted = follow(cpu, STEPS, 13)[0].tolist()
        assert len({tuple(tokens) for tokens in wanted}) > 10
        assert [found[segment, channel].tokens.tolist() for channel in range(13)] == wanted


def test_steps_one_by_one_are_those_of_the_cpu(tiny_bundle, features):
    cpu, fake = OrtBackend(tiny_bundle, slots=3, threads=1), on_fake(tiny_bundle, 3, 4, eager=False)
    states = cpu.encode(features[:3])[:, 0]
    for backend in (cpu, fake):
        backend.admit(0, states)
    for found, wanted in zip(follow(fake, STEPS, 3), follow(cpu, STEPS, 3), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_row_that_fails_leaves_nothing_behind(tiny_bundle, features):
    """Of 7 rows two are poisoned; the others, and those that take their slots, decode as if alone."""
    wanted = decode(OrtBackend(tiny_bundle, slots=1, threads=1), features)
    poisoned = features.copy()
    poisoned[[1, 4], 100] = np.nan
    for eager in (False, True):
        found = decode(on_fake(tiny_bundle, 2, 4, eager=eager), poisoned)
        assert [found[segment, 0].status for segment in (1, 4)] == ["failed"] * 2
        for segment in (0, 2, 3, 5, 6):
            assert found[segment, 0].tokens.tolist() == wanted[segment, 0].tokens.tolist()


def test_a_clip_becomes_the_same_notes():
    """The demo model and clip, from samples to notes: the whole runtime over a device."""
    bundle = open_bundle(demo_bundle_path())
    samples, rate = soundfile.read(demo_clip_path() / "clip.flac", frames=5 * 16_000, dtype="float32")
    cpu = OrtBackend(bundle, slots=3, threads=1)
    notes = [
        Transcriber(bundle, backend, name="demo").transcribe(samples, rate).notes
        for backend in (cpu, on_fake(bundle, 2, 16, eager=False))
    ]
    assert len(notes[0]) > 10
    assert [replace(note, confidence=0.0) for note in notes[1]] == [replace(note, confidence=0.0) for note in notes[0]]


def test_a_memory_that_does_not_fit_is_refused(tiny_bundle, context_bundle, features, told):
    plain, context = on_fake(tiny_bundle, 2, 4, eager=False), on_fake(context_bundle, 2, 4, eager=False)
    with pytest.raises(OptionError, match=r"memory of shape \(7, 1024\): give them none"):
        plain.admit(0, plain.encode(features[:1])[0], told)
    with pytest.raises(OptionError, match=r"memory of shape None: give them one of shape \(1, 1024\)"):
        context.admit(0, context.encode(features[:1])[0])


def test_only_audio_is_sent_where_the_bundle_has_a_graph_of_the_features(half_folder):
    """The device's features, made in float32, and the runtime's, made in float64, give the same notes."""
    bundle = open_bundle(half_folder)
    assert bundle.manifest.takes_audio
    gpu = FakeGpu()
    options = DeviceOptions(4, precision="fp32", chunk=4)
    device = Transcriber(bundle, fake_backend(bundle, options, gpu=gpu), name="device")
    host = Transcriber(bundle, OrtBackend(bundle, slots=4, threads=1), name="host")
    rate = bundle.manifest.features.sample_rate
    samples = np.random.default_rng(8).normal(0, 0.1, 5 * rate).astype(np.float32)
    refused = []
    device.extractor = SimpleNamespace(check=lambda audio, frames: refused.append((audio.shape, frames)))
    found, wanted = device.transcribe(samples, rate), host.transcribe(samples, rate)
    assert [shape for shape, _ in refused] == [(3, 32_768)]
    assert found.provenance.tokens == wanted.provenance.tokens > 0
    assert [(n.onset, n.pitch, n.program) for n in found.notes] == [(n.onset, n.pitch, n.program) for n in wanted.notes]
