"""Verification finds what is wrong with a bundle, and nothing where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from bundle_cases import copied, forge, seal
from conftest import TINY_FEATURES, TINY_MODEL
from fast_export import FastExport
from graph_cases import extents, one_thread
from mt3_export import cli
from mt3_export.checkpoint import Checkpoint
from mt3_export.lowering import Eager
from mt3_export.network import build_modules
from mt3_export.random_weights import random_tensors
from mt3_export.reference import Comparison, Reference
from mt3_export.verify import (
    GraphReport,
    Routing,
    chord_features,
    decided_features,
    verify_bundle,
)
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import BundleError, CheckpointError
from mt3_runtime.graphs import GRAPH_NAMES
from small_yourmt3 import channel_checkpoint

WEIGHTS = "weights.fp32.bin"
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return copied(tiny_folder, tmp_path / "tiny")


def failed(folder, checkpoint):
    """The graphs, with their lowerings, that do not pass."""
    reports = verify_bundle(open_bundle(folder), checkpoint, segments=1, steps=STEPS)
    assert len(reports) == 6
    return {(report.graph, report.lowering) for report in reports if not report.passed}


def both(*graphs):
    return {(graph, lowering) for graph in graphs for lowering in ("ort", "tensorrt")}


def test_the_bundle_as_it_is(tiny_bundle, tiny_checkpoint):
    reports = verify_bundle(tiny_bundle, tiny_checkpoint, segments=3, steps=64)
    assert [(report.graph, report.lowering) for report in reports] == [
        (graph, lowering) for lowering in ("ort", "tensorrt") for graph in GRAPH_NAMES
    ]
    for report in reports:
        assert report.passed
        assert report.limit == 1e-5
        assert 0 < report.relative_error < 2e-6
        assert 0 < report.max_error < 1e-4
        assert report.tokens == (3 * 64 if report.graph == "decode_step" else 0)
        assert report.equal_tokens + report.near_ties == report.tokens
        assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_no_more_steps_than_the_model_has_positions(tiny_bundle, tiny_checkpoint):
    reports = verify_bundle(tiny_bundle, tiny_checkpoint, segments=1, steps=10_000)
    assert {report.tokens for report in reports} == {0, TINY_MODEL.max_length}
    assert all(report.passed for report in reports)


def test_a_bundle_may_have_another_name(tiny_bundle, tiny_checkpoint):
    named = replace(tiny_checkpoint, model=replace(TINY_MODEL, name="other"))
    assert all(report.passed for report in verify_bundle(tiny_bundle, named, steps=1))


@pytest.mark.parametrize(
    ("graph", "name", "change"),
    [
        ("encoder", "projection", 1e-3),
        ("encoder", "layers.0.qkv", 1e-3),
        ("cross_kv", "projections.0", 1e-3),
        ("cross_kv", "projections.3", 1e-3),
        ("decode_step", "layers.0.qkv", 1e-3),
        ("decode_step", "layers.1.output", 1e-3),
        ("decode_step", "layers.1.cross_query", 1e-3),
        ("decode_step", "layers.0.cross_output", 1e-3),
        ("decode_step", "layers.1.feed_forward.output", 1e-3),
        ("decode_step", "positions", 1e-3),
        ("decode_step", "head", 1e-3),
        ("encoder", "positions", 1e-2),  # matters to one frame of 256
        ("encoder", "layers.1.feed_forward.gates", 1e-2),  # matters to one number of the 48 inside
    ],
)
def test_one_weight_that_is_off(folder, tiny_checkpoint, graph, name, change):
    """The planted fault: everything lists, hashes and loads as it should."""
    offset, _ = extents(folder, f"{graph}.fp32.ort.onnx")[f"weights.{name}"]
    weights = bytearray((folder / WEIGHTS).read_bytes())
    np.frombuffer(weights, np.float32, 4, offset)[3] += change
    forge(folder, {WEIGHTS: bytes(weights)})
    assert failed(folder, tiny_checkpoint) == both(graph)


@pytest.mark.parametrize(
    ("graph", "lowering"),
    [("encoder", "ort"), ("encoder", "tensorrt"), ("decode_step", "ort"), ("decode_step", "tensorrt")],
)
@pytest.mark.parametrize("attribute", ["scale", "epsilon"])
def test_an_attribute_that_is_off(folder, tiny_checkpoint, graph, lowering, attribute):
    """Scaled as everybody but T5 does, or another constant in the norm: in one operator of one lowering."""
    file = f"{graph}.fp32.{lowering}.onnx"
    model = onnx.load(folder / file, load_external_data=False)
    found = [entry for node in model.graph.node for entry in node.attribute if entry.name == attribute]
    found[-1].f = {"scale": 0.25, "epsilon": 1e-3}[attribute]
    forge(folder, {file: model.SerializeToString()})
    assert failed(folder, tiny_checkpoint) == {(graph, lowering)}


def test_a_log_probability_that_is_off(folder, tiny_checkpoint):
    """Only the exponent's base: tokens and logits are right."""
    file = "decode_step.fp32.ort.onnx"
    model = onnx.load(folder / file, load_external_data=False)
    [node] = [node for node in model.graph.node if node.op_type == "Log"]
    name = node.output[0]
    node.output[0] = "natural"
    scale = onnx.numpy_helper.from_array(np.array(1.4427, np.float32), "per_bit")
    model.graph.initializer.append(scale)
    index = list(model.graph.node).index(node)
    model.graph.node.insert(index + 1, onnx.helper.make_node("Mul", ["natural", "per_bit"], [name]))
    forge(folder, {file: model.SerializeToString()})
    assert failed(folder, tiny_checkpoint) == {("decode_step", "ort")}


