"""Teacher forcing, divergence, and errors of graphs and layers, against computations of the tests' own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graph_cases import Decoder, engine, relative_error
from mt3_export.lab.bootstrap import ratio_estimate
from mt3_export.lab.clips import divergence_step
from mt3_export.lab.errors import ErrorSums
from mt3_export.lab.forcing import Forcing, divergence
from mt3_export.lab.isolation import graph_errors
from mt3_export.lab.layers import layer_errors
from mt3_export.lab.listening import Said
from mt3_export.lab.logits import LogitsBackend
from mt3_export.lab.material import ForcedRow, Material, choose_rows, gather, read_rows, save_rows
from mt3_export.lab.probes import Pair
from mt3_export.lab.variants import VARIANTS, changed_products, write_variant
from mt3_export.products import products, weights_of
from mt3_runtime.bundle import open_bundle
from mt3_runtime.features import feature_extractor
from mt3_runtime.memory import first_ids
from mt3_runtime.segments import iter_segments

STEPS = (7, 5, 5, 2)  # of the rows
LENGTH = 8


def said(segment=0, tokens=(), status="ended", channel=0, *, is_silent=False):
    return Said(segment, channel, np.array(tokens, np.int32), status, fell_back=False, is_silent=is_silent)


@pytest.fixture(scope="module")
def material(tiny_bundle):
    rng = np.random.default_rng(3)
    spec = tiny_bundle.manifest.features
    features = rng.standard_normal((3, spec.segment_frames, spec.bins)).astype(np.float32)
    rows = [
        ForcedRow(clip, place, 0, rng.integers(2, 1500, steps).astype(np.int32), None)
        for clip, place, steps in zip((0, 0, 1, 1), (2, 0, 1, 2), STEPS, strict=True)
    ]
    return Material(features, tuple(rows))


def backend(bundle, precision="fp32", slots=3):
    return LogitsBackend(bundle, slots=slots, threads=1, precision=precision, length=LENGTH)


@pytest.fixture(scope="module")
def made(tiny_bundle, tmp_path_factory):
    """A bundle of w4, whose errors are large, and the precision that it lists."""
    return write_variant(tiny_bundle, VARIANTS["w4"], tmp_path_factory.mktemp("made") / "w4", {}), "w4"


def all_logits(bundle, precision, material):
    """Logits [steps, vocab] of every row, one row at a time, without any of the lab's code."""
    encoder, cross_kv, decoder = (
        engine(bundle, graph, "ort", precision) for graph in ("encoder", "cross_kv", "decode_step")
    )
    found = []
    for row in material.rows:
        states = encoder(material.features[row.place : row.place + 1])[0]
        found.append(Decoder(decoder, cross_kv(states[:, row.channel]), LENGTH).follow(row.inputs[None])[0])
    return found


def test_agreement_and_divergence_of_saved_logits(tiny_bundle, made, material):
    other, label = made
    wanted, found = (all_logits(*form, material) for form in ((tiny_bundle, "fp32"), (other, label)))
    equal = [(a.argmax(-1) == b.argmax(-1)).sum() for a, b in zip(wanted, found, strict=True)]
    p, q = (np.exp(np.concatenate(each).astype(np.float64)) for each in (wanted, found))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    kl = (p * np.log(p / q)).sum(-1)
    agreement = Forcing(backend(tiny_bundle), material).run(backend(other, label))
    assert agreement.steps.tolist() == list(STEPS)
    assert agreement.equal.tolist() == equal
    assert 0 < sum(equal) < sum(STEPS)
    np.testing.assert_allclose(np.sort(agreement.kl), np.sort(kl), rtol=2e-3, atol=1e-7)
    summary = agreement.summary()
    assert (summary.segments, summary.tokens, summary.equal, summary.non_finite) == (4, sum(STEPS), sum(equal), 0)
    assert summary.agreement == ratio_estimate([sum(equal[:2]), sum(equal[2:])], [12, 7])  # by clip
    assert summary.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert summary.kl_max == pytest.approx(kl.max(), rel=1e-3)
    assert summary.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)


def test_fp32_agrees_with_itself_whatever_the_slots(tiny_bundle, material):
    forcing = Forcing(backend(tiny_bundle, slots=1), material, keep=True)
    for _ in range(2):  # the second time from what was kept
        agreement = forcing.run(backend(tiny_bundle, slots=2))
        assert agreement.share == 1
        assert agreement.kl.max() < 1e-9


def test_divergence():
    logits = np.array([[0.0, 1.0, 2.0], [5.0, -5.0, 0.0]], np.float32)
    assert divergence(logits, logits + 3).max() < 1e-12  # logits are free up to a constant
    found = divergence(logits, logits[:, ::-1])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, (p * (np.log(p) - np.log(p[:, ::-1]))).sum(-1), rtol=1e-6)


