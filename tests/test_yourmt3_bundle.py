"""A small YourMT3 network all the way: checkpoint, bundle with matrices in fp16, verification, notes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import soundfile

from graph_cases import one_thread
from mt3_export.bundle_writer import export_bundle
from mt3_export.lab.forcing import Forcing
from mt3_export.lab.isolation import graph_errors
from mt3_export.lab.layers import layer_errors
from mt3_export.lab.logits import LogitsBackend
from mt3_export.lab.material import ForcedRow, Material
from mt3_export.lab.probes import Pair
from mt3_export.lab.variants import VARIANTS, changed_products, write_variant
from mt3_export.quantize_bundle import quantize_bundle
from mt3_export.verify import verify_bundle
from mt3_runtime.bundle import open_bundle
from mt3_runtime.decoding import DecodingRules
from mt3_runtime.features import feature_extractor
from mt3_runtime.loading import load
from small_yourmt3 import channel_checkpoint

RATE = 16_000


@pytest.fixture(scope="module")
def checkpoint():
    return channel_checkpoint()


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    return export_bundle(checkpoint, tmp_path_factory.mktemp("bundles") / "small", weights_storage="fp16")


def audio(seconds, seed):
    """Decaying tones over a little noise."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    samples = generator.normal(0, 1e-3, len(time))
    for onset, pitch in zip(generator.uniform(0, seconds, 12), generator.integers(40, 85, 12), strict=True):
        since = np.maximum(time - onset, 0)
        samples += (
            0.1 * (time >= onset) * np.exp(-3 * since) * np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * since)
        )
    return samples.astype(np.float32)


def transcriber(folder, slots):
    """Random weights write mostly shifts: a vocabulary of few shifts turns the same tokens into notes."""
    loaded = load(folder, slots=slots, threads=1)
    loaded.rules = DecodingRules(0, None, 12, first_may_end=False)
    return loaded


def facts(result):
    """All but the confidences' last digits, which the number of rows beside may change."""
    provenance, notes = result.provenance, [replace(note, confidence=None) for note in result.notes]
    statistics = (provenance.invalid_events, provenance.dropped_events, provenance.tokens, provenance.segments)
    return notes, statistics, provenance.truncated_segments, provenance.failed_segments


def test_every_graph_is_torch(folder, checkpoint):
    with one_thread():
        reports = verify_bundle(open_bundle(folder), checkpoint, segments=2, steps=8)
    assert len(reports) == 6
    assert [report.to_text() for report in reports if not report.passed] == []
    assert {report.tokens for report in reports} == {0, 2 * 3 * 8}


def test_slots_and_neighbours_change_nothing(folder):
    pieces = [audio(seconds, seed) for seed, seconds in enumerate((5.0, 0.3, 9.1))]
    one = transcriber(folder, 1)
    wanted = [facts(one.transcribe(piece, RATE)) for piece in pieces]
    assert [segments for _, (_, _, _, segments), _, _ in wanted] == [3, 1, 5]
    for slots in (2, 7):
        together = dict(transcriber(folder, slots).transcribe_many((piece, RATE) for piece in pieces))
        assert [facts(together[index]) for index in range(3)] == wanted


def test_every_channel_is_decoded(folder):
    result = transcriber(folder, 4).transcribe(audio(5.0, 3), RATE)
    assert result.provenance.tokens == 3 * 3 * 12
    assert result.provenance.truncated_segments == (0, 1, 2)
    assert sum(result.provenance.stage_seconds.values()) > 0


def test_quantized(folder, checkpoint, tmp_path):
    """Experts are quantised, attention and what chooses them are not."""
    soundfile.write(tmp_path / "music.wav", audio(4.0, 6), RATE)
    wanted, heard = ["int8", "w8", "qdq"], [tmp_path / "music.wav"]
    bundle = open_bundle(quantize_bundle(open_bundle(folder), tmp_path / "quantized", wanted, calibration=heard))
    nodes = onnx.load(bundle.path / "encoder.int8.ort.onnx").graph.node
    exact = {name for node in nodes if node.op_type == "MatMul" for name in node.input if name.startswith("weights.")}
    assert all(any(part in name for name in exact) for part in (".router", ".attention.query", ".cross.value"))
    assert not any(part in name for name in exact for part in (".up.", ".gate.", ".down.", ".projection"))
    operators = [node.op_type for node in nodes]
    assert operators.count("MatMulIntegerToFloat") == 2 * operators.count("DynamicQuantizeMatMul")  # up and gate, down
    calibrated = onnx.load(bundle.path / "encoder.qdq.ort.onnx").graph.node
    levels = {
        node.input[0] for node in calibrated if node.op_type == "DequantizeLinear" and "weights." in node.input[0]
    }
    replaced = [
        node for node in nodes if node.op_type in {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"}
    ]
    assert len(levels) == len(replaced) > 10
    reports = verify_bundle(bundle, checkpoint, segments=1, steps=6)
    assert [report.to_text() for report in reports if not report.passed] == []
    sound = audio(3.0, 5)
    for precision in wanted:
        result = load(bundle.path, "cpu", precision=precision).transcribe(sound, 16_000)
        assert result.provenance.precision == precision
        assert not result.provenance.failed_segments


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_the_precision_lab_looks_into_all_channels(folder, name, tmp_path):
    """Which tokens an expert is given may differ, so that what it gives cannot be compared."""
    bundle, variant = open_bundle(folder), VARIANTS[name]
    spec = bundle.manifest.features
    features = feature_extractor(spec)(audio(3, 3)[None, : spec.segment_samples], [spec.segment_frames])
    told = np.random.default_rng(0).integers(3, 590, (3, 5)).astype(np.int32)
    material = Material(features, tuple(ForcedRow(0, 0, channel, told[channel], None) for channel in range(3)))
    other = write_variant(bundle, variant, tmp_path / name, {})
    label = "fp32" if variant.is_half else name
    reference, changed = (
        LogitsBackend(each, slots=3, threads=1, precision=precision, length=8)
        for each, precision in ((bundle, "fp32"), (other, label))
    )
    agreement = Forcing(reference, material).run(changed)
    assert agreement.steps.tolist() == [5, 5, 5]
    assert 0 < agreement.mean_kl < 0.1
    errors = graph_errors(reference, changed, material, {}, variant.limit)
    assert [error.graph for error in errors] == ["encoder", "cross_kv", "decode_step"]
    assert all(0 < error.relative < 0.5 for error in errors)
    layers, _ = layer_errors(Pair(bundle, other, variant, label), reference, material)
    left_out = set(changed_products(bundle, variant)) - {(layer.graph, layer.layer) for layer in layers}
    assert {name.split(".")[-2] for _, name in left_out} == {"up", "gate", "down"}  # of experts
    assert all(layer.largest > 0 and not layer.non_finite for layer in layers)