def test_another_checkpoint(tiny_folder, tiny_checkpoint):
    other = replace(tiny_checkpoint, tensors=random_tensors(TINY_MODEL, seed=8))
    assert failed(tiny_folder, other) == both(*GRAPH_NAMES)


@pytest.mark.parametrize(
    ("model", "features"),
    [
        ({"position_base": 256}, {}),
        ({"max_length": 95}, {}),
        ({"start_token": 2}, {}),
        ({"vocab_size": 1535}, {}),
        ({"d_ff": 64}, {}),
        ({}, {"mel_norm": True}),
        ({}, {"frontend": "torchaudio"}),
        ({}, {"f_max": 7000.0}),
    ],
)
def test_another_model(tiny_bundle, model, features):
    model, features = replace(TINY_MODEL, **model), replace(TINY_FEATURES, **features)
    other = Checkpoint(model, features, random_tensors(model, seed=7), "other.pth", None)
    with pytest.raises(CheckpointError, match=r"other\.pth is another model than .*: name the one it was made from"):
        verify_bundle(tiny_bundle, other)


@pytest.mark.parametrize(("family", "model"), [("yourmt3", "mt3"), ("mt3", "yptf-multi")])
def test_a_model_of_the_other_family_is_named_before_weights_are_read(
    capsys, monkeypatch, tiny_folder, tiny_bundle, channels_bundle, family, model
):
    bundle = channels_bundle if family == "yourmt3" else tiny_bundle
    monkeypatch.setattr("mt3_runtime.bundle.open_bundle", lambda _: bundle)
    options = ["--checkpoint", "none.pth", *(["--model", model] if model != "mt3" else [])]
    assert cli.main(["verify", str(tiny_folder), *options]) == 2
    fix = "give --model mt3" if family == "mt3" else "give --model with its name (ymt3plus, yptf-single"
    assert f"{tiny_folder} is a bundle of family {family}, not of {model}: {fix}" in capsys.readouterr().err


def test_fp16_weights_taken_for_fp32(tiny_folder, tmp_path, tiny_checkpoint):
    folder = FastExport(tiny_folder)(tmp_path / "half", weights_storage="fp16")
    assert failed(folder, tiny_checkpoint) == set()
    data = json.loads((folder / "manifest.json").read_text())
    data["origin"]["weights_storage"] = "fp32"
    (folder / "manifest.json").write_bytes(seal(data))
    assert failed(folder, tiny_checkpoint) == both(*GRAPH_NAMES)