def test_steps_without_finite_logits_are_counted_and_never_equal(tiny_bundle, material):
    class Broken(LogitsBackend):
        def step(self, tokens, positions):
            found = super().step(tokens, positions)
            self.logits[0, 3] = np.nan
            return found

    other = Broken(tiny_bundle, slots=3, threads=1, precision="fp32", length=LENGTH)
    agreement = Forcing(backend(tiny_bundle), material).run(other)
    assert agreement.non_finite == STEPS[0] + STEPS[3]  # slot 0 of both groups
    assert agreement.equal.tolist() == [0, 5, 5, 0]
    assert len(agreement.kl) == 10


def test_errors_of_graphs(tiny_bundle, made, material):
    other, label = made
    reference = backend(tiny_bundle)
    found = {
        error.graph: error
        for error in graph_errors(reference, backend(other, label), material, {"decode_step": 3.0}, limit=7.0)
    }
    assert list(found) == ["encoder", "cross_kv", "decode_step"]
    for graph in ("encoder", "cross_kv"):  # w4 leaves them as they are
        assert (found[graph].max, found[graph].relative, found[graph].psnr_db) == (0, 0, None)
        assert found[graph].cosine == pytest.approx(1)
    wanted, theirs = (np.concatenate(all_logits(*form, material)) for form in ((tiny_bundle, "fp32"), (other, label)))
    error = found["decode_step"]
    assert error.relative == pytest.approx(relative_error(theirs, wanted), rel=1e-3)
    assert error.max == pytest.approx(np.abs(theirs - wanted).max(), rel=1e-3)
    cosine = (theirs * wanted).sum() / np.linalg.norm(theirs) / np.linalg.norm(wanted)
    assert error.cosine == pytest.approx(cosine, rel=1e-5)
    rms = np.sqrt(np.mean((theirs - wanted).astype(np.float64) ** 2))
    assert error.psnr_db == pytest.approx(20 * np.log10(np.abs(wanted).max() / rms), rel=1e-3)
    assert (error.largest, error.limit, error.non_finite) == (3.0, 7.0, 0)


@pytest.mark.parametrize("name", ["fp16", "int8", "w8"])
def test_errors_of_layers(name, tiny_bundle, material, tmp_path):
    variant = VARIANTS[name]
    other = write_variant(tiny_bundle, variant, tmp_path / name, {})
    label = "fp32" if variant.is_half else name
    layers, largest = layer_errors(Pair(tiny_bundle, other, variant, label), backend(tiny_bundle, slots=4), material)
    changed = set(changed_products(tiny_bundle, variant))
    assert len({(layer.graph, layer.layer) for layer in layers}) == len(layers) == 26
    for graph, number in largest.items():
        every = [layer for layer in layers if layer.graph == graph]
        if variant.is_half:  # what the type has to hold: not the head, nor what is divided row by row
            every = [layer for layer in every if not layer.layer.endswith(("head", "feed_forward.output"))]
        assert number == pytest.approx(max(layer.largest for layer in every))
    for layer in layers:
        assert layer.largest > 0
        assert layer.non_finite == 0
        if (layer.graph, layer.layer) in changed:
            assert {"fp16": 1e-5, "int8": 1e-3, "w8": 1e-3}[name] < layer.relative < 0.5
        elif name == "w8":
            assert (layer.relative == 0) == (layer.graph != "decode_step")
    encoder = products(ir.load(tiny_bundle.path / "encoder.fp32.ort.onnx").graph)
    matrix, shown = weights_of(encoder["projection"]), sorted({row.place for row in material.rows})
    wanted = material.features[shown] @ matrix
    assert layers[0].layer == "projection"
    assert layers[0].largest == pytest.approx(
        max(np.abs(material.features[shown]).max(), np.abs(wanted).max()), rel=1e-5
    )
    if name == "fp16":
        narrow = [array.astype(np.float16).astype(np.float32) for array in (material.features[shown], matrix)]
        found = (narrow[0] @ narrow[1]).astype(np.float16).astype(np.float32)
        assert layers[0].relative == pytest.approx(relative_error(found, wanted), rel=0.01)


def test_a_row_of_eight_bits_is_alone_in_the_lab_as_it_is_in_use(tiny_bundle, material, tmp_path):
    other = write_variant(tiny_bundle, VARIANTS["int8"], tmp_path / "int8", {})
    three, one = (Forcing(backend(tiny_bundle, slots=n), material).run(backend(other, "int8", slots=n)) for n in (3, 1))
    np.testing.assert_allclose(np.sort(three.kl), np.sort(one.kl), rtol=0.05, atol=1e-6)


def test_models_with_memory(context_bundle, prefix_bundle, tmp_path):
    rng = np.random.default_rng(5)
    for bundle in (context_bundle, prefix_bundle):
        model, spec = bundle.manifest.model, bundle.manifest.features
        features = rng.standard_normal((2, spec.segment_frames, spec.bins)).astype(np.float32)
        rows = tuple(
            ForcedRow(0, place, 0, rng.integers(2, 1500, 6).astype(np.int32), first_ids(model)) for place in (0, 1)
        )
        material = Material(features, rows)
        other = write_variant(bundle, VARIANTS["fp16"], tmp_path / bundle.path.name, {})
        agreement = Forcing(backend(bundle), material).run(backend(other))
        assert 0 < agreement.mean_kl < 1e-2
        graphs = [error.graph for error in graph_errors(backend(bundle), backend(other), material, {}, 65504.0)]
        assert graphs == [contract.name for contract in bundle.manifest.contracts]
        layers, _ = layer_errors(Pair(bundle, other, VARIANTS["fp16"], "fp32"), backend(bundle), material)
        assert {layer.graph for layer in layers} == set(graphs)


