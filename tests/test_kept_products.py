"""Products kept in float32 in graphs of half precision: what is computed, and that no input or output changes."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from conftest import TINY_FEATURES
from graph_cases import one_thread, relative_error
from half_cases import HALF_MODEL, half_checkpoint
from mt3_export import bundle_writer
from mt3_export.bundle_writer import export_bundle
from mt3_export.kept_products import keep_products
from mt3_export.lowering import Cuda, TensorRT
from mt3_export.mixed_plan import MixedPlan
from mt3_export.network import build_modules
from mt3_export.onnx_graph import trace
from mt3_export.precision import PLANS
from mt3_export.products import products, stored_weight, weights_of
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import BundleError, OptionError
from mt3_runtime.graphs import graph_specs

F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16
FORMS = ("tensorrt", "cuda")
SPECS = graph_specs(HALF_MODEL, TINY_FEATURES)
GATES = "layers.0.feed_forward.gates"
ROUNDING = 2.0**-11  # of a number, in fp16: at most this


def plan_of(graph: str, *names: str, precision: str = "fp16") -> MixedPlan:
    return MixedPlan(HALF_MODEL.name, precision, {graph: names})


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs, of float32 inputs that are rounded where the graph takes halves."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    halves = {value.name for value in session.get_inputs() if value.type == "tensor(float16)"}
    given = {name: array.astype(np.float16) if name in halves else array for name, array in inputs.items()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, given), strict=True))


def border(model: ir.Model) -> list[tuple]:
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, value.dtype, tuple(map(str, value.shape))) for value in values]


def check(model: ir.Model) -> None:
    """By ONNX's own checker, types and shapes too where all operators are its own."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=not any(node.domain for node in proto.graph.node))


# ---- graphs of a bundle ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load(half_folder):
    """Graphs of the tiny bundle in every precision, weights inside."""
    bundle = open_bundle(half_folder)

    def read(graph: str, precision: str = "fp32", lowering: str = "tensorrt") -> ir.Model:
        return ir.from_proto(onnx.load(bundle.path / bundle.graph(graph, lowering, precision).file))

    return read


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(11)

    def halves(*shape: int) -> np.ndarray:
        return (0.7 * rng.standard_normal(shape)).astype(np.float16).astype(np.float32)

    caches = {f"{kind}_{part}.0": halves(3, 2, 96, 16) for kind in ("cross", "self") for part in ("key", "value")}
    caches |= {f"cross_{part}.0": halves(3, 2, 256, 16) for part in ("key", "value")}
    return {
        "encoder": {"features": rng.standard_normal((2, 256, 512)).astype(np.float32)},
        "cross_kv": {"states": halves(2, 256, 32)},
        "decode_step": {"token": np.array([5, 9, 700], "i4"), "position": np.array([40, 3, 17], "i4"), **caches},
    }


def exact_weights(model: ir.Model) -> dict[str, np.ndarray]:
    """Of a graph in fp32."""
    found = products(model.graph).values()
    return {stored_weight(product.inputs[1]).name: weights_of(product) for product in found}


def keep(model: ir.Model, exact: ir.Model, graph: str, *names: str, precision: str = "fp16") -> ir.Model:
    keep_products(model.graph, graph, plan_of(graph, *names, precision=precision), exact_weights(exact))
    return model


@pytest.mark.parametrize("lowering", FORMS)
@pytest.mark.parametrize(
    # the encoder's and cross-attention's results are rounded in any case, and only once when all products are kept
    ("graph", "output", "shrinks"),
    [("encoder", "states", None), ("cross_kv", "cross_key.0", None), ("decode_step", "logits", 2.0)],
)
def test_error_shrinks_with_all_products_kept(load, inputs, graph, output, shrinks, lowering):
    exact = load(graph)
    names = list(products(exact.graph))
    half, kept = load(graph, "fp16", lowering), keep(load(graph, "fp16", lowering), exact, graph, *names)
    assert border(kept) == border(half)
    assert list(products(kept.graph)) == list(products(half.graph)) == names
    check(kept)
    assert {stored_weight(product.inputs[1]).dtype for product in products(kept.graph).values()} == {ir.DataType.FLOAT}
    wanted, before, after = (run(model, inputs[graph])[output] for model in (exact, half, kept))
    floor = relative_error(wanted.astype(np.float16), wanted)
    if shrinks:
        assert relative_error(after, wanted) < relative_error(before, wanted) / shrinks
    else:
        assert relative_error(before, wanted) > 1.35 * floor
        assert relative_error(after, wanted) < 1.15 * floor


