"""Rewrites products to the forms that TensorRT has kernels for; what is computed stays the same.

Measured with TensorRT-RTX 1.7, by what it builds and by the size of the weights that an engine then holds.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FLOAT = TensorProto.FLOAT
HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
LARGEST_SUM = 1 << 20  # numbers in a matrix of weights: every one is read again for every row
PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
AXES = {axis: f"trt_forms.axis{-axis}" for axis in (-1, -2, -3)}  # names of constants


def own_casts(graph: onnx.GraphProto) -> int:
    """Give every product casts of its own; returns how many were added.

    TensorRT makes one product of halves, summed in float32, of: cast both sides to float32, multiply, cast back. Where
    several products read one such cast, it multiplies in float32, with weights twice as large, and says nothing.
    """
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    taken: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    added = 0
    for node in graph.node:
        if node.op_type == "MatMul":
            for place, name in enumerate(node.input):
                if name in taken:
                    added += 1
                    copy = f"{name}.{added}"
                    own = onnx.NodeProto()
                    own.CopyFrom(casts[name])
                    own.name, own.output[0] = f"{copy}.cast", copy
                    nodes.append(own)
                    node.input[place] = copy
                elif name in casts:
                    taken.add(name)
        nodes.append(node)
    _set_nodes(graph, nodes)
    return added


def products_as_sums(graph: onnx.GraphProto) -> int:
    """Write products that are left in float32 as sums of products; returns how many.

    TensorRT-RTX has no product of float32 matrices for sm_75. In half precision those are small: the head, the router
    of experts, the scores of a prefix.
    """
    halves = _cast_to_half(graph)
    large = {tensor.name for tensor in graph.initializer if prod(tensor.dims) > LARGEST_SUM}
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in graph.node:
        if node.op_type == "MatMul" and node.output[0] not in halves and node.input[1] not in large:
            count += 1
            nodes += _sum(node)
        else:
            nodes.append(node)
    if count:
        for axis, name in AXES.items():
            graph.initializer.append(numpy_helper.from_array(np.array([axis], np.int64), name))
        _set_nodes(graph, nodes)
    return count


def product_types(graph: onnx.GraphProto, types: Mapping[str, int]) -> dict[str, int]:
    """How many matrix products, convolutions and attentions there are, by type; `half+` are summed in float32."""
    halves = _cast_to_half(graph)
    names: dict[int, str] = {FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    counts: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in PRODUCTS:
            result = node.output[0]
            counts["half+" if result in halves else names.get(types.get(result, 0), "unknown")] += 1
    return dict(sorted(counts.items()))


def _cast_to_half(graph: onnx.GraphProto) -> set[str]:
    """Tensors that all who read them read as halves, but for products with weights in float32."""
    halves: set[str] = set()
    wide = {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT}
    others = {value.name for value in graph.output}
    others.update(node.output[0] for node in graph.node if node.op_type == "MatMul" and node.input[1] in wide)
    for node in graph.node:
        half = node.op_type == "Cast" and any(item.name == "to" and item.i in HALF for item in node.attribute)
        (halves if half else others).update(node.input)
    return halves - others


def _sum(product: onnx.NodeProto) -> list[onnx.NodeProto]:
    (x, y), (result,) = product.input, product.output
    columns, matrix, terms = f"{result}.columns", f"{result}.matrix", f"{result}.terms"
    return [
        helper.make_node("Unsqueeze", [x, AXES[-1]], [columns]),  # [..., m, k, 1]
        helper.make_node("Unsqueeze", [y, AXES[-3]], [matrix]),  # [..., 1, k, n]
        helper.make_node("Mul", [columns, matrix], [terms]),  # [..., m, k, n]
        helper.make_node("ReduceSum", [terms, AXES[-2]], [result], keepdims=0),
    ]


def _set_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
