"""Products in the forms that TensorRT has kernels for: the same numbers, and no weights wider than they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mt3_export import engine_builder
from mt3_export.engine_builder import Target, make_logger
from mt3_export.trt_forms import own_casts, products_as_sums
from mt3_runtime.trt import import_tensorrt

F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.fixture(scope="module")
def trt():
    return import_tensorrt("tensorrt-rtx")


def twins(rng) -> onnx.ModelProto:
    """Two products of halves, summed in float32, that read one cast of x, and one product left in float32."""

    def cast(source, target, to):
        return helper.make_node("Cast", [source], [target], to=to)

    nodes = [cast("x", "wide", F32)]
    for name in "ab":
        nodes += [cast(f"w{name}", f"v{name}", F32), helper.make_node("MatMul", ["wide", f"v{name}"], [f"p{name}"])]
        nodes.append(cast(f"p{name}", name, F16))
    nodes.append(helper.make_node("MatMul", ["wide", "wc"], ["c"]))
    matrices = [
        numpy_helper.from_array(rng.standard_normal((512, 384)).astype(np.float16), f"w{name}") for name in "ab"
    ]
    matrices.append(numpy_helper.from_array(rng.standard_normal((512, 8)).astype(np.float32), "wc"))
    values = [("x", F16, 512), ("a", F16, 384), ("b", F16, 384), ("c", F32, 8)]
    infos = [helper.make_tensor_value_info(name, kind, ["rows", 16, width]) for name, kind, width in values]
    graph = helper.make_graph(nodes, "twins", infos[:1], infos[1:], matrices)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def outputs(model: onnx.ModelProto, x) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def test_forms_change_no_result():
    rng = np.random.default_rng(5)
    model = twins(rng)
    x = rng.standard_normal((3, 16, 512)).astype(np.float16)
    before = outputs(model, x)
    assert own_casts(model.graph) == 2
    assert products_as_sums(model.graph) == 1
    onnx.checker.check_model(model)
    after = outputs(model, x)
    for old, new in zip(before[:2], after[:2], strict=True):
        np.testing.assert_array_equal(old, new)
    exact = x.astype(np.float64) @ numpy_helper.to_array(model.graph.initializer[2]).astype(np.float64)
    np.testing.assert_allclose(after[2], exact, atol=1e-4)
    np.testing.assert_allclose(before[2], exact, atol=1e-4)


def test_shared_casts_cost_wide_weights_and_own_ones_do_not(trt):
    """What `own_casts` is for, measured: an engine must not hold more than its weights."""
    halves = 2 * 512 * 384 * 2  # bytes
    shared, own = (twins(np.random.default_rng(5)) for _ in range(2))
    own_casts(own.graph)
    for model in (shared, own):
        del model.graph.node[-1], model.graph.output[-1]  # without the product in float32
    assert built_size(trt, shared) > 2 * halves
    assert built_size(trt, own) < 1.5 * halves


def built_size(trt, model: onnx.ModelProto) -> int:
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(model.SerializeToString())
    config = builder.create_builder_config()
    engine_builder._configure(trt, config, Target("tensorrt-rtx", trt.__version__, ("sm_89",), None))
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 16, 512), (4, 16, 512), (8, 16, 512))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config).nbytes