def test_a_damaged_bundle_is_refused_first(folder, tiny_checkpoint):
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[1] ^= 1
    (folder / WEIGHTS).write_bytes(weights)
    with pytest.raises(BundleError, match="not what the manifest lists"):
        verify_bundle(open_bundle(folder), tiny_checkpoint)


def test_features_are_music(tiny_bundle):
    first, again, other = (chord_features(TINY_FEATURES, 2, seed) for seed in (0, 0, 1))
    assert first.shape == (2, 256, 512)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.isfinite(first).all()
    loud = first[0].max(axis=1)
    assert loud.max() > 2  # a chord; noise alone stays below
    assert first.std() > 1


# ---- the comparison ---------------------------------------------------------------------------------------


def test_errors_are_the_worst_of_all_arrays():
    compare = Comparison()
    compare.arrays(np.array([[3.0, 4.5]], np.float32), np.array([[3.0, 4.0]]))
    compare.arrays(np.array([[1000.0, 1.0]], np.float32), np.array([[1000.0, 0.0]]))
    assert compare.largest == 1.0
    assert compare.relative == pytest.approx(0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_what_is_not_finite_is_never_forgotten(value, when):
    compare = Comparison()
    for i in range(3):
        found = np.ones((2, 4), np.float32)
        found[1, 2] = value if i == when else 1
        compare.step(np.zeros(2, np.int64), found, np.ones((2, 4)))
    assert not np.isfinite(compare.largest)
    assert not np.isfinite(compare.relative)
    report = GraphReport("decode_step", "ort", "fp32", compare.largest, compare.relative, 1e-5, *compare.counts)
    assert not report.passed
    assert "FAIL" in report.to_text()


@pytest.mark.parametrize(
    ("found", "wanted"), [((1, 4), (2, 4)), ((2, 1), (2, 4)), ((2, 4, 1), (2, 4)), ((2, 0), (2, 4))]
)
def test_shapes_are_compared_before_numbers(found, wanted):
    with pytest.raises(BundleError, match=r"a graph gives .*: export the bundle again"):
        Comparison().arrays(np.ones(found, np.float32), np.ones(wanted))


def test_near_ties_are_counted_apart():
    """An error of 0.25 everywhere: two logits may change places if they are no more than twice that apart."""
    wanted = np.array(
        [
            [5.0, 4.0, 0.0],  # agrees
            [5.0, 4.75, 0.0],  # a tie, and the other one was chosen
            [5.0, 4.5, 0.0],  # just a tie
            [5.0, 4.25, 0.0],  # too far apart
            [5.0, 4.75, 0.0],  # a tie, but something else was chosen
            [5.0, 5.0, 0.0],  # equal: the second was chosen
        ]
    )
    compare = Comparison()
    compare.step(np.array([0, 1, 1, 1, 2, 1]), (wanted + 0.25).astype(np.float32), wanted)
    assert compare.counts == [6, 1, 3]
    compare.step(np.array([0] * 6), wanted.astype(np.float32), wanted)
    assert compare.counts == [12, 7, 3]


def test_without_an_error_there_are_no_ties():
    wanted = np.array([[1.0, 1.0 - 1e-7, 0.0]])
    compare = Comparison()
    compare.step(np.array([1]), wanted, wanted)
    assert compare.counts == [1, 0, 0]


def test_log_probabilities_are_measured_against_the_logits():
    logits = np.array([[10.0, 0.0, 0.0], [1.0, 2.0, 3.0]], np.float32)
    exact = np.array([-np.log(1 + 2 * np.exp(-10)), -np.log(1 + np.exp(-1) + np.exp(-2))])
    compare = Comparison()
    compare.log_prob(exact, logits)
    assert compare.relative < 1e-12
    compare.log_prob(exact + np.array([0.0, 0.01]), logits)
    assert compare.relative == pytest.approx(0.001)
    compare.log_prob(np.array([0.0, np.nan]), logits)
    assert np.isnan(compare.relative)


@pytest.mark.parametrize(
    ("relative", "tokens", "passed"),
    [
        (1e-5, (4, 4, 0), True),
        (1.1e-5, (4, 4, 0), False),
        (0.0, (4, 3, 1), True),
        (0.0, (4, 3, 0), False),
        (0.0, (4, 0, 0), False),
        (float("nan"), (4, 4, 0), False),
        (float("inf"), (0, 0, 0), False),
        (0.0, (0, 0, 0), True),
    ],
)
def test_what_passes(relative, tokens, passed):
    report = GraphReport("decode_step", "ort", "fp32", 0.0, relative, 1e-5, *tokens)
    assert report.passed is passed
    assert report.to_dict()["passed"] is passed
    assert report.to_text().startswith("ok  " if passed else "FAIL")


# ---- several channels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [0.0, 1e-3])
def test_every_channel_counts(change):
    """The graph is torch in float32, with one weight of the decoder off or not: no tracing, no ONNX."""
    checkpoint = channel_checkpoint()
    features = chord_features(checkpoint.features, 2, 0)
    assert features.shape == (2, 17, 1024)
    assert (features.min(), features.max()) == (0.0, pytest.approx(1, abs=0.01))
    parts = checkpoint.model, checkpoint.features
    reference = Reference(
        build_modules(*parts, checkpoint.tensors, Eager(), checkpoint.design), features, 5, checkpoint.model
    )
    key = "decoder.block.1.layer.1.EncDecAttention.o.weight"
    tensors = checkpoint.tensors | {key: checkpoint.tensors[key] * (1 + change)}
    modules = build_modules(*parts, tensors, Eager(), checkpoint.design)
    for graph, module in modules.items():

        def runner(inputs, module=module):
            with torch.inference_mode():
                outputs = module(*map(torch.from_numpy, inputs))
            return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

        compare = Comparison()
        reference.run(graph, runner, compare)
        assert (compare.relative > 1e-5) == (graph == "decode_step" and change > 0)
        assert compare.relative < 1e-2
        assert compare.counts[0] == (2 * 3 * 5 if graph == "decode_step" else 0)
    states = reference.states
    assert states.shape == (2, 3, 17, 32)
    assert (states[:, 0] - states[:, 1]).abs().max() > 0.01


def test_segments_that_leave_a_choice_of_experts_to_rounding_are_passed_over():
    """A router that all but ties on some of the segments, as by chance every third of full size does."""
    checkpoint = channel_checkpoint()
    routing, seen = Routing(), []

    class Router(torch.nn.Module):
        def forward(self, features):
            assert features.dtype == torch.float64
            seen.append(features.float().numpy())
            gap = (3e-6, 0.5, 2e-5, 9e-6, 0.2)[len(seen) - 1]
            logits = torch.tensor([[2.0, 1.0, 1.0 - gap, 0.0]], dtype=torch.float64)
            matrices = [(torch.eye(3).double(),) * 3] * 4
            routing.experts(torch.ones(1, 3).double(), logits.softmax(-1), matrices, 2)

    found = decided_features(Router(), routing, checkpoint.features, 3, 5)
    np.testing.assert_array_equal(found, np.concatenate([seen[1], seen[4], seen[2]]))
    assert len(seen) == 5
    np.testing.assert_array_equal(seen[1], chord_features(checkpoint.features, 1, 6))


def test_experts_that_all_serve_leave_no_choice():
    routing = Routing()
    matrices = [(torch.eye(3),) * 3] * 2
    routing.experts(torch.ones(1, 3), torch.tensor([[0.5, 0.5]]), matrices, 2)
    assert routing.gap == np.inf
    routing.experts(torch.ones(2, 3), torch.tensor([[0.7, 0.3], [0.6, 0.4]]), matrices, 1)
    assert routing.gap == pytest.approx(np.log(1.5))