def test_error_sums():
    sums = ErrorSums()
    assert (sums.relative, sums.cosine, sums.psnr_db) == (0, 1, None)
    sums.add(np.array([3.0, 4.0], np.float32), np.array([3.0, np.inf], np.float32))
    sums.add(np.array([0.0], np.float32), np.array([1.0], np.float32))
    assert (sums.non_finite, sums.max, sums.peak) == (1, 4.0, 4.0)
    assert sums.relative == pytest.approx(np.sqrt(17) / 5)  # what is not finite is taken for 0
    assert sums.cosine == pytest.approx(9 / (5 * np.sqrt(10)))
    assert sums.psnr_db == pytest.approx(20 * np.log10(4 / np.sqrt(17 / 3)))
    nothing = ErrorSums()
    nothing.add(np.ones(3, np.float32), np.full(3, np.nan, np.float32))
    assert (nothing.relative, nothing.cosine, nothing.non_finite) == (1, 0, 3)
    zeros = ErrorSums()
    zeros.add(np.zeros(3, np.float32), np.ones(3, np.float32))
    assert (zeros.relative, zeros.cosine) == (1, 0)


@pytest.mark.parametrize(
    ("wanted", "found", "step"),
    [
        (said(tokens=[5, 6, 7]), said(tokens=[5, 6, 7]), -1),
        (said(tokens=[5, 6, 7]), said(tokens=[5, 9, 7]), 1),
        (said(tokens=[5, 6]), said(tokens=[5, 6, 7]), 2),  # the end came later
        (said(tokens=[5, 6, 7]), said(tokens=[5, 6]), 2),
        (said(tokens=[5, 6]), said(tokens=[5, 6], status="truncated"), 2),
        (said(), said(), -1),
        (said(), said(tokens=[4]), 0),
    ],
)
def test_first_divergence(wanted, found, step):
    assert divergence_step(wanted, found) == step


def test_rows_are_kept_and_chosen_evenly(tmp_path):
    clips = [
        [said(0, [4, 5, 6]), said(1, [], is_silent=True), said(2, [7], status="failed")],
        [],
        [said(segment, [8] * segment, status="truncated") for segment in range(6)],
    ]
    save_rows(tmp_path / "rows.npz", clips)
    again = read_rows(tmp_path / "rows.npz", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npz"]
    for mine, theirs in zip(clips, again, strict=True):
        assert [(s.segment, s.status, s.is_silent, s.tokens.tolist()) for s in mine] == [
            (s.segment, s.status, s.is_silent, s.tokens.tolist()) for s in theirs
        ]
    everything = choose_rows(again, 100)
    assert [(clip, row.segment) for clip, row in everything] == [(0, 0), *((2, segment) for segment in range(6))]
    some = [(clip, row.segment) for clip, row in choose_rows(again, 3)]
    assert len(set(some)) == 3
    assert some == sorted(some) == [(clip, row.segment) for clip, row in choose_rows(again, 3)]


def test_rows_of_all_channels_are_chosen():
    """Thirteen channels, and a number of rows that has to do with their number."""
    clips = [[said(segment, [4], channel=channel) for segment in range(51) for channel in range(13)] for _ in range(5)]
    counts = np.bincount([row.channel for _, row in choose_rows(clips, 256)], minlength=13)
    assert counts.sum() == 256
    assert counts.min() >= 8


def test_material_is_what_fp32_heard_and_said(context_bundle):
    manifest = context_bundle.manifest
    spec = manifest.features
    audio = np.random.default_rng(0).normal(0, 0.1, 3 * spec.segment_samples - 100).astype(np.float32)
    extractor = feature_extractor(spec)
    clips = [[said(0, [40, 41]), said(1, [50]), said(2, [60, 61, 62], status="truncated")]]
    found = gather(manifest, extractor, clips, choose_rows(clips, 9), lambda clip: audio)
    start = manifest.model.start_token
    assert [row.inputs.tolist() for row in found.rows] == [[start, 40, 41], [start, 60, 61], [start, 50]]
    segments = list(iter_segments(audio, spec, manifest.vocabulary))
    for row, index in zip(found.rows, (0, 2, 1), strict=True):
        wanted = extractor(segments[index].samples[None], [segments[index].frames])[0]
        assert np.array_equal(found.features[row.place], wanted)
    memories = [row.memory.tolist() for row in found.rows]
    assert memories[0] == first_ids(manifest.model).tolist()
    assert memories[2][:4] == [start, 40, 41, manifest.model.end_token]
    assert memories[1][:3] == [start, 50, manifest.model.end_token]
    assert open_bundle(context_bundle.path).sha256 == context_bundle.sha256
