"""What scripts/roofline counts: floors against counts by hand, and every operator of every family with a kind."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from roofline_parts import products  # noqa: E402 -- the scripts are not a package of ours
from roofline_parts.counts import Traffic, kernels, operations, weight_bytes  # noqa: E402
from roofline_parts.kinds import KINDS, OTHER, kind_of  # noqa: E402
from roofline_parts.profiles import read_profile  # noqa: E402
from roofline_parts.report import name_of, to_text  # noqa: E402
from roofline_parts.roofs import BETWEEN, Demand, Speeds, demands, floor_ms, roofs  # noqa: E402
from roofline_parts.watched import watching  # noqa: E402
from roofline_parts.work import Timing  # noqa: E402

from graph_cases import one_thread  # noqa: E402
from mt3_export.lowering import LOWERINGS  # noqa: E402
from mt3_export.network import build_modules  # noqa: E402
from mt3_export.onnx_graph import trace  # noqa: E402
from mt3_export.quantize_bundle import quantize_bundle  # noqa: E402
from mt3_runtime.bundle import demo_bundle_path, open_bundle  # noqa: E402
from mt3_runtime.errors import BundleError, DependencyError, OptionError  # noqa: E402
from mt3_runtime.graphs import UNCALIBRATED, encoder_spec  # noqa: E402
from small_yourmt3 import channel_checkpoint  # noqa: E402

POSITION = 5
FLOAT, LAYERS, HEADS, WIDTH, FRAMES, BINS = 4, 2, 2, 16, 256, 512  # of the tiny model
D, FF, VOCAB = 32, 48, 1536


def demanded(bundle, rows=(1, 3), position=POSITION, precision="fp32"):
    return demands(bundle, rows, position, 0.0, threads=1, precision=precision)


@pytest.fixture(scope="module")
def tiny_demands(tiny_bundle):
    return demanded(tiny_bundle)


# ---- counts by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_decode_step_by_hand(tiny_demands, rows):
    demand = tiny_demands["decode_step", rows]
    layer = D * 3 * D + D * D + D * D + D * D + D * 2 * FF + FF * D  # qkv, output, cross query, cross output, gates, ff
    weights = LAYERS * layer + D * VOCAB
    position = 2 * LAYERS * HEADS * WIDTH * FLOAT  # bytes of one position of one row: keys and values
    ids, results = 2 * 4, 4 + FLOAT
    assert demand.traffic == Traffic(
        weights=FLOAT * weights,
        read=rows * (ids + FRAMES * position + POSITION * position),
        written=rows * (results + position),
    )
    attended = (FRAMES + POSITION + 1) * LAYERS * HEADS * WIDTH
    assert demand.operations == {"fp32": rows * (2 * weights + 2 * 2 * attended)}


def test_encoder_and_cross_kv_by_hand(tiny_demands):
    demand = tiny_demands["encoder", 1]
    weights = BINS * D + LAYERS * (D * 3 * D + D * D + D * 2 * FF + FF * D)
    assert demand.traffic == Traffic(FLOAT * weights, FLOAT * FRAMES * BINS, FLOAT * FRAMES * D)
    scores = LAYERS * HEADS * FRAMES * FRAMES * WIDTH
    assert demand.operations == {"fp32": 2 * FRAMES * weights + 2 * 2 * scores}
    demand = tiny_demands["cross_kv", 1]
    weights = LAYERS * 2 * D * D
    assert demand.traffic == Traffic(FLOAT * weights, FLOAT * FRAMES * D, FLOAT * LAYERS * 2 * FRAMES * D)
    assert demand.operations == {"fp32": 2 * FRAMES * weights}
    assert list(tiny_demands) == [("encoder", 1), ("cross_kv", 1), ("decode_step", 1), ("decode_step", 3)]


def test_a_prefix_stands_in_the_cache(prefix_bundle, tiny_demands):
    found = demanded(prefix_bundle, rows=(1,))
    assert [graph for graph, _ in found] == ["encoder", "memory", "cross_kv", "prefix", "decode_step"]
    prefix, plain = found["decode_step", 1], tiny_demands["decode_step", 1]
    length = prefix_bundle.manifest.model.prefix_length
    position = 2 * LAYERS * HEADS * WIDTH
    assert prefix.traffic.read - plain.traffic.read == FLOAT * length * position
    assert (prefix.operations - plain.operations) == {"fp32": 2 * length * position}


def test_positions_end_with_the_model(tiny_bundle):
    last = tiny_bundle.manifest.model.max_length - 1
    assert demanded(tiny_bundle, rows=(1,), position=last)["decode_step", 1].traffic.read > 0
    with pytest.raises(OptionError, match=f"0..{last}"):
        demanded(tiny_bundle, rows=(1,), position=last + 1)


def test_weights_of_half_size_are_read_in_the_type_they_are_widened_to():
    found = demanded(open_bundle(demo_bundle_path()), rows=(1,))
    model = open_bundle(demo_bundle_path()).manifest.model
    inner = model.num_heads * model.d_kv
    layer = model.d_model * (3 * inner + inner + inner + inner + 3 * model.d_ff)
    weights = model.decoder_layers * layer + model.d_model * model.vocab_size
    assert found["decode_step", 1].traffic.weights == FLOAT * weights


# ---- one product at a time ------------------------------------------------------------------------------------------


def profiled(tmp_path, model, **inputs):
    """Nodes of one run of a model."""
    with watching(tmp_path):
        session = onnxruntime.InferenceSession(model, onnxruntime.SessionOptions(), providers=["CPUExecutionProvider"])
    session.run(None, inputs)
    (run,) = read_profile(Path(session.end_profiling()))
    assert len(session.runs) == 1
    return run.nodes


SIZE = (4, 256, 32)  # rows, inner, columns


@pytest.mark.parametrize(
    ("make", "kind", "weights"),
    [
        (products.plain, "fp32", 4 * 256 * 32),
        (products.dynamic, "int8", 256 * 32 + 32 * 4 + 32),
        (lambda size: products.blocked(size, 8), "int8", 256 * 32 + 2 * 32 * 4),
        (lambda size: products.blocked(size, 4), "int8", 256 * 32 // 2 + 2 * 32 * 4),
    ],
)
def test_products_by_hand(tmp_path, make, kind, weights):
    model = make(SIZE)
    nodes = profiled(tmp_path, model, x=np.ones((4, 256), np.float32))
    assert operations(nodes, {}, 0) == {kind: 2 * 4 * 256 * 32}
    assert weight_bytes(onnx.load_from_string(model)) == weights


def model_of(nodes, constants, **shapes):
    """A model with inputs of these shapes; `y` is its output, of any shape."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, [output], stored)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("node", "constants", "inputs", "wanted"),
    [
        (("Conv", {"pads": [1, 1, 1, 1]}), {"w": (3, 2, 3, 3)}, {"x": (1, 2, 5, 6)}, 2 * 3 * 5 * 6 * 2 * 9),
        (("Conv", {"group": 16}), {"w": (32, 1, 1, 1)}, {"x": (2, 16, 5, 6)}, 2 * 2 * 32 * 5 * 6),
        (("MatMul", {}), {}, {"x": (2, 3, 7), "w": (7, 5)}, 2 * 2 * 3 * 5 * 7),
        (("MatMul", {}), {"w": (7, 5)}, {"x": (7,)}, 2 * 5 * 7),
        (("Gemm", {"transA": 1}), {}, {"x": (7, 3), "w": (7, 5)}, 2 * 3 * 5 * 7),
        (("Gemm", {"transB": 1}), {"w": (5, 7)}, {"x": (3, 7)}, 2 * 3 * 5 * 7),
        (("FusedMatMul", {"transA": 1}), {}, {"x": (2, 7, 3), "w": (2, 7, 5)}, 2 * 2 * 3 * 5 * 7),
    ],
)
def test_products_of_other_shapes(tmp_path, node, constants, inputs, wanted):
    operator, attributes = node
    domain = "com.microsoft" if operator == "FusedMatMul" else ""
    nodes = [helper.make_node(operator, ["x", "w"], ["y"], name="it", domain=domain, **attributes)]
    model = model_of(nodes, {name: ones(*shape) for name, shape in constants.items()}, **inputs)
    ran = profiled(tmp_path, model.SerializeToString(), **{name: ones(*shape) for name, shape in inputs.items()})
    assert operations(ran, kernels(model), 0)["fp32"] == wanted
    assert weight_bytes(model) == sum(FLOAT * int(np.prod(shape)) for shape in constants.values())


