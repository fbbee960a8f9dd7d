"""Half precision emulated on the CPU: the rounding of the plan, and nothing else."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graph_cases import one_thread, relative_error
from half_cases import emulated as in_torch
from mt3_export.lab.emulation import LIMITS, emulate, halved
from mt3_export.lab.variants import VARIANTS, write_variant
from mt3_export.lowering import Eager, merge_heads, split_heads
from mt3_export.network import build_modules
from mt3_export.precision import PLANS
from mt3_export.products import products
from mt3_export.reference import Comparison, Reference
from mt3_export.verify import chord_features
from mt3_runtime.backends.ort import import_onnxruntime, open_session

TYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
HALVES = tuple(TYPES)


class Fused(Eager):
    """The types of a plan, with attention as one operator: what is inside of it is float32."""

    def attention(self, query, key, value, heads):
        scores = self.widen(split_heads(query, heads)) @ self.widen(key).transpose(-1, -2)
        return merge_heads(self.narrow(scores.softmax(-1) @ self.widen(value)))

    def cached_attention(self, qkv, key, value, position, heads):
        _, key, value = super().cached_attention(qkv, key, value, position, heads)
        written = int(position[0]) + 1  # all rows are as far
        query = qkv.chunk(3, -1)[0]
        return self.attention(query, key[:, :, :written], value[:, :, :written], heads), key, value


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def variants(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    return {half: write_variant(tiny_bundle, VARIANTS[half], folder / half, {}) for half in HALVES}


def load_graph(bundle, name):
    return ir.load(bundle.path / bundle.graph(name, "ort", "fp32").file).graph


def rounded(array, half):
    with np.errstate(over="ignore"):
        return array.astype(TYPES[half]).astype(np.float32)


def one_product(matrix, *, gated):
    """A graph with a product, behind a multiplication if `gated`."""
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("MatMul", ["m" if gated else "x", "weights.layer"], ["y"], name="node_matmul")]
    if gated:
        nodes.insert(0, onnx.helper.make_node("Mul", ["x", "gate"], ["m"], name="node_mul"))
    inputs = [value("x", 1, ["rows", len(matrix)])] + ([value("gate", 1, [1])] if gated else [])
    weights = [onnx.numpy_helper.from_array(matrix, "weights.layer")]
    graph = onnx.helper.make_graph(nodes, "one", inputs, [value("y", 1, ["rows", matrix.shape[1]])], weights)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10))


def run(model, feed):
    text = ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(text))
    return import_onnxruntime().InferenceSession(text, providers=["CPUExecutionProvider"]).run(["y"], feed)[0]


@pytest.mark.parametrize("half", HALVES)
def test_one_product_by_hand(half):
    rng = np.random.default_rng(0)
    x, matrix = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 16), (16, 4)))
    model = one_product(matrix, gated=False)
    emulate(model, half)
    wanted = rounded(rounded(x, half).astype(np.float64) @ rounded(matrix, half), half)
    found = run(model, {"x": x})
    assert np.array_equal(found, rounded(found, half))
    # A sum in float32 may round to the neighbour of what the exact one rounds to.
    assert np.mean(found == wanted) > 0.9
    assert relative_error(found, wanted) < 2.0 ** -(11 if half == "fp16" else 8)
    assert relative_error(found, x @ matrix) > 1e-5


def test_rows_that_gates_let_through_are_divided_in_fp16_and_no_others():
    matrix = np.eye(4, dtype=np.float32)
    x, gate = np.array([[1e6, 2e6, 3e6, 4e6], [0, 0, 0, 0]], np.float32), np.ones(1, np.float32)
    found = {}
    for half in HALVES:
        for gated in (True, False):
            model = one_product(matrix, gated=gated)
            emulate(model, half)
            found[half, gated] = run(model, {"x": x} | ({"gate": gate} if gated else {}))
    np.testing.assert_allclose(found["fp16", True], x, rtol=1e-3)
    assert not np.isfinite(found["fp16", False][0]).any()
    assert not found["fp16", True][1].any()
    for gated in (True, False):
        assert np.array_equal(found["bf16", gated], rounded(x, "bf16"))


def test_kept_products_are_left_alone():
    matrix, x = np.full((2, 2), 1e5, np.float32), np.ones((1, 2), np.float32)
    model = one_product(matrix, gated=False)
    model.graph.inputs[0].name, model.graph.outputs[0].name = "features", "logits"  # float32 in every precision
    emulate(model, "fp16", keep={"layer"})
    assert [node.op_type for node in model.graph] == ["MatMul"]
    session = import_onnxruntime().InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert session.run(None, {"features": x})[0].tolist() == [[2e5, 2e5]]


def test_around_kept_products_stays_half_what_is_half_in_any_case(tiny_bundle, tmp_path):
    """What attention and other graphs take and give: an overflow there is not mended by a plan."""
    every = {graph: set(halved(load_graph(tiny_bundle, graph))) for graph in ("encoder", "cross_kv", "decode_step")}
    made = write_variant(tiny_bundle, VARIANTS["bf16"], tmp_path / "kept", every)
    roundings = {}
    for graph in every:
        nodes = list(load_graph(made, graph))
        roundings[graph] = sorted(
            node.inputs[0].name for node in nodes if node.op_type == "Cast" and node.outputs[0].name.endswith(".narrow")
        )
    layers = 2
    assert len(roundings["encoder"]) == 2 * layers  # query-key-value, and attention's output
    assert len(roundings["cross_kv"]) == 1 + 2 * layers  # states, keys and values
    assert len(roundings["decode_step"]) == 4 * layers  # of both attentions


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("graph", ["encoder", "cross_kv", "decode_step"])
def test_graphs_are_those_of_torch_in_the_types_of_the_plan(half, graph, tiny_bundle, tiny_checkpoint, variants):
    """What is left between them is where sums of another order are rounded to the other side."""
    parts = (tiny_checkpoint.model, tiny_checkpoint.features, tiny_checkpoint.tensors)
    theirs = in_torch(build_modules(*parts, Fused(PLANS[half]), None)[graph], graph, half)
    session = open_session(variants[half], variants[half].graph(graph, "ort", "fp32"), threads=1)
    spec = next(spec for spec in tiny_bundle.manifest.contracts if spec.name == graph)
    between = []

    def both(inputs):
        arrays = [array.astype(tensor.dtype) for tensor, array in zip(spec.inputs, inputs, strict=True)]
        if graph != "encoder":  # what a graph of half precision gave
            arrays = [rounded(array, half) if array.dtype == np.float32 else array for array in arrays]
        found = session.run(spec.output_names, dict(zip(spec.input_names, arrays, strict=True)))
        between.append(
            relative_error(rounded(found[-1], half) if graph == "encoder" else found[-1], theirs(arrays)[-1])
        )
        return found

    of_rounding = Comparison()
    features = chord_features(tiny_checkpoint.features, 1, seed=0)
    Reference(build_modules(*parts, Eager(), None), features, 12, tiny_checkpoint.model).run(graph, both, of_rounding)
    assert of_rounding.relative > {"fp16": 1e-4, "bf16": 8e-4}[half]
    assert max(between) < 0.4 * of_rounding.relative
    # A sum that falls to the other side is seen all over an encoder, but in few steps; in which, processors differ.
    assert graph == "encoder" or np.median(between) < 1e-3 * of_rounding.relative


def test_products_of_half_precision(tiny_bundle):
    for name in ("encoder", "cross_kv", "decode_step"):
        graph = load_graph(tiny_bundle, name)
        every = list(products(graph))
        assert list(halved(graph)) == [layer for layer in every if layer != "head"]
        assert len(every) == sum(node.op_type == "MatMul" for node in graph)
    assert LIMITS["fp16"] == float(np.finfo(np.float16).max)
    assert LIMITS["bf16"] == float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
