"""Every tensor of every graph of half precision has the type that the plan says: see docs/precision_plan.md."""

from __future__ import annotations

from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto

from conftest import TINY_FEATURES, TINY_MODEL
from graph_cases import one_thread
from half_cases import HALF_MODEL, PRECISIONS, half_checkpoint
from memory_cases import CONTEXT, PREFIX_MEMORY, memory_checkpoint
from mt3_export import cli
from mt3_export.lowering import Cuda, TensorRT
from mt3_export.network import build_modules
from mt3_export.onnx_graph import for_cuda, trace
from mt3_export.precision import PLANS, checked_precisions
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import BundleError, OptionError
from mt3_runtime.graphs import FEATURES, GRAPH_NAMES, graph_specs
from recipe_cases import checkpoint_for
from small_yourmt3 import channel_checkpoint

FLOAT = TensorProto.FLOAT
HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FLOATS = {FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
FORMS = [(precision, lowering) for precision in HALF for lowering in ("tensorrt", "cuda")]
EXACT = ("head", "router")  # matrices that are multiplied with in float32
TABLES = ("embedding", "positions", "latents", "mask", "cosines", "sines")  # and what is no matrix
PLAIN = {"Reshape", "Transpose", "Split", "Concat", "Gather", "Unsqueeze", "Squeeze", "Expand", "Slice", "Shape"}
IN_HALF = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "TensorScatter", "Conv", "AveragePool", "Relu"}
# What ONNX Runtime's CUDA provider has kernels for in float32, fp16 and bf16 (its docs/OperatorKernels.md).
EVERY_TYPE = {"MatMul", "Add", "Mul", "MultiHeadAttention", *PLAIN, "Cast"}
HALF_ONLY = {"GroupQueryAttention"}
FLOAT_AT_LEAST = {"SkipSimplifiedLayerNormalization", "FastGelu", "Abs", "ReduceMax", "ReduceSum", "Clip", "Div", "Sub"}
FLOAT_AT_LEAST |= {"Exp", "Log", "Neg", "ArgMax", "Softmax", "Where", "Greater", "Equal", "Range"}


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


def file_of(folder, graph, precision, lowering):
    return onnx.load(folder / f"{graph}.{precision}.{lowering}.onnx", load_external_data=False)


class Types:
    """A graph with the type of every value, inferred anew where the standard says how."""

    def __init__(self, model):
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        self.graph = inferred.graph
        listed = [*self.graph.input, *self.graph.output, *self.graph.value_info]
        self.of = {value.name: value.type.tensor_type.elem_type for value in listed}
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.of |= {name: tensor.data_type for name, tensor in self.weights.items()}
        self.maker = {name: node for node in self.graph.node for name in node.output if name}
        self.users = {name: [] for name in self.of}
        for node in self.graph.node:
            for name in filter(None, node.input):
                self.users[name].append(node)

    def floats(self, names):
        return {self.of[name] for name in names if name and self.of[name] in FLOATS}

    def widened(self, name, half):
        """Whether a value is float32 of a half, and nothing else was done to it."""
        node = self.maker.get(name)
        return node is not None and node.op_type == "Cast" and self.of[node.input[0]] == half


def is_exact(types, node):
    return any(name in types.weights and name.endswith(EXACT) for name in node.input)


def check_product(types, node, half, lowering):
    """Both sides in half; TensorRT's with casts to float32 before and one back behind, which it takes for one."""
    kinds = types.floats([*node.input, *node.output])
    behind = [user.op_type for user in types.users[node.output[0]]]
    if is_exact(types, node) or (types.graph.name == "prefix" and behind == ["Add"]):  # the scores of a prefix
        assert kinds == {FLOAT}
    elif lowering == "cuda":
        assert kinds == {half}
    else:
        assert kinds == {FLOAT}
        assert all(types.widened(name, half) and len(types.users[name]) == 1 for name in node.input)
        assert behind == ["Cast"]


def check_graph(model, half, lowering):
    types = Types(model)
    assert types.floats(types.of) <= {FLOAT, half}
    for node in types.graph.node:
        kinds = types.floats([*node.input, *node.output])
        if node.op_type == "Cast":
            check_cast(types, node, half, lowering)
        elif node.op_type == "MatMul":
            check_product(types, node, half, lowering)
        elif node.op_type in IN_HALF or (node.op_type == "Add" and follows_convolution(types, node)):
            assert kinds == {half}, node.op_type
        elif node.op_type not in PLAIN:
            assert kinds <= {FLOAT}, node.op_type
        else:
            assert len(kinds) < 2, node.op_type
    check_weights(types, half)
    return types


