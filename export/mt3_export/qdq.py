"""Products in 8 bits with scales that are known beforehand, in standard operators: see `docs/quantization.md`.

`QuantizeLinear` and `DequantizeLinear` stand around what a product reads and behind its weights; the product itself is
left as it is. ONNX Runtime and TensorRT make a product of whole numbers of each such group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from mt3_export.products import is_gated, weights_of
from mt3_export.quantized import (
    DYNAMIC_LARGEST,
    HEAD,
    columns,
    constant,
    divided,
    drop_unused,
    keep_watch,
    quantizable,
)
from mt3_runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from mt3_runtime.manifest import LoweringName

LEVELS = 127  # on either side of zero
BY_ROW = 1 / LEVELS  # the scale of rows that were divided by their largest number


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """`largest` level of weights on either side of zero; `zero`: the level of zero of what they are multiplied with."""

    largest: int
    zero: np.int8 | np.uint8


# ONNX Runtime multiplies unsigned by signed levels on x86, and itself changes signed ones to that only where one
# product alone reads them; of weights see DYNAMIC_LARGEST. TensorRT knows signed levels around 0 only.
ARITHMETIC: Mapping[LoweringName, Arithmetic] = {
    "ort": Arithmetic(DYNAMIC_LARGEST, np.uint8(128)),
    "tensorrt": Arithmetic(LEVELS, np.int8(0)),
}


def quantize_static(
    model: ir.Model, scales: Mapping[str, float], arithmetic: Arithmetic, keep: Container[str] = ()
) -> None:
    """Quantise what products with a matrix of weights read, and the weights, but for products of `keep`.

    Args:
        model: a graph in fp32, of any lowering.
        scales: of what a product reads, by the product's name. One that is not there is divided by rows.
        arithmetic: that of its lowering, see `ARITHMETIC`.
        keep: names of products, see `mt3_export.products`.

    Raises:
        BundleError: weights are not finite.
    """
    graph = model.graph
    found = quantizable(graph)
    heads = [node for node in found.values() if node.inputs[1] is not None and HEAD in str(node.inputs[1].name)]
    read = heads[0].inputs[0] if heads else None
    if read is not None:
        keep_watch(graph, read, heads[0])
    for name, product in found.items():
        if name not in keep:
            _replace(graph, name, product, scales.get(name), arithmetic)
    drop_unused(graph)


def factors(graph: ir.Graph) -> dict[str, ir.Value]:
    """What every product with a matrix of weights reads, by its name, where that is not to be divided by rows."""
    read = {name: product.inputs[0] for name, product in quantizable(graph).items() if not is_gated(product)}
    return {name: x for name, x in read.items() if x is not None}


def _replace(graph: ir.Graph, name: str, product: ir.Node, scale: float | None, how: Arithmetic) -> None:
    x, matrix = product.inputs[0], weights_of(product)
    if x is None:
        raise TypeError(f"{product.name} has no inputs")
    if not np.isfinite(matrix).all():
        raise BundleError(f"the weights of {name} are not all finite: export from a checkpoint that is whole")
    product.replace_input_with(1, _weights(graph, product, matrix, how.largest))
    if scale is not None:
        product.replace_input_with(0, _rounded(graph, x, scale, how.zero, product))
        return
    divisor, row = divided(graph, x, product)
    graph.insert_before(product, row)
    product.replace_input_with(0, _rounded(graph, row[-1].outputs[0], BY_ROW, how.zero, product))
    result = product.outputs[0]
    back = ir.node("Mul", [result, divisor], name=f"{product.name}.back")
    back.outputs[0].name, back.outputs[0].type, back.outputs[0].shape = result.name, result.type, result.shape
    result.name = f"{result.name}.divided"
    ir.convenience.replace_all_uses_with(result, back.outputs[0], replace_graph_outputs=True)
    back.replace_input_with(0, result)
    graph.insert_after(product, back)


def _rounded(graph: ir.Graph, x: ir.Value, scale: float, zero: np.int8 | np.uint8, first: ir.Node) -> ir.Value:
    """What products read, rounded once for all of them: what reads the same has the same scale."""
    name = f"{x.name}.rounded"
    known = next((user.outputs[0] for user, _ in x.uses() if user.op_type == "QuantizeLinear"), None)
    if known is not None:
        [(widen, _)] = known.uses()
        return widen.outputs[0]
    constants = [
        constant(graph, f"{x.name}.scale", np.array(scale, np.float32)),
        constant(graph, "level_of_zero", np.array(zero)),
    ]
    levels = ir.node("QuantizeLinear", [x, *constants], name=f"{name}.levels")
    widened = ir.node("DequantizeLinear", [levels.outputs[0], *constants], name=name)
    levels.outputs[0].name, widened.outputs[0].name = f"{name}.levels", name
    graph.insert_before(first, [levels, widened])
    return widened.outputs[0]


def _weights(graph: ir.Graph, product: ir.Node, matrix: np.ndarray, largest: int) -> ir.Value:
    name = product.inputs[1].name if product.inputs[1] is not None else None
    levels, scales = columns(matrix, largest)
    constants = [
        constant(graph, f"{name}.levels", levels),
        constant(graph, f"{name}.scales", scales),
        constant(graph, f"no_offset.{len(scales)}", np.zeros(len(scales), np.int8)),
    ]
    node = ir.node("DequantizeLinear", constants, {"axis": 1}, name=f"{product.name}.weights")
    node.outputs[0].name = f"{product.name}.weights"
    graph.insert_before(product, node)
    return node.outputs[0]
