"""Bundles whose manifest and hashes are right, made to harm: what is left is what the engine is asked to load."""

from __future__ import annotations

import shutil

import onnx
import pytest
from onnx import TensorProto, helper

from bundle_cases import copied, forge, refusal
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import open_bundle

GRAPH = "cross_kv.fp32.ort.onnx"
WEIGHTS = "weights.fp32.bin"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return copied(tiny_folder, tmp_path / "bundle")


def load(folder, content: bytes) -> str:
    """The refusal of a bundle whose cross_kv graph is `content`, listed with its right hash."""
    forge(folder, {GRAPH: content})
    return refusal(lambda: OrtBackend(open_bundle(folder), slots=1, threads=1))


@pytest.mark.parametrize(
    ("domain", "operator", "attributes"),
    [
        ("ai.onnx.contrib", "PyOp", {}),
        ("com.microsoft", "EPContext", {"embed_mode": 0, "ep_cache_context": "engine.so", "source": "TensorRT"}),
    ],
)
def test_operators_that_are_not_the_engines_own(folder, domain, operator, attributes):
    model = onnx.load(folder / GRAPH, load_external_data=False)
    name = model.graph.output[0].name
    maker = next(node for node in model.graph.node if name in node.output)
    maker.output[0] = "inner"
    model.graph.node.append(helper.make_node(operator, ["inner"], [name], domain=domain, **attributes))
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    assert "cannot load cross_kv.fp32.ort.onnx" in load(folder, model.SerializeToString())


@pytest.mark.parametrize("location", ["../secret.bin", "absolute", "link.bin", "sub/../../secret.bin", "sub/link.bin"])
def test_weights_outside_the_folder(folder, tmp_path, location):
    secret = tmp_path / "secret.bin"
    shutil.copy(folder / WEIGHTS, secret)  # would do, were it not for the place
    (folder / "link.bin").symlink_to(secret)
    (folder / "sub").mkdir()
    (folder / "sub" / "link.bin").symlink_to(secret)
    model = onnx.load(folder / GRAPH, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(secret) if location == "absolute" else location
    load(folder, model.SerializeToString())


@pytest.mark.parametrize(("key", "value"), [("offset", 2**40), ("offset", -4096), ("length", 2**40), ("length", -1)])
def test_weights_beyond_the_file(folder, key, value):
    model = onnx.load(folder / GRAPH, load_external_data=False)
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert external
    for tensor in external:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = str(value)
    load(folder, model.SerializeToString())


def test_a_graph_of_other_sizes(folder):
    model = onnx.load(folder / GRAPH, load_external_data=False)
    for change in (swap_outputs, fix_rows, rename_input):
        other = onnx.ModelProto.FromString(model.SerializeToString())
        change(other.graph)
        assert "is not the cross_kv graph" in load(folder, other.SerializeToString())


def swap_outputs(graph):
    first, second = graph.output[0].name, graph.output[1].name
    graph.output[0].name, graph.output[1].name = second, first


def fix_rows(graph):
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def rename_input(graph):
    name = graph.input[0].name
    graph.input[0].name = "other"
    for node in graph.node:
        for index, value in enumerate(node.input):
            if value == name:
                node.input[index] = "other"


def test_the_bundle_itself_loads(folder):
    assert OrtBackend(open_bundle(folder), slots=1, threads=1).slots == 1