@pytest.mark.parametrize("lowering", FORMS)
def test_only_what_is_named_changes(load, lowering):
    half = load("decode_step", "fp16", lowering)
    kept = keep(load("decode_step", "fp16", lowering), load("decode_step"), "decode_step", GATES, "head")
    wide = [name for name, product in products(kept.graph).items() if weight_type(product) == ir.DataType.FLOAT]
    assert wide == [GATES, "head"]
    changed = f"weights.{GATES}"
    before, after = (
        {name: value.const_value.numpy() for name, value in m.graph.initializers.items()} for m in (half, kept)
    )
    assert after.keys() - before.keys() == {f"{changed}.fp32"}
    assert before.keys() - after.keys() == {changed}
    assert after[f"{changed}.fp32"].dtype == np.float32
    np.testing.assert_array_equal(after[f"{changed}.fp32"].astype(np.float16), before[changed])
    again = keep(kept, load("decode_step"), "decode_step", GATES)  # nothing is left to be done
    assert len(again.graph) == len(kept.graph)


def weight_type(product: ir.Node) -> ir.DataType:
    return stored_weight(product.inputs[1]).dtype


def test_an_overflow_is_mended(load, inputs):
    """In the form for TensorRT: of the other ONNX Runtime drops roundings on a CPU."""
    exact = load("encoder")
    factor = np.float32(2.0**14)  # every weight still fits fp16, and their sums do not
    half = load("encoder", "fp16")
    for model, name in ((exact, f"weights.{GATES}"), (half, f"weights.{GATES}")):
        value = model.graph.initializers[name]
        array = (value.const_value.numpy() * factor).astype(value.const_value.numpy().dtype)
        assert np.isfinite(array).all()
        value.const_value = ir.tensor(array, name=name)
    wanted = run(exact, inputs["encoder"])["states"]
    assert not np.isfinite(run(half, inputs["encoder"])["states"]).all()
    states = run(keep(half, exact, "encoder", GATES), inputs["encoder"])["states"]
    assert relative_error(states, wanted) < 4 * ROUNDING


def test_bf16(load, inputs):
    """Numbers of bf16 run on no CPU: by ONNX's reference, against one product in float64 and one rounding."""
    exact = load("cross_kv")
    model = ir.to_proto(keep(load("cross_kv", "bf16"), exact, "cross_kv", "projections.0", precision="bf16"))
    states = inputs["cross_kv"]["states"].astype(ml_dtypes.bfloat16)
    found = onnx.reference.ReferenceEvaluator(model).run(None, {"states": states})[0]
    matrix = exact_weights(exact)["weights.projections.0"].astype(np.float64)
    wanted = (states.astype(np.float64) @ matrix).reshape(2, 256, 2, 16).transpose(0, 2, 1, 3)
    assert found.dtype == ml_dtypes.bfloat16
    off = np.abs(found.astype(np.float64) - wanted) / np.abs(wanted)
    assert off.max() < 2.0**-8  # half a place
    half = onnx.reference.ReferenceEvaluator(ir.to_proto(load("cross_kv", "bf16"))).run(None, {"states": states})[0]
    assert relative_error(half, wanted) > 1.3 * relative_error(found, wanted)


def test_names_and_weights_that_are_not_there(load):
    model, exact = load("cross_kv", "fp16"), exact_weights(load("cross_kv"))
    with pytest.raises(OptionError, match=r"'projection\.7', no product of cross_kv: use projections"):
        keep_products(model.graph, "cross_kv", plan_of("cross_kv", "projection.7"), exact)
    for wrong in ({}, {name: matrix.T[:3] for name, matrix in exact.items()}):
        with pytest.raises(BundleError, match=r"no weights in fp32 for weights\.projections\.0: export the bundle"):
            keep_products(model.graph, "cross_kv", plan_of("cross_kv", "projections.0"), wrong)


# ---- forms that the tiny bundle has not -----------------------------------------------------------------------------


