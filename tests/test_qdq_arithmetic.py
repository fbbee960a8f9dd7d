"""What static 8 bits compute, against numpy; and the number that hardly any exceeds."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mt3_export.histogram import Histogram
from mt3_export.qdq import ARITHMETIC, quantize_static
from mt3_export.quantized import columns
from mt3_runtime.backends.ort import import_onnxruntime
from mt3_runtime.errors import BundleError

BOTH = pytest.mark.parametrize("lowering", ARITHMETIC)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph_of(nodes, matrices, width):
    """y [n, columns] of x [n, rows]; weights by name."""
    rows = next(iter(matrices.values())).shape[0]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(matrix, f"weights.{name}") for name, matrix in matrices.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))


def one_product(matrix, *, gated=False):
    nodes = [helper.make_node("Mul", ["x", "x"], ["h"], name="gate")] if gated else []
    nodes.append(helper.make_node("MatMul", ["h" if gated else "x", "weights.m"], ["y"], name="product"))
    return graph_of(nodes, {"m": matrix}, matrix.shape[1])


def run(model, x):
    data = ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    session = import_onnxruntime().InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@BOTH
def test_levels(lowering):
    """Halves go to the even level, what is too large to the last one; a matrix of ones changes nothing."""
    scale, model = 0.25, one_product(np.eye(8, dtype=np.float32))
    quantize_static(model, {"m": scale}, ARITHMETIC[lowering])
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 126.4, 400, -400]], np.float32) * scale
    found = run(model, x) / np.float32(scale)
    np.testing.assert_allclose(found, [[0, 2, 2, 0, -2, 126, 127, -128]], rtol=1e-6)


@BOTH
@pytest.mark.parametrize("gated", [False, True])
def test_product(lowering, gated):
    matrix, x = gaussian(96, 24), gaussian(9, 96, seed=1)
    matrix[:, 3] = 0
    x[4] *= 100  # beyond any scale, unless it is divided by its largest number
    model, how = one_product(matrix, gated=gated), ARITHMETIC[lowering]
    scale = 1 / 127 if gated else 0.03
    quantize_static(model, {} if gated else {"m": scale}, how)
    given = x * x if gated else x
    largest = np.abs(given).max(1, keepdims=True) if gated else np.float32(1)
    levels = np.clip(np.rint(given / largest / np.float32(scale)), -128, 127)
    step = np.where(np.abs(matrix).max(0), np.abs(matrix).max(0) / {"ort": 64, "tensorrt": 127}[lowering], 1)
    wanted = (levels * scale) @ (np.rint(matrix / step) * step) * largest
    np.testing.assert_allclose(run(model, x), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    off = np.linalg.norm(run(model, x) - given @ matrix, axis=1) / np.linalg.norm(given @ matrix, axis=1)
    assert bool(off[4] < 0.03) == gated
    assert (np.delete(off, 4) < 0.03).all()


@BOTH
def test_what_several_products_read_is_rounded_once(lowering):
    first, second, x = gaussian(96, 24), gaussian(96, 24, seed=2), gaussian(9, 96, seed=1)
    nodes = [helper.make_node("MatMul", ["x", f"weights.{name}"], [f"y{name}"], name=name) for name in "mn"]
    both = graph_of([*nodes, helper.make_node("Sub", ["ym", "yn"], ["y"])], {"m": first, "n": second}, 24)
    quantize_static(both, {"m": 0.03, "n": 0.03}, ARITHMETIC[lowering])
    assert [node.op_type for node in both.graph].count("QuantizeLinear") == 1
    alone = []
    for matrix in (first, second):
        model = one_product(matrix)
        quantize_static(model, {"m": 0.03}, ARITHMETIC[lowering])
        alone.append(run(model, x))
    np.testing.assert_allclose(run(both, x), alone[0] - alone[1], rtol=1e-5, atol=1e-4)


def test_what_is_kept():
    model = one_product(gaussian(96, 24))
    quantize_static(model, {"m": 0.03}, ARITHMETIC["ort"], keep={"m"})
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_weights_that_are_no_numbers():
    matrix = gaussian(96, 24)
    matrix[5, 7] = np.nan
    with pytest.raises(BundleError, match=r"weights of m are not all finite: export"):
        quantize_static(one_product(matrix), {"m": 0.03}, ARITHMETIC["ort"])


def test_columns():
    levels, scales = columns(gaussian(64, 7), 127)
    assert np.abs(levels).max(0).tolist() == [127] * 7
    assert (np.abs(levels * scales - gaussian(64, 7)) <= scales * 0.5001).all()


@pytest.mark.parametrize("share", [0.5, 0.99, 0.99999, 1.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e8])
def test_threshold(share, scale):
    """The number that stands at that place when all are sorted, and up to 1/256 above."""
    numbers = scale * gaussian(1000, 30) ** 3
    histogram = Histogram()
    for part in (numbers[700:], numbers[:700], np.zeros(10**6, np.float32)):
        assert histogram.add(part)
    exact = np.sort(np.abs(numbers), axis=None)[int(np.ceil(share * numbers.size)) - 1]
    assert exact < histogram.threshold(share) <= exact * (1 + 1.001 / 256)


def test_threshold_of_nothing():
    histogram = Histogram()
    assert not histogram.add(np.array([1.0, np.nan], np.float32))
    assert not histogram.add(np.array([-np.inf], np.float32))
    assert histogram.add(np.zeros(5, np.float32))
    assert histogram.threshold(1.0) is None