def test_channels_that_fill_up_a_vector_are_no_work(tmp_path):
    """Fused with what follows, the node has another name, and its three channels are filled up on some machines."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="it", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"], name="then"),
    ]
    model = model_of(nodes, {"w": ones(3, 2, 3, 3)}, x=(2, 2, 5, 6))
    ran = profiled(tmp_path, model.SerializeToString(), x=ones(2, 2, 5, 6))
    assert operations(ran, kernels(model), 0) == {"fp32": 2 * 2 * 3 * 5 * 6 * 2 * 9}
    with pytest.raises(BundleError, match=r": export the bundle again$"):
        operations(ran, {}, 0)


def test_what_counts_as_weights():
    halves, bytes_, scale = ones(4, 8, dtype=np.float16), ones(8, 4, dtype=np.int8), ones(4)
    nodes = [
        helper.make_node("Cast", ["halves"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["bytes", "scale"], ["real"], axis=1),
        helper.make_node("MatMul", ["x", "wide"], ["a"]),
        helper.make_node("MatMul", ["a", "real"], ["b"]),
        helper.make_node("MatMul", ["b", "wide"], ["c"]),  # again: counts once
        helper.make_node("Add", ["c", "bias"], ["d"]),  # is no product
        helper.make_node("Cast", ["d"], ["e"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["e", "x"], ["y"]),  # has no constants
    ]
    constants = {"halves": halves, "bytes": bytes_, "scale": scale, "bias": ones(8)}
    assert weight_bytes(model_of(nodes, constants, x=(8, 4))) == 4 * 8 * 4 + 8 * 4 + 4 * 4


def test_what_is_inside_a_loop_counts_as_what_it_is(tmp_path):
    """Three turns of (x_i w_i) v, of which w is cut into the turns and v the same in all."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x_i", "w_i"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y_i"])],
        "turn",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("x_i", (2, 4)), ("w_i", (4, 5)))
        ],
        [helper.make_tensor_value_info("y_i", TensorProto.FLOAT, (2, 6))],
    )
    model = model_of(
        [helper.make_node("Scan", ["x", "w"], ["y"], body=body, num_scan_inputs=2)],
        {"w": ones(3, 4, 5), "v": ones(5, 6)},
        x=(3, 2, 4),
    )
    assert weight_bytes(model) == FLOAT * (3 * 4 * 5 + 5 * 6)
    nodes = profiled(tmp_path, model.SerializeToString(), x=ones(3, 2, 4))
    assert operations(nodes, {}, 0) == {"fp32": 3 * (2 * 2 * 4 * 5 + 2 * 2 * 5 * 6)}
    assert Counter(kind_of(node.operator) for node in nodes) == {"control": 1, "products": 6}