def small(nodes: list, outputs: list[tuple[str, int]]) -> tuple[ir.Model, dict]:
    """A graph over x [4, 3, 16] in float32 and the weights a and b [16, 8] in half."""
    rng = np.random.default_rng(2)
    exact = {f"weights.{name}": rng.standard_normal((16, 8)).astype(np.float32) for name in "ab"}
    read = {name for node in nodes for name in node.input}
    casts = [cast(f"weights.{name}", f"wide.{name}", F32) for name in "ab" if f"wide.{name}" in read]
    for place, node in enumerate(nodes):
        node.name = node.name or f"n{place}"
    graph = helper.make_graph(
        [*casts, *nodes],
        "small",
        [helper.make_tensor_value_info("x", F32, [4, 3, 16])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
        [numpy_helper.from_array(array.astype(np.float16), name) for name, array in exact.items()]
        + [numpy_helper.from_array(np.array([12, 16]), "flat")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    read |= {name for node in casts for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)
    return ir.from_proto(model), exact


def cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=kind)


def product(x: str, weights: str, result: str, form: str) -> list[onnx.NodeProto]:
    """A product of halves, as a lowering writes it."""
    if form == "cuda":
        return [helper.make_node("MatMul", [x, f"weights.{weights}"], [result])]
    widen = cast(x, f"{result}.x", F32)
    return [
        widen,
        helper.make_node("MatMul", [f"{result}.x", f"wide.{weights}"], [f"{result}.sum"]),
        cast(f"{result}.sum", result, F16),
    ]


@pytest.fixture
def x():
    return np.random.default_rng(4).standard_normal((4, 3, 16)).astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_rounded_and_then_moved_is_read_unrounded(form, x):
    """PerceiverTF rounds a spectrum once, and flattens that for two products."""
    nodes = [cast("x", "half", F16), helper.make_node("Reshape", ["half", "flat"], ["rows"])]
    nodes += product("rows", "a", "ya", form) + product("rows", "b", "yb", form)
    for name in "ab":
        nodes += [cast(f"y{name}", f"w{name}", F32), helper.make_node("Neg", [f"w{name}"], [f"z{name}"])]
    model, exact = small(nodes, [("za", F32), ("zb", F32)])
    before = run(model, {"x": x})
    keep_products(model.graph, "encoder", plan_of("encoder", "a"), exact)
    check(model)
    after = run(model, {"x": x})
    np.testing.assert_array_equal(after["zb"], before["zb"])
    wanted = -x.reshape(12, 16).astype(np.float64) @ exact["weights.a"]
    assert relative_error(before["za"], wanted) > ROUNDING / 4
    assert relative_error(after["za"], wanted) < 1e-6
    keep_products(model.graph, "encoder", plan_of("encoder", "b"), exact)
    assert not [node for node in model.graph if node.op_type == "Cast"]
    assert all(output.uses() or output.is_graph_output() for node in model.graph for output in node.outputs)


@pytest.mark.parametrize("form", FORMS)
def test_a_result_beyond_half_is_mended(form, x):
    nodes = [cast("x", "half", F16), *product("half", "a", "y", form), cast("y", "w", F32)]
    model, exact = small([*nodes, helper.make_node("Neg", ["w"], ["z"])], [("z", F32)])
    x *= 30_000
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]).all()
    keep_products(model.graph, "encoder", plan_of("encoder", "a"), exact)
    found = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]
    assert relative_error(found, -x.astype(np.float64) @ exact["weights.a"]) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_an_output_that_is_a_product_keeps_name_and_type(form, x):
    nodes = [cast("x", "half", F16), *product("half", "a", "y", form)]
    model, exact = small(nodes, [("y", F16)])
    keep_products(model.graph, "encoder", plan_of("encoder", "a"), exact)
    check(model)
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [("y", ir.DataType.FLOAT16)]
    found = run(model, {"x": x})["y"].astype(np.float64)
    wanted = x.astype(np.float64) @ exact["weights.a"]
    assert (np.abs(found - wanted) <= ROUNDING * np.abs(wanted) + 1e-6).all()


@pytest.mark.parametrize("form", FORMS)
def test_one_of_two_products_with_the_same_weights(form, x):
    nodes = [cast("x", "half", F16), *product("half", "a", "y", form), *product("half", "a", "z", form)]
    model, exact = small(nodes, [("y", F16), ("z", F16)])
    assert list(products(model.graph)) == ["a", "a#2"]
    keep_products(model.graph, "encoder", plan_of("encoder", "a#2"), exact)
    check(model)
    assert [weight_type(node).name for node in products(model.graph).values()] == ["FLOAT16", "FLOAT"]
    assert list(products(model.graph)) == ["a", "a#2"]


@pytest.mark.parametrize("form", FORMS)
def test_matrices_side_by_side_are_kept_together(form, x):
    """As experts are, for devices: whoever names one of them means the product."""
    joined = [helper.make_node("Concat", ["weights.a", "weights.b"], ["weights.all"], axis=1)]
    joined += [cast("weights.all", "wide.all", F32)] if form == "tensorrt" else []
    nodes = [cast("x", "half", F16), *joined, *product("half", "all", "y", form), cast("y", "w", F32)]
    model, exact = small([*nodes, helper.make_node("Neg", ["w"], ["z"])], [("z", F32)])
    keep_products(model.graph, "encoder", plan_of("encoder", "b"), exact)
    check(model)
    assert list(model.graph.initializers) == ["weights.a.fp32", "weights.b.fp32"]
    wanted = -x.astype(np.float64) @ np.concatenate([exact["weights.a"], exact["weights.b"]], 1)
    assert relative_error(run(model, {"x": x})["z"], wanted) < 1e-6


