"""What a graph has to move and to compute at least: bytes of weights, inputs and outputs, and operations of products.

A multiplication and an addition count as two operations. Of what attention reads, what is in use counts, not the room.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from mt3_runtime.errors import BundleError
from roofline_parts.kinds import ATTENTION, CONVOLUTIONS, INT8, PRODUCTS, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from roofline_parts.profiles import Node, Shape

ITEM_BYTES = {
    "tensor(float)": 4, "tensor(float16)": 2, "tensor(bfloat16)": 2, "tensor(int64)": 8, "tensor(int32)": 4,
    "tensor(int8)": 1, "tensor(uint8)": 1,
}  # fmt: skip
FOLDED = ("Cast", "Concat", "DequantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # of constants
UNBOUND = ("logits",)  # no backend reads them
GROWING = "length"  # the axis of a cache: it is read up to a position, and written at one


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one run that must be read and written."""

    weights: int
    read: int  # besides weights
    written: int


def traffic(session: Any, model: onnx.ModelProto, axes: Mapping[str, int]) -> Traffic:
    """Bytes of one run; `axes` gives the size of every named axis, `GROWING` the positions before the present one."""
    inputs = sum(_bytes(tensor, axes) for tensor in session.get_inputs())
    written = {**axes, GROWING: 1}
    outputs = sum(_bytes(tensor, written) for tensor in session.get_outputs() if tensor.name not in UNBOUND)
    return Traffic(weight_bytes(model), inputs, outputs)


def _bytes(tensor: Any, axes: Mapping[str, int]) -> int:
    return ITEM_BYTES[tensor.type] * prod(axes[size] if isinstance(size, str) else size for size in tensor.shape)


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the constants that products read, each once, also if it is read in every turn of a loop.

    A constant that is cast counts as what it is cast to: that is done once, when the session is made.
    """
    sizes: dict[str, int] = {}
    for node, constants in _nodes(model.graph, None, {}):
        if kind_of(node.op_type) == PRODUCTS:
            for name in node.input:
                sizes |= constants.sizes(name) or {}
    return sum(sizes.values())


class _Constants:
    """Sizes of constants behind the names of a graph, which for a loop's may be names of the graph around it."""

    def __init__(self, graph: onnx.GraphProto, around: _Constants | None, given: Mapping[str, str]) -> None:
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {output: node for node in graph.node for output in node.output if output}
        self._around, self._given = around, given

    def sizes(self, name: str) -> dict[str, int] | None:
        """Bytes of every constant that `name` is made of, by name; None if it is not made of constants alone."""
        if name in self._stored:
            return {name: _size(self._stored[name], self._stored[name].data_type)}
        node = self._makers.get(name)
        if node is None and self._around is not None:
            return self._around.sizes(self._given.get(name, name))
        if node is None or node.op_type not in FOLDED:
            return None
        found: dict[str, int] = {}
        for part in filter(None, node.input):
            sizes = self.sizes(part)
            if sizes is None:
                return None
            found |= sizes
        if node.op_type == "Cast" and node.input[0] in self._stored:
            target = next(attribute.i for attribute in node.attribute if attribute.name == "to")
            found[node.input[0]] = _size(self._stored[node.input[0]], target)
        return found


def _nodes(
    graph: onnx.GraphProto, around: _Constants | None, given: Mapping[str, str]
) -> Iterator[tuple[onnx.NodeProto, _Constants]]:
    """Every node, also inside loops, with the constants it can see. `given`: what the graph's inputs are outside."""
    constants = _Constants(graph, around, given)
    for node in graph.node:
        yield node, constants
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                # a Loop numbers its turns and says whether to go on: the same two inputs on both sides
                inside = [value.name for value in attribute.g.input]
                yield from _nodes(attribute.g, constants, dict(zip(inside, node.input, strict=False)))


def _size(tensor: onnx.TensorProto, data_type: int) -> int:
    count: int = prod(tensor.dims)
    if data_type in {TensorProto.INT4, TensorProto.UINT4}:
        return -(-count // 2)
    return count * int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def kernels(model: onnx.ModelProto) -> dict[str, Shape]:
    """Shape of the kernel of every convolution [channels, channels / groups, height, width].

    By every name that the node may have once it is rewritten: its own, that of its output, or that of what was fused.
    """
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    own: dict[str, Shape] = {}
    fused: dict[str, Shape] = {}
    for node, _ in _nodes(model.graph, None, {}):
        if node.op_type in CONVOLUTIONS:
            kernel = next((stored[name] for name in node.input if len(stored.get(name, ())) == 4), None)
            own |= dict.fromkeys((node.name, *node.output), kernel) if kernel else {}
        else:
            made = next((own[name] for name in node.input if name in own), None)
            fused |= dict.fromkeys(node.output, made) if made else {}
    return {**fused, **own}


def operations(nodes: Iterable[Node], kernel_shapes: Mapping[str, Shape], positions: int) -> Counter[str]:
    """Operations of a run in "fp32" and "int8"; `positions` are those that self-attention sees, the present one too.

    Raises:
        BundleError: the kernel of a convolution is unknown.
    """
    found: Counter[str] = Counter()
    for node in nodes:
        kind = kind_of(node.operator)
        if kind == PRODUCTS:
            found["int8" if node.operator in INT8 else "fp32"] += _of_product(node, kernel_shapes)
        elif kind == ATTENTION:
            found["fp32"] += _of_attention(node, positions)
    return found


def _of_product(node: Node, kernel_shapes: Mapping[str, Shape]) -> int:
    out, x = node.outputs[0], node.inputs[0]
    if node.operator in CONVOLUTIONS:  # not all channels of `out` are real: they are filled up to whole vectors
        kernel = kernel_shapes.get(node.name.removesuffix("_nchwc"))
        if kernel is None:
            raise BundleError(f"the kernel of {node.name} is not in the graph: export the bundle again")
        return 2 * out[0] * prod(out[2:]) * prod(kernel)
    if len(x) < 2:
        return 2 * prod(out) * x[0]
    # where the product takes its first matrix turned, the inner size is the other one
    inner = x[-1] if node.operator not in {"FusedMatMul", "Gemm"} else x[-1] * x[-2] // out[-2]
    return 2 * prod(out) * inner


def _of_attention(node: Node, positions: int) -> int:
    """Of scores and of their sum over values."""
    if node.operator == "RotaryEmbedding":
        return 0
    if node.operator == "GroupQueryAttention":
        return 4 * prod(node.outputs[0]) * positions
    key = node.inputs[1]  # [n, heads, keys, d] or [n, keys, heads * d]
    return 4 * prod(node.outputs[0]) * key[-2]