def test_a_branch_sees_the_constants_around_it():
    branches = [
        helper.make_graph(
            [helper.make_node("MatMul", ["x", name], ["z"])], name, [], [helper.make_tensor_value_info("z", 1, None)]
        )
        for name in ("w", "v")
    ]
    node = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    constants = {"w": ones(4, 5), "v": ones(4, 5, dtype=np.float16), "c": np.array(1, bool)}
    assert weight_bytes(model_of([node], constants, x=(2, 4))) == 4 * 4 * 5 + 2 * 4 * 5


# ---- every operator has a kind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny", "context", "prefix"])
def test_every_node_of_every_family_has_a_kind(family, request):
    folder = request.getfixturevalue(f"{family}_folder")
    for path in folder.glob("*.ort.onnx"):
        operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        assert not [operator for operator in operators if kind_of(operator) == OTHER], path.name
    found = demanded(open_bundle(folder), rows=(2,))
    for key, demand in found.items():
        assert not demand.unnamed, key
        assert not demand.nodes[OTHER]
        assert set(demand.nodes) <= set(KINDS)
        assert demand.operations["fp32"] > 0
        assert set(demand.profile_ms) <= {*KINDS, BETWEEN}


def test_every_node_of_a_yourmt3_encoder_has_a_kind(tmp_path):
    """Its other graphs are MT3's."""
    case = channel_checkpoint()
    with one_thread():
        module = build_modules(case.model, case.features, case.tensors, LOWERINGS["ort"], case.design)["encoder"]
        model = ir.to_proto(trace(module, encoder_spec(case.model, case.features)))
    noise = np.random.default_rng(0).standard_normal((1, case.features.segment_frames, 1024), dtype=np.float32)
    nodes = profiled(tmp_path, model.SerializeToString(), features=noise)
    assert not [node.operator for node in nodes if kind_of(node.operator) == OTHER]
    assert operations(nodes, kernels(model), 0)["fp32"] > 0
    assert weight_bytes(model) > 0


@pytest.mark.parametrize("precision", UNCALIBRATED)
def test_quantised_products_are_the_same_ones(tiny_bundle, tiny_demands, tmp_path, precision):
    bundle = open_bundle(quantize_bundle(tiny_bundle, tmp_path / "bundle", [precision]))
    found = demanded(bundle, precision=precision)
    for key, demand in found.items():
        plain = tiny_demands[key]
        assert demand.operations.total() == plain.operations.total()
        assert not demand.unnamed
        if demand.operations["int8"]:
            assert demand.traffic.weights < plain.traffic.weights / 2
        else:
            assert demand.traffic == plain.traffic
        moved = (demand.traffic.read, demand.traffic.written)
        assert moved == (plain.traffic.read, plain.traffic.written)
    step = tiny_demands["decode_step", 3]
    products_only = 2 * 3 * step.traffic.weights // FLOAT
    assert found["decode_step", 3].operations["int8"] == products_only