def test_a_product_of_halves_before_stays_one(x):
    """Its rounding belongs to what TensorRT takes for one product."""
    scores = [helper.make_node("MatMul", ["x", "x.turned"], ["s"]), cast("s", "s.half", F16)]
    nodes = [helper.make_node("Transpose", ["x"], ["x.turned"], perm=[0, 2, 1]), *scores]
    nodes += [cast("s.half", "s.wide", F32), helper.make_node("MatMul", ["s.wide", "x"], ["m"]), cast("m", "mh", F16)]
    nodes += product("mh", "a", "y", "tensorrt")
    model, exact = small(nodes, [("y", F16)])
    keep_products(model.graph, "encoder", plan_of("encoder", "a"), exact)
    check(model)
    kept = products(model.graph)["a"]
    assert kept.inputs[0].producer().op_type == "Cast"
    assert kept.inputs[0].producer().inputs[0].name == "mh"


# ---- where a network is traced --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", [TensorRT(PLANS["fp16"]), Cuda(PLANS["fp16"])], ids=FORMS)
def test_a_weight_beyond_fp16_can_be_kept(ops, inputs):
    checkpoint = half_checkpoint()
    name = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    large = checkpoint.tensors[name].clone()
    large[3, 4] = 7e4
    modules = build_modules(HALF_MODEL, TINY_FEATURES, {**checkpoint.tensors, name: large}, ops)
    spec = SPECS["cross_kv"].typed("fp16")
    with one_thread():
        with pytest.raises(OptionError, match=r"projections\.0 reaches 70000.*: keep it in fp32 with a --plan"):
            trace(modules["cross_kv"], spec, plan_of("cross_kv", "projections.1"))
        model = trace(modules["cross_kv"], spec, plan_of("cross_kv", "projections.0"))
    check(model)
    states = (inputs["cross_kv"]["states"] * np.float32(2.0**-6)).astype(np.float16).astype(np.float32)
    keys = run(model, {"states": states})["cross_key.0"].astype(np.float64)
    wanted = (states.astype(np.float64) @ large.numpy().T).reshape(2, 256, 2, 16).transpose(0, 2, 1, 3)
    assert relative_error(keys, wanted) < ROUNDING


def test_a_bundle_says_by_which_plan_it_was_made(load, tmp_path):
    """The whole export, but that only the graph that the plan changes is traced."""
    plan = plan_of("cross_kv", "projections.1")

    def traced(module, spec, mixed=None):
        if mixed and spec.name == "cross_kv":
            return trace(module, spec, mixed)
        half = "float16" in {tensor.dtype for tensor in spec.outputs}
        return load(spec.name, "fp16" if half else "fp32", module.ops.name.replace("ort", "tensorrt"))

    with one_thread(), mock.patch.multiple(bundle_writer, trace=traced, _write_features=lambda *_: []):
        bundle = open_bundle(export_bundle(half_checkpoint(), tmp_path / "new", precisions=["fp32"], plans=[plan]))
    assert bundle.manifest.origin.tools["plan fp16"] == f"{plan.digest[:12]} (1 in fp32)"
    for lowering in FORMS:
        bundle.verify(bundle.graph("cross_kv", lowering, "fp16").weights)
        file = bundle.path / bundle.graph("cross_kv", lowering, "fp16").file
        found = products(ir.load(file).graph)
        assert {name: weight_type(node).name for name, node in found.items()} == {
            "projections.0": "FLOAT16",
            "projections.1": "FLOAT",
        }
        exact = products(ir.load(bundle.path / bundle.graph("cross_kv", lowering, "fp32").file).graph)
        np.testing.assert_array_equal(weights_of(found["projections.1"]), weights_of(exact["projections.1"]))
        onnx.checker.check_model(str(file))


def test_an_export_with_a_plan_of_another_model_leaves_nothing(tmp_path):
    wrong = replace(plan_of("cross_kv", "projections.1"), model="mt3")
    with pytest.raises(OptionError, match="of model 'mt3', not of tiny-half"):
        export_bundle(half_checkpoint(), tmp_path / "new", plans=[wrong])
    assert list(tmp_path.iterdir()) == []
