"""Makes a bundle's graph ready for TensorRT's parser: fixed axes, weights inside, types of every tensor known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, shape_inference
from onnx.numpy_helper import to_array

from mt3_export.graph_reading import read_graph, read_proto
from mt3_export.kept_products import keep_products, kept_candidates, matrices_of
from mt3_export.mixed_plan import check_products
from mt3_export.trt_forms import own_casts, product_types, products_as_sums
from mt3_runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from mt3_export.mixed_plan import MixedPlan
    from mt3_export.recipes import EnginePlan
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.graphs import GraphSpec
    from mt3_runtime.manifest import GraphFile

DTYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
}
PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of one message
# Inputs that TensorRT's parser takes and then does not heed: Attention's `nonpad_kv_seqlen`.
IGNORED_INPUTS = {"Attention": 6}


@dataclass(frozen=True, slots=True)
class ReadyGraph:
    """A graph as the parser gets it, and what it must become.

    `types`: ONNX element types, of every tensor of a known one, by name. `operators`: how often each occurs.
    `products`: see `product_types`.
    """

    model: bytes
    spec: GraphSpec
    types: Mapping[str, int]
    operators: Mapping[str, int]
    products: Mapping[str, int]


def ready_graph(bundle: Bundle, plan: EnginePlan, *, sums: bool = False, mixed: MixedPlan | None = None) -> ReadyGraph:
    """The graph of a plan with all its weights, every byte of them verified before a parser sees it.

    Args:
        bundle: holds the graph.
        plan: the engine that it is for.
        sums: write the float32 products that half precision leaves as sums, see `products_as_sums`.
        mixed: products that stay in float32, with weights of the bundle's fp32 graph.

    Raises:
        BundleError: a file is not what the manifest lists, or the graph is none that TensorRT would run as it is meant.
        OptionError: the graph has no product of a name that is to be kept.
    """
    model = read_proto(bundle, plan.file)
    _check_operators(model.graph.node, plan.file.file)
    if mixed and mixed.of(plan.spec.name) and plan.file.precision != "fp32":
        model = _kept(model, bundle, plan.spec.name, mixed)
    del model.graph.value_info[:]  # it names axes that are fixed now
    _fix_axes(model.graph, {axis: sizes[0] for axis, sizes in plan.axes.items() if sizes[0] == sizes[2]})
    if plan.file.precision != plan.precision:
        _cast_at_the_border(model.graph, plan.spec.typed(plan.precision))
    own_casts(model.graph)
    if sums and plan.file.precision != "fp32":
        products_as_sums(model.graph)
    types = _types(model)  # of the graph without weights: they would be copied
    operators = [node.op_type for node in model.graph.node]
    products = product_types(model.graph, types)
    _put_weights_in(model, bundle, plan.file.weights)
    counted = {name: operators.count(name) for name in sorted(set(operators))}
    return ReadyGraph(model.SerializeToString(), plan.spec.typed(plan.precision), types, counted, products)


def check_plan(bundle: Bundle, plans: Iterable[EnginePlan], mixed: MixedPlan) -> None:
    """Check every name of a plan against the graphs that engines are to be built of.

    Raises:
        OptionError: a graph has no product of a name.
    """
    for plan in plans:
        if mixed.of(plan.spec.name):
            graph = read_graph(bundle, plan.file).graph
            check_products(mixed, plan.spec.name, kept_candidates(graph))


def _kept(model: onnx.ModelProto, bundle: Bundle, graph: str, mixed: MixedPlan) -> onnx.ModelProto:
    """The graph of half precision with the products of a plan in float32."""
    changed = ir.from_proto(model)
    found = kept_candidates(changed.graph)
    check_products(mixed, graph, found)
    names = {part.name or "" for kept in mixed.of(graph) for part in matrices_of(found[kept])}
    exact = _matrices(bundle, bundle.graph(graph, "tensorrt", "fp32"), names)
    if names - exact.keys():  # of experts, whose matrices the other graph has side by side
        exact |= _matrices(bundle, bundle.graph(graph, "ort", "fp32"), names - exact.keys())
    keep_products(changed.graph, graph, mixed, exact)
    return ir.to_proto(changed)


def _matrices(bundle: Bundle, entry: GraphFile, names: Collection[str]) -> dict[str, np.ndarray]:
    """Those of the named weights that a graph has, in float32."""
    model = read_proto(bundle, entry)
    wanted = [tensor for tensor in model.graph.initializer if tensor.name in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(wanted)
    _put_weights_in(model, bundle, entry.weights)
    return {tensor.name: to_array(tensor).astype(np.float32) for tensor in model.graph.initializer}


def _check_operators(nodes: Iterable[onnx.NodeProto], file: str) -> None:
    for node in nodes:
        if node.domain not in {"", "ai.onnx"}:
            raise BundleError(f"{file} holds {node.domain}.{node.op_type}, which TensorRT has not: export it again")
        place = IGNORED_INPUTS.get(node.op_type)
        if place is not None and any(node.input[place:]):
            raise BundleError(f"{file} gives {node.op_type} {node.name} an input TensorRT ignores: export it again")


def _fix_axes(graph: onnx.GraphProto, sizes: Mapping[str, int]) -> None:
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]


def _cast_at_the_border(graph: onnx.GraphProto, spec: GraphSpec) -> None:
    """Give a graph the types of another precision outside, and leave what it computes as it is."""
    wanted = {tensor.name: DTYPES[tensor.dtype] for tensor in (*spec.inputs, *spec.outputs)}
    inner = {value.name: f"{value.name}.inside" for value in (*graph.input, *graph.output) if _differs(value, wanted)}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [inner.get(name, name) for name in names]
    before = [helper.make_node("Cast", [v.name], [inner[v.name]], to=_type(v)) for v in graph.input if v.name in inner]
    after = [
        helper.make_node("Cast", [inner[value.name]], [value.name], to=wanted[value.name])
        for value in graph.output
        if value.name in inner
    ]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = wanted[value.name]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def _type(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)


def _differs(value: onnx.ValueInfoProto, wanted: Mapping[str, int]) -> bool:
    return _type(value) != wanted[value.name]


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {value.name: _type(value) for value in values if _type(value)}


def _put_weights_in(model: onnx.ModelProto, bundle: Bundle, file: str) -> None:
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    if not outside:
        return
    weights = memoryview(bundle.read(file))
    for tensor in outside:
        place = {entry.key: entry.value for entry in tensor.external_data}  # in that file: `read_proto` has seen to it
        start, size = int(place.get("offset", 0)), int(place["length"])
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
        tensor.raw_data = bytes(weights[start : start + size])
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise BundleError(f"{file} makes a graph of more than 2 GiB: use --precision fp16")