def check_cast(types, node, half, lowering):
    """No way back and forth, but for what TensorRT wants around its products."""
    [source], [target] = node.input, node.output
    if types.of[source] not in FLOATS:
        return
    assert {types.of[source], types.of[target]} == {FLOAT, half}
    maker = types.maker.get(source)
    if maker is not None and maker.op_type == "Cast" and types.of[maker.input[0]] in FLOATS:
        # float32 -> half -> float32 rounds what a product reads; half -> float32 -> half would do nothing at all
        assert lowering == "tensorrt"
        assert types.of[source] == half
        rounds_operand = {user.op_type for user in types.users[target]} == {"MatMul"}
        product = types.maker.get(maker.input[0])
        rounds_result = product is not None and product.op_type == "MatMul"
        assert rounds_operand or rounds_result


def follows_convolution(types, node):
    return any(name in types.maker and types.maker[name].op_type == "Conv" for name in node.input)


def check_weights(types, half):
    for name, tensor in types.weights.items():
        if tensor.data_type not in FLOATS or len(tensor.dims) < 2:
            continue
        exact = name.endswith((*EXACT, *TABLES)) or not name.startswith("weights.")  # angles of rotations
        assert tensor.data_type == (FLOAT if exact else half), name


# ---- the bundle ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "lowering"), FORMS)
@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_every_tensor_has_its_type(half_folder, graph, precision, lowering):
    types = check_graph(file_of(half_folder, graph, precision, lowering), HALF[precision], lowering)
    products = [node for node in types.graph.node if node.op_type == "MatMul"]
    assert len(products) == {"encoder": 5, "cross_kv": 2, "decode_step": 7}[graph]
    assert sum(is_exact(types, node) for node in products) == (graph == "decode_step")
    if graph != "cross_kv":
        assert sum(node.op_type == "Div" for node in types.graph.node) == (precision == "fp16")


@pytest.mark.parametrize(("precision", "lowering"), [*FORMS, ("fp32", "cuda")])
@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_inputs_and_outputs_are_the_contracts(half_folder, graph, precision, lowering):
    model = file_of(half_folder, graph, precision, lowering)
    spec = graph_specs(HALF_MODEL, TINY_FEATURES)[graph].typed(precision)
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        found = [(value.name, TensorProto.DataType.Name(value.type.tensor_type.elem_type)) for value in values]
        names = {"float32": "FLOAT"}
        assert found == [(tensor.name, names.get(tensor.dtype, tensor.dtype.upper())) for tensor in tensors]


def test_what_the_bundle_lists(half_folder):
    bundle = open_bundle(half_folder)
    forms = [(entry.lowering, entry.precision) for entry in bundle.manifest.graphs if entry.graph == "encoder"]
    plain = [("ort", "fp32"), ("tensorrt", "fp32"), ("cuda", "fp32")]
    assert forms == [*plain, *((lowering, precision) for precision, lowering in FORMS)]
    audio = [entry for entry in bundle.manifest.graphs if entry.graph == FEATURES]
    assert {(entry.lowering, entry.precision) for entry in audio} == {
        (lowering, p) for lowering in ("tensorrt", "cuda") for p in ("fp32", "fp16", "bf16")
    }
    assert {(entry.file, entry.weights) for entry in audio} == {("features.onnx", "weights.features.bin")}
    for entry in set(bundle.manifest.graphs) - set(audio):
        assert entry.file == f"{entry.graph}.{entry.precision}.{entry.lowering}.onnx"
        assert entry.weights == f"weights.{entry.precision}.bin"
    for name in bundle.manifest.files:
        bundle.verify(name)


def test_matrices_take_half_the_room(half_folder):
    sizes = {}
    for precision in PRECISIONS:
        places = {}
        for graph in GRAPH_NAMES:
            for tensor in file_of(half_folder, graph, precision, "cuda").graph.initializer:
                place = {entry.key: entry.value for entry in tensor.external_data}
                if place and not tensor.name.endswith((*EXACT, *TABLES)):
                    places[place["offset"]] = int(place["length"])
        sizes[precision] = sum(places.values())
    assert sizes["fp16"] == sizes["bf16"] == sizes["fp32"] / 2 > 0


