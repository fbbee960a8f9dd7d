"""fp16 and bf16 on a CPU: the products of a graph in float32, rounded where the graph of half precision has its types.

Of `docs/precision_plan.md`: what a product reads, its weights and its result are half, sums and all else float32; in
fp16, rows that gates let through are divided by their largest number before. What a fused attention rounds inside of
itself, and a device's order of sums, is not here. Rounding what is rounded already changes nothing, so the types of
caches, states and attention's output need no casts of their own: they come out of a product, or go into one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from mt3_export.products import is_gated, products
from mt3_export.quantized import divided
from mt3_runtime.graphs import HOST_TENSORS

if TYPE_CHECKING:
    from collections.abc import Container

Half = Literal["fp16", "bf16"]
TYPES: dict[Half, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LIMITS: dict[str, float] = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
FULL = {"head", "router"}  # float32 in every precision
ATTENTION = {"MultiHeadAttention", "GroupQueryAttention", "Attention"}
MOVES = {"Reshape", "Transpose", "Split", "Squeeze", "Unsqueeze"}  # change no number


def halved(graph: ir.Graph) -> dict[str, ir.Node]:
    """The products that half precision rounds, by name."""
    return {name: node for name, node in products(graph).items() if FULL.isdisjoint(name.split("."))}


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

    def rewrite(self, product: ir.Node, *, balanced: bool) -> None:
        x, weights, result = product.inputs[0], product.inputs[1], product.outputs[0]
        if x is None or weights is None:
            raise TypeError(f"{product.name} has no inputs")
        divisor = None
        if balanced and is_gated(product):
            divisor, row = divided(self.graph, x, product)
            self.graph.insert_before(product, row)
            x = row[-1].outputs[0]
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
