"""fp16 and bf16 on a CPU: the products of a graph in float32, rounded where the graph of half precision has its types.

Of `docs/precision_plan.md`: what a product reads, its weights and its result are half, sums and all else float32; in
fp16, rows that gates let through are divided by their largest number before. What a fused attention rounds inside of
itself, and a device's order of sums, is not here. Rounding what is rounded already changes nothing, so the types of
caches, states and attention's output need no casts of their own: they come out of a product, or go into one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from mt3_export.products import products
from mt3_runtime.graphs import HOST_TENSORS

if TYPE_CHECKING:
    from collections.abc import Container

Half = Literal["fp16", "bf16"]
TYPES: dict[Half, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LIMITS: dict[Half, float] = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
FULL = {"head", "router"}  # float32 in every precision
ATTENTION = {"MultiHeadAttention", "GroupQueryAttention", "Attention"}
MOVES = {"Reshape", "Transpose", "Split", "Squeeze", "Unsqueeze"}  # change no number
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)  # rows of zeros are divided by it


def halved(graph: ir.Graph) -> dict[str, ir.Node]:
    """The products that half precision rounds, by name."""
    return {name: node for name, node in products(graph).items() if FULL.isdisjoint(name.split("."))}


def is_gated(product: ir.Node) -> bool:
    """Whether it reads what gates let through."""
    x = product.inputs[0]
    source = x.producer() if x is not None else None
    return source is not None and source.op_type == "Mul"


def emulate(model: ir.Model, half: Half, keep: Container[str] = ()) -> None:
    """Round what the products of `model`, a graph of `ort` in fp32, read and give, but for those of `keep`.

    Of these only what attention gives or takes is rounded, and what goes from graph to graph: that is half in any case.
    """
    rounder = _Rounder(model.graph, TYPES[half])
    for name, product in halved(model.graph).items():
        if name in keep:
            rounder.spare(product)
        else:
            rounder.rewrite(product, balanced=half == "fp16")


class _Rounder:
    """Puts casts around products; what several of them read is rounded once."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph, self.dtype = graph, dtype
        self._rounded: dict[ir.Value, ir.Value] = {}
        self._divisors: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def rewrite(self, product: ir.Node, *, balanced: bool) -> None:
        x, weights, result = product.inputs[0], product.inputs[1], product.outputs[0]
        if x is None or weights is None:
            raise TypeError(f"{product.name} has no inputs")
        divisor = None
        if balanced and is_gated(product):
            x, divisor = self._divided(x, product)
        product.replace_input_with(0, self._round(x, product))
        product.replace_input_with(1, self._round(weights, product))
        self._round_result(product, result, divisor)

    def spare(self, product: ir.Node) -> None:
        """Round of a product in float32 what is half around it."""
        x, result = product.inputs[0], product.outputs[0]
        if x is not None and self._comes_half(x):
            product.replace_input_with(0, self._round(x, product))
        if self._goes_half(result):
            self._round_result(product, result, None)

    def _comes_half(self, value: ir.Value) -> bool:
        node = value.producer()
        if node is None:
            return value.is_graph_input() and value.name not in HOST_TENSORS
        return node.op_type in ATTENTION or (
            node.op_type in MOVES and node.inputs[0] is not None and self._comes_half(node.inputs[0])
        )

    def _goes_half(self, value: ir.Value) -> bool:
        if value.is_graph_output() and value.name not in HOST_TENSORS:
            return True
        return any(
            user.op_type in ATTENTION or (user.op_type in MOVES and any(self._goes_half(out) for out in user.outputs))
            for user, _ in value.uses()
        )

    def _round_result(self, product: ir.Node, result: ir.Value, divisor: ir.Value | None) -> None:
        """Give all readers of a result the rounded one, multiplied by what its rows were divided by."""
        users = tuple(result.uses())
        given = self._cast_twice(result, product.name or "", product, after=True)
        if divisor is not None:
            back = self._node("Mul", [given, divisor], f"{product.name}.back")
            self.graph.insert_after(self._last(given), back)
            given = back.outputs[0]
        given.name, given.type, given.shape = f"{product.name}.product", result.type, result.shape
        for user, index in users:
            user.replace_input_with(index, given)
        for place, output in enumerate(self.graph.outputs):
            if output is result:
                given.name, result.name = result.name, f"{product.name}.exact"
                self.graph.outputs[place] = given

    def _divided(self, x: ir.Value, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Each row of x over its largest number, and these numbers."""
        if x not in self._divisors:
            smallest = self._constant("smallest_normal", np.array(SMALLEST_NORMAL, np.float32))
            last = self._constant("last_axis", np.array([-1], np.int64))
            size = self._node("Abs", [x], f"{x.name}.size")
            largest = self._node("ReduceMax", [size.outputs[0], last], f"{x.name}.largest", keepdims=1)
            divisor = self._node("Max", [largest.outputs[0], smallest], f"{x.name}.divisor")
            row = self._node("Div", [x, divisor.outputs[0]], f"{x.name}.row")
            self.graph.insert_before(before, [size, largest, divisor, row])
            self._divisors[x] = row.outputs[0], divisor.outputs[0]
        return self._divisors[x]

    def _round(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value not in self._rounded:
            self._rounded[value] = self._cast_twice(value, value.name or "", before, after=False)
        return self._rounded[value]

    def _cast_twice(self, value: ir.Value, name: str, place: ir.Node, *, after: bool) -> ir.Value:
        narrow = self._node("Cast", [value], f"{name}.narrow", to=int(self.dtype))
        wide = self._node("Cast", [narrow.outputs[0]], f"{name}.rounded", to=int(ir.DataType.FLOAT))
        wide.outputs[0].type, wide.outputs[0].shape = value.type, value.shape
        (self.graph.insert_after if after else self.graph.insert_before)(place, [narrow, wide])
        return wide.outputs[0]

    def _last(self, value: ir.Value) -> ir.Node:
        node = value.producer()
        if node is None:
            raise TypeError(f"{value.name} comes from no node")
        return node

    def _node(self, operator: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Node:
        node = ir.node(operator, inputs, attributes, name=name)
        node.outputs[0].name = name
        return node

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        initializers = self.graph.initializers
        if name not in initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
            value.const_value = tensor
            self.graph.register_initializer(value)
        return initializers[name]
