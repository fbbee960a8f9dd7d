"""Products that stay in float32 in a graph of half precision, because a mixed-precision plan says so.

Both lowerings are taken: `tensorrt`, where both factors are cast to float32 and the result is cast back, and `cuda`,
where all three are halves. What a graph takes and gives keeps its type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from mt3_export.mixed_plan import check_products
from mt3_export.products import WIDENED, plain_name, products
from mt3_export.quantized import drop_unused
from mt3_runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from mt3_export.mixed_plan import MixedPlan

FLOAT = ir.DataType.FLOAT
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
MOVES = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten"}  # of numbers, which stay what they are


def keep_products(graph: ir.Graph, name: str, plan: MixedPlan, matrices: Mapping[str, np.ndarray]) -> None:
    """Let the products that a plan keeps read their factors in float32, and round nothing that is wanted in float32.

    Args:
        graph: of half precision, in lowering tensorrt or cuda.
        name: what the graph is called.
        plan: names the products.
        matrices: weights in float32 [in, out], by the name of what holds them in half.

    Raises:
        OptionError: the graph has no product of a name.
        BundleError: a matrix is missing, or of another shape.
    """
    found = kept_candidates(graph)
    check_products(plan, name, found)
    for product in dict.fromkeys(found[kept] for kept in plan.of(name)):
        _keep(graph, product, matrices)
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    drop_unused(graph)


def kept_candidates(graph: ir.Graph) -> dict[str, ir.Node]:
    """The products of a graph by name; one with several matrices side by side, as of experts, by each of theirs."""
    found = products(graph)
    joined = [node for node in graph if node.op_type == "MatMul" and node not in found.values()]
    return {plain_name(part): node for node in joined for part in matrices_of(node)} | found


def matrices_of(product: ir.Node) -> list[ir.Value]:
    """The initializers that a product reads as its weights, side by side; none if it reads something else."""
    value = product.inputs[1]
    cast = value.producer() if value is not None else None
    value = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else value
    maker = value.producer() if value is not None else None
    parts = [value] if maker is None else list(maker.inputs) if maker.op_type == "Concat" else []
    found = [part for part in parts if part is not None and part.const_value is not None]
    return found if len(found) == len(parts) else []


def _keep(graph: ir.Graph, product: ir.Node, matrices: Mapping[str, np.ndarray]) -> None:
    x, weights, result = product.inputs[0], matrices_of(product), product.outputs[0]
    if x is None or not weights or weights[0].dtype is None:
        raise TypeError(f"{product.name} reads no weights")
    if weights[0].dtype not in HALF:
        return
    if result.dtype != FLOAT:
        _round_result(graph, product, weights[0].dtype)
    product.replace_input_with(0, _wide(graph, product, x))
    product.replace_input_with(1, _joined(graph, product, [_matrix(graph, part, matrices) for part in weights]))
    rounded = [node.outputs[0] for node, _ in result.uses() if _is_cast(node, *HALF)]
    for reader in [reader for value in rounded for reader, _ in value.uses() if _is_cast(reader, FLOAT)]:
        if not reader.outputs[0].is_graph_output():
            reader.outputs[0].replace_all_uses_with(result)


def _joined(graph: ir.Graph, product: ir.Node, parts: list[ir.Value]) -> ir.Value:
    """Matrices as the product had them in half, side by side or alone."""
    if len(parts) == 1:
        return parts[0]
    old = product.inputs[1]
    cast = old.producer() if old is not None else None
    inner = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else old
    maker = inner.producer() if inner is not None else None
    if old is None or maker is None:
        raise TypeError(f"{product.name} reads no matrices side by side")
    node = ir.Node("", "Concat", parts, list(maker.attributes.values()), name=f"{product.name}.join")
    _insert(graph, product, node, old)
    return node.outputs[0]


def _round_result(graph: ir.Graph, product: ir.Node, half: ir.DataType) -> None:
    """Write the result in float32, and what all have read until now as a rounding of it, under the same name."""
    result = product.outputs[0]
    node = ir.node("Cast", [result], {"to": half}, name=f"{product.name}.round")
    rounded = node.outputs[0]
    result.replace_all_uses_with(rounded, replace_graph_outputs=True)
    node.replace_input_with(0, result)
    rounded.name, rounded.dtype, rounded.shape = result.name, half, result.shape
    result.name, result.dtype = f"{result.name}{WIDENED}", FLOAT
    graph.insert_after(product, node)


def _wide(graph: ir.Graph, product: ir.Node, x: ir.Value) -> ir.Value:
    """What the product reads, in float32: not rounded at all, or else as it was made by who rounded it."""
    cast = x.producer()
    half = cast.inputs[0] if cast is not None and _is_cast(cast, FLOAT) else x
    exact = None if half is None else _not_rounded(graph, product, half)
    if exact is not None:
        return exact
    if x.dtype == FLOAT:
        return x
    node = ir.node("Cast", [x], {"to": FLOAT}, name=f"{product.name}.widen")
    _insert(graph, product, node, x)
    return node.outputs[0]


def _not_rounded(graph: ir.Graph, product: ir.Node, half: ir.Value) -> ir.Value | None:
    """The float32 numbers that were rounded to `half`, moved as they were; None where something else made it half."""
    node = half.producer()
    source = node.inputs[0] if node is not None else None
    if node is None or source is None:
        return None
    if _is_cast(node, *HALF):
        maker = source.producer()  # a product whose result is rounded is one of halves, and stays so
        return None if source.dtype != FLOAT or (maker is not None and maker.op_type == "MatMul") else source
    if node.op_type not in MOVES or node.domain:
        return None
    exact = _not_rounded(graph, product, source)
    if exact is None:
        return None
    attributes = list(node.attributes.values())
    moved = ir.Node("", node.op_type, [exact, *node.inputs[1:]], attributes, name=f"{product.name}.{node.name}")
    _insert(graph, product, moved, half)
    return moved.outputs[0]


def _insert(graph: ir.Graph, product: ir.Node, node: ir.Node, like: ir.Value) -> None:
    """Put a node before a product, that gives in float32 what `like` holds."""
    output = node.outputs[0]
    output.name, output.dtype, output.shape = f"{product.name}.{like.name}", FLOAT, like.shape
    graph.insert_before(product, node)


def _matrix(graph: ir.Graph, stored: ir.Value, matrices: Mapping[str, np.ndarray]) -> ir.Value:
    name = f"{stored.name}{WIDENED}"
    if name not in graph.initializers:
        matrix = matrices.get(stored.name or "")
        shape = tuple(stored.const_value.shape) if stored.const_value is not None else ()
        if matrix is None or matrix.shape != shape:
            raise BundleError(f"there are no weights in fp32 for {stored.name}: export the bundle again")
        tensor = ir.tensor(matrix, dtype=FLOAT, name=name)
        graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(matrix.shape), const_value=tensor)
        )
    return graph.initializers[name]


def _is_cast(node: ir.Node, *types: ir.DataType) -> bool:
    return node.op_type == "Cast" and not node.domain and node.attributes["to"].as_int() in types