def test_an_operator_without_a_kind_is_listed():
    assert kind_of("Det") == OTHER
    demand = Demand(Traffic(1, 1, 1), Counter(fp32=1), Counter({OTHER: 1}), {OTHER: 0.5}, ("Det",))
    speeds = Speeds(1.0, 1.0, 1.0, 1.0)
    graphs = roofs({("encoder", 1): demand}, [speeds], [{("encoder", 1): Timing(1.0, 0.0)}])
    document = {
        "model": "m",
        "precision": "fp32",
        "machine": {"cpu_name": "c"},
        "threads": 1,
        "position": 0,
        "rounds": 1,
    }
    rates = dict.fromkeys(("read", "copy", "fp32", "int8"), 1.0)
    document |= {"buffer_bytes": 1, "cache_bytes": 1, "speeds": rates, "ways": {name: {} for name in rates}}
    assert to_text({**document, "graphs": graphs}).splitlines()[-1].startswith("other: Det ")


# ---- floors, ratios, profiles ---------------------------------------------------------------------------------------


def test_floors_and_ratios_of_planted_numbers():
    demand = Demand(Traffic(600, 200, 100), Counter(fp32=1000, int8=4000), Counter(), {}, ())
    slow, fast = Speeds(read=100, copy=50, fp32=500, int8=1000), Speeds(read=1000, copy=500, fp32=1000, int8=2000)
    assert floor_ms(demand, slow) == {"memory": 10_000.0, "arithmetic": 6000.0}
    assert floor_ms(demand, fast) == {"memory": 1000.0, "arithmetic": 3000.0}
    key = ("decode_step", 2)
    timings = [{key: Timing(14_000.0, 1000.0)}, {key: Timing(6000.0, 0.0)}, {key: Timing(20_000.0, 0.0)}]
    (entry,) = roofs({key: demand}, [slow, fast, slow], timings)
    assert entry["floor_ms"] == 10_000.0
    assert entry["bound_by"] == "memory"
    assert entry["measured_ms"] == 15_000.0
    assert entry["ratio"] == 2.0  # of 1.5, 2 and 2: each of its own round
    assert name_of(entry) == "decode_step, 2 rows"


def event(name, start, duration, **facts):
    return {"cat": "x", "name": name, "ts": start, "dur": duration, "args": facts}


def node_event(name, start, duration, operator="MatMul", shape=(2, 3)):
    shapes = {"input_type_shape": [{"float": list(shape)}], "output_type_shape": [{"float": list(shape)}]}
    return event(f"{name}_kernel_time", start, duration, op_name=operator, **shapes)


def test_nodes_of_a_profile_belong_to_their_run(tmp_path):
    path = tmp_path / "profile.json"
    events = [
        event("session_initialization", 0, 5),
        *(node_event(f"n{start}", start, 4) for start in (11, 16, 31)),
        event("model_run", 10, 15),
        event("model_run", 30, 10),
    ]
    path.write_text(json.dumps(events))
    first, second = read_profile(path)
    assert [node.name for node in first.nodes] == ["n11", "n16"]
    assert [node.name for node in second.nodes] == ["n31"]
    assert (first.ms, first.nodes[0].ms) == (0.015, 0.004)
    assert first.nodes[0].inputs == ((2, 3),)


def test_the_time_of_a_loop_is_what_its_inside_leaves(tmp_path):
    path = tmp_path / "profile.json"
    events = [  # in the order in which they end; the second loop is inside the first
        *(node_event(name, start, 2) for name, start in (("a", 10), ("b", 13))),
        node_event("inner", 12, 6, "Scan"),
        node_event("outer", 10, 20, "Loop"),
        node_event("after", 30, 3),
        event("model_run", 9, 30),
    ]
    path.write_text(json.dumps(events))
    (run,) = read_profile(path)
    assert {node.name: round(1e3 * node.ms) for node in run.nodes} == {
        "outer": 20 - 2 - 6, "a": 2, "inner": 6 - 2, "b": 2, "after": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "{}", "[3]", "[{}]", json.dumps([node_event("early", 1, 1)]), '[{"name": "model_run"}]']
)
def test_profiles_of_another_form_are_refused(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(DependencyError, match=r": use the version that pyproject\.toml names$"):
        read_profile(path)