@pytest.mark.parametrize("graph", GRAPH_NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cuda_has_every_kernel_and_nothing_stops_a_capture(half_folder, graph, precision):
    model = file_of(half_folder, graph, precision, "cuda")
    # The provider has kernels by the exact version of an operator, for many not that of opset 24.
    assert next(opset.version for opset in model.opset_import if not opset.domain) == 18
    onnx.checker.check_model(half_folder / f"{graph}.{precision}.cuda.onnx")
    types = Types(model)
    for node in types.graph.node:
        kinds = types.floats([*node.input, *node.output])
        assert node.op_type in EVERY_TYPE | (HALF_ONLY if kinds - {FLOAT} else FLOAT_AT_LEAST)
        assert not any(attribute.HasField("g") for attribute in node.attribute)  # no control flow
        if node.op_type == "GroupQueryAttention":
            room = types.maker[node.input[6]]  # read on the host
            assert (room.op_type, types.maker[room.input[0]].op_type) == ("Cast", "Shape")
            assert types.maker[room.input[0]].input[0].startswith("self_key.")


# ---- other graphs -------------------------------------------------------------------------------------------------


def traced(checkpoint, graph, ops):
    modules = build_modules(checkpoint.model, checkpoint.features, checkpoint.tensors, ops, checkpoint.design)
    spec = graph_specs(checkpoint.model, checkpoint.features)[graph].typed(ops.plan.precision)
    return ir.to_proto(trace(modules[graph], spec))


@pytest.mark.parametrize(("ops", "half"), [(TensorRT(PLANS["fp16"]), "fp16"), (Cuda(PLANS["bf16"]), "bf16")])
def test_convolutions_and_experts(ops, half):
    types = check_graph(traced(channel_checkpoint(), "encoder", ops), HALF[half], ops.name)
    kinds = {node.op_type for node in types.graph.node}
    assert {"Conv", "AveragePool", "Softmax"} <= kinds
    assert not kinds & {"If", "Loop", "NonZero", "TopK"}  # experts are dense
    convolutions = [node for node in types.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 7
    assert all(types.weights[node.input[1]].dims[2] in (1, 3) for node in convolutions)  # no Winograd


@pytest.mark.parametrize(
    ("memory", "graph", "ops"),
    [
        (CONTEXT, "memory", TensorRT(PLANS["fp16"])),
        (PREFIX_MEMORY, "prefix", Cuda(PLANS["bf16"])),
        (PREFIX_MEMORY, "prefix", TensorRT(PLANS["fp16"])),
    ],
)
def test_memories(memory, graph, ops):
    checkpoint = memory_checkpoint(replace(TINY_MODEL, encoder_layers=1, decoder_layers=2), memory)
    check_graph(traced(checkpoint, graph, ops), HALF[ops.plan.precision], ops.name)


# ---- options ------------------------------------------------------------------------------------------------------


def test_precisions():
    assert checked_precisions(["fp32"]) == ("fp32",)
    assert checked_precisions(["bf16", "fp16", "bf16"]) == ("fp32", "fp16", "bf16")
    assert checked_precisions(["w4", "int8", "fp16"]) == ("fp32", "fp16", "int8", "w4")
    with pytest.raises(OptionError, match=r"^unknown precision 'int4': use fp32, fp16, bf16, int8, w8, w4"):
        checked_precisions(["fp32", "int4"])


def test_the_command(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("mt3_export.bundle_writer.export_bundle", lambda *_, **options: seen.append(options))
    arguments = ["bundle", "--model", "mt3", "--checkpoint", "random:0", "--output", str(tmp_path / "new")]
    monkeypatch.setattr(cli, "load_checkpoint_of", lambda _: half_checkpoint())
    assert cli.main([*arguments, "--precision", "fp32,bf16"]) == 0
    assert seen[0]["precisions"] == ("fp32", "bf16")
    assert cli.main([*arguments, "--precision", "fp64"]) == 2
    assert "unknown precision 'fp64'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_weight_beyond_fp16_is_refused(tmp_path):
    checkpoint = half_checkpoint()
    name = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    large = checkpoint.tensors[name].clone()
    large[3, 4] = 7e4
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, name: large})
    modules = build_modules(HALF_MODEL, TINY_FEATURES, checkpoint.tensors, TensorRT(PLANS["fp16"]))
    spec = graph_specs(HALF_MODEL, TINY_FEATURES)["cross_kv"].typed("fp16")
    with pytest.raises(OptionError, match=r"projections\.0 reaches 70000, which float16 cannot hold: .* without that"):
        trace(modules["cross_kv"], spec)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("recipe", ["ymt3plus", "yptf-single", "yptf-multi", "yptf-moe-multi"])
def test_encoders_of_yourmt3_keep_to_the_opset_that_cuda_has_kernels_of(recipe, precision):
    checkpoint = checkpoint_for(recipe)
    ops = Cuda(PLANS[precision])
    modules = build_modules(checkpoint.model, checkpoint.features, checkpoint.tensors, ops, checkpoint.design)
    graph = trace(modules["encoder"], graph_specs(checkpoint.model, checkpoint.features)["encoder"].typed(precision))
    for_cuda(graph)
    version = graph.graph.opset_imports[""]
    assert version == (22 if precision == "bf16" and recipe != "ymt3plus" else 18)
    onnx.checker.check_model(ir.to_proto(graph))


def test_an_operator_that_the_opset_lacks_is_an_error():
    class Newer(torch.nn.Module):
        def forward(self, features):
            return torch.nn.functional.gelu(features)[:, None]

    spec = graph_specs(replace(TINY_MODEL, d_model=TINY_FEATURES.bins), TINY_FEATURES)["encoder"]
    with pytest.raises(BundleError, match="opset 18 has no Gelu"):
        for_cuda(trace(Newer(), spec))
