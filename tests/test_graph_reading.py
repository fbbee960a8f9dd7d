"""Graphs that the runtime would refuse, in bundles whose hashes are right: they are refused before any work."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bundle_cases import copied, forge, refusal
from mt3_export.cli import main
from mt3_export.graph_reading import read_graph
from mt3_export.inspection import inspect_bundle
from mt3_export.lab.variants import VARIANTS, write_variant
from mt3_export.quantize_bundle import quantize_bundle
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import BundleError

GRAPH = "cross_kv.fp32.ort.onnx"
WEIGHTS = "weights.fp32.bin"
FIX = ": copy or export the bundle again"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return copied(tiny_folder, tmp_path / "bundle")


def external(model):
    return next(tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)


def place(key, value):
    def change(model):
        for entry in external(model).external_data:
            if entry.key == key:
                entry.value = value

    return change


def drop_weight(model):
    model.graph.initializer.remove(external(model))


def drop_nodes(model):
    del model.graph.node[:]


def drop_input(model):
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    del product.input[1:]


def drop_output(model):
    model.graph.output[0].name = "other"


def read_what_is_not_there_inside(model):
    inner = helper.make_node("Identity", ["nowhere"], ["inside"])
    ends = [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)]
    body = helper.make_graph([inner], "body", [], ends)
    condition = helper.make_tensor("condition", TensorProto.BOOL, [], [True])
    model.graph.initializer.append(condition)
    model.graph.node.append(helper.make_node("If", ["condition"], ["x"], then_branch=body, else_branch=body))


def cut_small(model):
    small = next(tensor for tensor in model.graph.initializer if tensor.data_location != TensorProto.EXTERNAL)
    small.raw_data = small.raw_data[:-1]


def no_type(model):
    next(t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL).data_type = 99


def widen(model):
    external(model).dims[0] += 1


CHANGES = {
    "offset before the file": (place("offset", "-4096"), "does not stand in"),
    "offset behind the file": (place("offset", str(2**40)), "does not stand in"),
    "offset of a text": (place("offset", "far"), "no graph of ONNX"),
    "length": (place("length", "4"), "does not stand in"),
    "another folder": (place("location", "../secret.bin"), "does not stand in weights.fp32.bin"),
    "another file": (place("location", "/etc/passwd"), "does not stand in weights.fp32.bin"),
    "the graph itself": (place("location", GRAPH), "does not stand in weights.fp32.bin"),
    "larger matrix": (widen, "does not stand in"),
    "small tensor": (cut_small, "no graph of ONNX"),
    "a type that is none": (no_type, "no graph of ONNX"),
    "no weight": (drop_weight, "nothing in it gives 'weights."),
    "no output": (drop_output, "nothing in it gives 'other'"),
    "inner graph": (read_what_is_not_there_inside, "nothing in it gives 'nowhere'"),
    "no nodes": (drop_nodes, "it has no nodes"),
    "one factor": (drop_input, "'MatMul' has too few or too many inputs"),
}


def check_refused(folder, told, tmp_path):
    bundle = open_bundle(folder)
    message = refusal(read_graph, bundle, bundle.graph("cross_kv", "ort", "fp32"))
    assert f"{GRAPH} cannot be used (" in message
    assert told in message
    assert message.endswith(FIX)
    assert refusal(inspect_bundle, folder) == message
    assert told in refusal(quantize_bundle, bundle, tmp_path / "made", ["int8"])
    with pytest.raises(BundleError):
        OrtBackend(bundle, slots=1, threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("case", CHANGES)
def test_graphs_that_do_not_hold_together(folder, tmp_path, case):
    change, told = CHANGES[case]
    model = onnx.load(folder / GRAPH, load_external_data=False)
    change(model)
    check_refused(forge(folder, {GRAPH: model.SerializeToString()}), told, tmp_path)


@pytest.mark.parametrize(("content", "told"), [(b"\xff" * 99, "no graph of ONNX"), (b"", "it has no nodes")])
def test_files_that_hold_no_graph(folder, tmp_path, content, told):
    check_refused(forge(folder, {GRAPH: content}), told, tmp_path)


def test_names_that_are_no_text(folder, tmp_path):
    content = (folder / GRAPH).read_bytes()
    name = onnx.load(folder / GRAPH, load_external_data=False).graph.output[0].name.encode()
    other = b"\xff" * len(name)
    bundle = open_bundle(forge(folder, {GRAPH: content.replace(name, other)}))
    assert "no graph of ONNX" in refusal(inspect_bundle, folder)
    assert "no graph of ONNX" in refusal(quantize_bundle, bundle, tmp_path / "made", ["int8"])


def test_weights_that_end_early(folder, tmp_path):
    forge(folder, {WEIGHTS: (folder / WEIGHTS).read_bytes()[:4096]})
    assert "does not stand in weights.fp32.bin" in refusal(inspect_bundle, folder)
    refused = refusal(quantize_bundle, open_bundle(folder), tmp_path / "made", ["int8"])
    assert "does not stand in weights.fp32.bin" in refused


def test_a_graph_inside_of_a_node_sees_what_stands_around_it(folder):
    model = onnx.load(folder / GRAPH, load_external_data=False)
    read_what_is_not_there_inside(model)
    for attribute in model.graph.node[-1].attribute:
        attribute.g.node[0].input[0] = model.graph.input[0].name
    forge(folder, {GRAPH: model.SerializeToString()})
    assert inspect_bundle(folder).operators[GRAPH]["If"] == 1


def test_weights_are_not_read(folder):
    (folder / WEIGHTS).unlink()
    bundle = open_bundle(folder)
    graph = read_graph(bundle, bundle.graph("cross_kv", "ort", "fp32")).graph
    assert [output.name for output in graph.outputs]


def test_a_command_says_so_in_one_line(folder, capsys):
    forge(folder, {GRAPH: b"\xff" * 99})
    assert main(["inspect", str(folder)]) != 0
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == ""
    assert line.endswith(FIX)
    assert json.loads((folder / "manifest.json").read_bytes())["files"][GRAPH]["size"] == 99


def test_a_file_of_weights_may_have_another_name(folder, tiny_folder, tmp_path):
    """As some installers give one to every file of a package, to save space."""
    (tmp_path / "cache").hardlink_to(folder / WEIGHTS)
    bundle, original = open_bundle(folder), open_bundle(tiny_folder)
    for entry in (entry for entry in bundle.manifest.graphs if entry.lowering == "ort"):
        found, wanted = read_graph(bundle, entry).graph.initializers, read_graph(original, entry).graph.initializers
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value.const_value.numpy(), wanted[name].const_value.numpy())
    variant = write_variant(bundle, VARIANTS["int8"], tmp_path / "variant", {})
    OrtBackend(variant, slots=1, threads=1, precision="int8")
