"""Verification of bundles whose segments are told of the one before: it finds what is wrong, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

from bundle_cases import copied, forge, seal
from conftest import TINY_FEATURES
from graph_cases import extents, one_thread
from memory_cases import CONTEXT, PREFIX_MEMORY, SPAN, export_with
from mt3_export.lowering import Eager
from mt3_export.network import build_modules
from mt3_export.reference import Reference, told_tokens
from mt3_export.verify import chord_features, verify_bundle
from mt3_runtime.bundle import open_bundle

WEIGHTS = "weights.fp32.bin"
GRAPHS = {
    "context": ("encoder", "memory", "cross_kv", "decode_step"),
    "prefix": ("encoder", "memory", "cross_kv", "prefix", "decode_step"),
}


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture
def checkpoint(request, kind):
    return request.getfixturevalue(f"{kind}_checkpoint")


@pytest.fixture
def folder(request, kind, tmp_path):
    return copied(request.getfixturevalue(f"{kind}_folder"), tmp_path / kind)


def failed(folder, checkpoint):
    """The graphs, with their lowerings, that do not pass."""
    reports = verify_bundle(open_bundle(folder), checkpoint, steps=4)
    return {(report.graph, report.lowering) for report in reports if not report.passed}


def both(*graphs):
    return {(graph, lowering) for graph in graphs for lowering in ("ort", "tensorrt")}


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("segments", [1, 3])
def test_the_bundle_as_it_is(folder, checkpoint, kind, segments):
    reports = verify_bundle(open_bundle(folder), checkpoint, segments=segments, steps=12)
    forms = [(graph, lowering) for lowering in ("ort", "tensorrt") for graph in GRAPHS[kind]]
    assert [(report.graph, report.lowering) for report in reports] == forms
    for report in reports:
        assert report.passed
        assert 0 < report.relative_error < 2e-6
        assert report.tokens == (12 * segments if report.graph == "decode_step" else 0)


@pytest.mark.parametrize(
    ("kind", "graph", "name", "place", "value"),
    [
        ("context", "memory", "projection", 3, 1.0),
        ("context", "memory", "query", 3, 1.0),
        ("context", "memory", "key_value", 3, 1.0),
        ("context", "memory", "output", 3, 1.0),
        ("context", "memory", "feed_forward.output", 3, 1.0),
        ("context", "memory", "positions", 3, 1.0),
        ("context", "memory", "fill", -1, 10.0),  # of the last of 1024 positions
        ("prefix", "prefix", "last_key_value", 3, 1.0),
        ("prefix", "prefix", "positions", 3, 1.0),
        ("prefix", "prefix", "mask", 1, 0.0),  # the first vector sees the second
    ],
)
def test_one_weight_that_is_off(folder, checkpoint, kind, graph, name, place, value):
    """The planted fault: everything lists, hashes and loads as it should."""
    offset, size = extents(folder, f"{graph}.fp32.ort.onnx")[f"weights.{name}"]
    weights = bytearray((folder / WEIGHTS).read_bytes())
    np.frombuffer(weights, np.float32, size // 4, offset)[place] = value
    forge(folder, {WEIGHTS: bytes(weights)})
    assert failed(folder, checkpoint) == both(graph)


@pytest.mark.parametrize("kind", ["context"])
@pytest.mark.parametrize("lowering", ["ort", "tensorrt"])
def test_attention_that_is_scaled(folder, checkpoint, kind, lowering):
    file = f"memory.fp32.{lowering}.onnx"
    model = onnx.load(folder / file, load_external_data=False)
    [scale] = [entry for node in model.graph.node for entry in node.attribute if entry.name == "scale"]
    scale.f = 0.25
    forge(folder, {file: model.SerializeToString()})
    assert failed(folder, checkpoint) == {("memory", lowering)}


@pytest.mark.parametrize("kind", ["prefix"])
def test_fp16_weights(folder, checkpoint, kind, tmp_path):
    """The table of fill is made from rounded weights, and is not rounded itself."""
    stored = dict.fromkeys(GRAPHS[kind], folder)
    half = export_with(checkpoint, tmp_path / "half", stored, weights_storage="fp16")
    assert failed(half, checkpoint) == set()
    assert (half / WEIGHTS).stat().st_size < 0.8 * (folder / WEIGHTS).stat().st_size
    data = json.loads((half / "manifest.json").read_text())
    data["origin"]["weights_storage"] = "fp32"
    (half / "manifest.json").write_bytes(seal(data))
    assert failed(half, checkpoint) == both(*GRAPHS[kind])


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_reference_does_not_read_the_table_of_fill(checkpoint, kind):
    parts = checkpoint.model, TINY_FEATURES
    features = chord_features(TINY_FEATURES, 2, 0)
    memories = []
    for fill in (None, torch.nan):
        modules = build_modules(*parts, checkpoint.tensors, Eager())
        if fill is not None:
            modules["memory"].fill.fill_(fill)
        memories.append(Reference(modules, features, 1, checkpoint.model).memory[0])
    assert torch.equal(*memories)


@pytest.mark.parametrize("memory", [CONTEXT, PREFIX_MEMORY])
def test_what_rows_are_told(context_checkpoint, memory):
    told = told_tokens(context_checkpoint.model, memory, 40, 0).numpy()
    assert told.shape == (40, SPAN)
    assert told.dtype == np.int32
    assert told[0].tolist() == [*memory.first_tokens, *[0] * (SPAN - len(memory.first_tokens))]
    counts = np.array([np.flatnonzero(row)[-1] + 1 for row in told[1:]])
    assert counts.min() < 64
    assert 448 < counts.max() <= SPAN // 2
    assert len({tuple(row) for row in told.tolist()}) == 40
