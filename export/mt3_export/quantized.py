"""Products with weights of 8 or 4 bits, for ONNX Runtime on the CPU: see `docs/quantization.md`.

Made of a traced graph in float32, which need not come from torch: a bundle is enough. Only products with a matrix of
weights change; caches, attention, norms, sums and everything a graph takes and gives stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from mt3_export.products import is_gated, products, weights_of

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from mt3_runtime.graphs import Precision

    FloatMatrix = np.ndarray

CONTRIB = "com.microsoft"
# Two of these times 255 fit 16 bits, in which AVX2 without VNNI adds them up.
DYNAMIC_LARGEST = 64
LONGEST_BLOCK, SHORTEST_BLOCK = 128, 16  # of numbers that share a scale; the operator takes powers of two
INT8_PRODUCTS = 4  # `accuracy_level`: each block of the other factor is rounded to 8 bits, by its own largest number
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)  # rows of zeros are divided by it
# Of PerceiverTF: what they round away sends tokens to other experts, and they are a twentieth of the time.
KEPT = {"router", "attention", "cross"}
# Of the encoder's products these cost most when their weights are rounded to 7 bits: half of its error (see the docs).
FINER = {"projection", "qkv"}
PRODUCTS = {"MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
HEAD, LOG_PROB = "weights.head", "log_prob"


@dataclass(frozen=True, slots=True)
class Form:
    """How products are written.

    "dynamic": `DynamicQuantizeMatMul`. A scale for every column of weights, and one for all that they are multiplied
    with in a call: for graphs that are run for one segment, one row at a time.
    "blocks": `MatMulNBits`. A scale for every block of a column, and one for every block of a row of the other factor:
    no row depends on another one.
    "static": standard operators with scales known beforehand, see `mt3_export.qdq`, which writes it.
    `bits` of the weights.
    """

    kind: Literal["dynamic", "blocks", "static"]
    bits: Literal[4, 8] = 8


DYNAMIC, BLOCKS, FOUR_BITS, STATIC = Form("dynamic"), Form("blocks"), Form("blocks", bits=4), Form("static")
# What each precision does to each graph; the others are those of fp32.
FORMS: Mapping[Precision, Mapping[str, Form]] = {
    "int8": {
        **dict.fromkeys(("encoder", "memory", "cross_kv", "prefix"), DYNAMIC),
        "decode_step": BLOCKS,
    },
    "w8": {"decode_step": BLOCKS},
    "w4": {"decode_step": FOUR_BITS},
    "qdq": dict.fromkeys(("encoder", "memory", "cross_kv", "prefix", "decode_step"), STATIC),
}


def form_of(precision: Precision, graph: str) -> Form | None:
    """What a precision does to a graph; None if it leaves it as it is, or quantises nothing."""
    return FORMS.get(precision, {}).get(graph)


def quantize(model: ir.Model, form: Form, keep: Container[str] = ()) -> None:
    """Replace products with a matrix of weights in `model`, a graph of lowering `ort` in fp32, but for those of `keep`.

    See `mt3_export.products` for their names. Of the form "static" see `mt3_export.qdq`.
    """
    if form.kind == "static":
        raise TypeError("scales have to be known: use quantize_static")
    graph = model.graph
    for name, node in quantizable(graph).items():
        if name not in keep:
            finer = form.kind == "dynamic" and not FINER.isdisjoint(name.split("."))
            _replace(graph, node, weights_of(node), BLOCKS if finer else form)
    _keep_watch(graph)
    drop_unused(graph)
    model.opset_imports.setdefault(CONTRIB, 1)


def quantizable(graph: ir.Graph) -> dict[str, ir.Node]:
    """The products that 8 or 4 bits change, by name."""
    return {name: node for name, node in products(graph).items() if KEPT.isdisjoint(name.split("."))}


def _keep_watch(graph: ir.Graph) -> None:
    products = [node for node in graph if node.op_type in PRODUCTS]
    heads = [node for node in products if HEAD in str(node.inputs[1].name if node.inputs[1] else None)]
    if heads and heads[0].inputs[0] is not None:
        keep_watch(graph, heads[0].inputs[0], heads[0])


def keep_watch(graph: ir.Graph, read: ir.Value, head: ir.Node) -> None:
    """Let `log_prob` be NaN where what the head reads is not finite: its rounding makes a number of it."""
    position = next((i for i, output in enumerate(graph.outputs) if output.name == LOG_PROB), None)
    if position is None:
        return
    log_prob = graph.outputs[position]
    zero = constant(graph, "no_number", np.array(0.0, np.float32))
    axes = constant(graph, "all_of_a_row", np.array([1, 2], np.int64))
    nought = node_for(head, "Mul", [read, zero], "nought")  # 0 times what is not finite is NaN
    found = node_for(head, "ReduceSum", [nought.outputs[0], axes], "found", keepdims=0)
    log_prob.name = f"{LOG_PROB}.of_logits"
    told = node_for(head, "Add", [log_prob, found.outputs[0]], "told")
    told.outputs[0].name, told.outputs[0].type, told.outputs[0].shape = LOG_PROB, log_prob.type, log_prob.shape
    graph.outputs[position] = told.outputs[0]
    graph.extend([nought, found, told])


def _replace(graph: ir.Graph, product: ir.Node, matrix: FloatMatrix, form: Form) -> None:
    x, weight = product.inputs
    name = weight.name if weight is not None else None
    if x is None or name is None:
        raise TypeError(f"{product.name} has no inputs")
    if form.kind == "blocks":
        size, levels, scales = blocks(matrix, form.bits, LONGEST_BLOCK)
        sizes = {"K": matrix.shape[0], "N": matrix.shape[1], "bits": form.bits, "block_size": size}
        nodes = [_contrib("MatMulNBits", [x, *_constants(graph, name, levels, scales)], product, **sizes)]
        nodes[0].attributes.add(ir.AttrInt64("accuracy_level", INT8_PRODUCTS))
    else:
        nodes = _dynamic(graph, product, x, _constants(graph, name, *columns(matrix)))
    old, new = product.outputs[0], nodes[-1].outputs[0]
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, product, [product], nodes, [old], [new])


def _dynamic(graph: ir.Graph, product: ir.Node, x: ir.Value, constants: list[ir.Value]) -> list[ir.Node]:
    if is_gated(product):
        return _by_row(graph, x, constants, product)
    rounding = next((user for user, _ in x.uses() if user.op_type == "DynamicQuantizeLinear"), None)
    readers = [user for user, index in x.uses() if index == 0 and user.op_type == product.op_type]
    if rounding is None and len(readers) == 1:
        return [_contrib("DynamicQuantizeMatMul", [x, *constants], product)]
    rounded, scale, zero = (rounding or _rounding(graph, x, product)).outputs
    return [_contrib("MatMulIntegerToFloat", [rounded, constants[0], scale, constants[1], zero], product)]


def _rounding(graph: ir.Graph, x: ir.Value, first: ir.Node) -> ir.Node:
    """What several products read, in 8 bits: rounded once for all of them, before the first."""
    node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{x.name}.rounded")
    for output, part in zip(node.outputs, ("levels", "scale", "zero"), strict=True):
        output.name = f"{x.name}.{part}"
    graph.insert_before(first, node)
    return node


def _by_row(graph: ir.Graph, x: ir.Value, constants: list[ir.Value], product: ir.Node) -> list[ir.Node]:
    """Divide each row by its largest number first: in what gates let through, some rows are far larger than others."""
    divisor, row = divided(graph, x, product)
    scaled = _contrib("DynamicQuantizeMatMul", [row[-1].outputs[0], *constants], product, "scaled")
    back = node_for(product, "Mul", [scaled.outputs[0], divisor], "product")
    return [*row, scaled, back]


def divided(graph: ir.Graph, x: ir.Value, product: ir.Node) -> tuple[ir.Value, list[ir.Node]]:
    """The largest absolute number of each row of what a product reads; nodes, the last of which divides by it."""
    smallest = constant(graph, "smallest_normal", np.array(SMALLEST_NORMAL, np.float32))
    last = constant(graph, "last_axis", np.array([-1], np.int64))
    size = node_for(product, "Abs", [x], "size")
    largest = node_for(product, "ReduceMax", [size.outputs[0], last], "largest", keepdims=1)
    divisor = node_for(product, "Max", [largest.outputs[0], smallest], "divisor")
    row = node_for(product, "Div", [x, divisor.outputs[0]], "row")
    return divisor.outputs[0], [size, largest, divisor, row]


def _contrib(
    operator: str, inputs: list[ir.Value], product: ir.Node, part: str = "product", **attributes: int
) -> ir.Node:
    return node_for(product, operator, inputs, part, domain=CONTRIB, **attributes)


def node_for(
    product: ir.Node, operator: str, inputs: list[ir.Value], part: str, *, domain: str = "", **attributes: int
) -> ir.Node:
    """A node with one output, that is named after a product and what it is of it."""
    node = ir.node(operator, inputs, attributes, domain=domain, name=f"{product.name}.{part}")
    node.outputs[0].name = f"{product.name}.{part}"
    return node


def columns(matrix: FloatMatrix, largest: int = DYNAMIC_LARGEST) -> tuple[np.ndarray, np.ndarray]:
    """Levels up to `largest` [in, out] and the scale of every column [out]."""
    furthest = np.abs(matrix).max(0)
    scales = np.where(furthest, furthest / largest, 1.0).astype(np.float32)
    return np.rint(matrix / scales).astype(np.int8), scales


def blocks(matrix: FloatMatrix, bits: int, longest: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Levels as `MatMulNBits` stores them.

    Returns:
        The size of a block; levels, of 4 bits two in a byte, uint8 [out, blocks, bytes of a block]; the scale of every
        block [out, blocks].
    """
    size = block_size(matrix.shape[0], longest)
    count, middle = -(-matrix.shape[0] // size), 2 ** (bits - 1)
    padded = np.zeros((matrix.shape[1], count * size), np.float32)
    padded[:, : matrix.shape[0]] = matrix.T
    parts = padded.reshape(-1, count, size)  # [out, blocks, size]
    # The number furthest from zero becomes the lowest level: there is one more on that side than on the other.
    furthest = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)[..., 0]
    scales = np.where(furthest, furthest / -middle, 1.0).astype(np.float32)
    levels = np.clip(np.rint(parts / scales[..., None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
    return size, levels if bits == 8 else levels[..., ::2] | levels[..., 1::2] << 4, scales


def block_size(rows: int, longest: int) -> int:
    """The largest power of two that is no larger than the matrix and `longest`, but at least the smallest there is."""
    return max(SHORTEST_BLOCK, min(longest, 1 << (rows.bit_length() - 1)))


def _constants(graph: ir.Graph, name: str, levels: np.ndarray, scales: np.ndarray) -> list[ir.Value]:
    return [constant(graph, f"{name}.levels", levels), constant(graph, f"{name}.scales", scales)]


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer of that name, made when it is first asked for."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def drop_unused(graph: ir.Graph) -> None:
    """Remove the weights that nothing reads any more, and the casts that read them."""
    kept = set(graph.outputs)
    for node in reversed(list(graph)):
        if node.op_type == "Cast" and not any(output.uses() or output in kept for output in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
