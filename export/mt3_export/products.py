"""The products of a graph with matrices of weights: what a precision changes, and what plans and reports name.

Without torch. A product is named as its weights are, less what all share: `layers.0.qkv`, `head`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Container

    import onnx_ir as ir

PREFIX, WIDENED = "weights.", ".fp32"  # of every weight, and of what is stored in half and cast back


def products(graph: ir.Graph) -> dict[str, ir.Node]:
    """Every MatMul with a matrix of weights, by name, in the order in which they are computed."""
    found: dict[str, ir.Node] = {}
    for node in graph:
        if node.op_type == "MatMul" and not node.domain and is_weight(node.inputs[1]):
            found[unused(layer_name(node), found)] = node
    return found


def layer_name(product: ir.Node) -> str:
    """What a product is called."""
    stored = stored_weight(product.inputs[1])
    return plain_name(stored) if stored is not None else ""


def plain_name(weight: ir.Value) -> str:
    """The name of a weight less what all share."""
    return (weight.name or "").removeprefix(PREFIX).removesuffix(WIDENED)


def unused(name: str, names: Container[str]) -> str:
    """The name, with a number behind it where the weights are used more than once."""
    count, candidate = 1, name
    while candidate in names:
        count += 1
        candidate = f"{name}#{count}"
    return candidate


def stored_weight(value: ir.Value | None) -> ir.Value | None:
    """The initializer that a product reads, behind the cast of what is stored in half; None if it reads no weight."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return value if value is not None and value.const_value is not None else None


def is_weight(value: ir.Value | None) -> bool:
    """Whether it is a matrix of weights."""
    stored = stored_weight(value)
    return stored is not None and stored.const_value is not None and len(stored.const_value.shape) == 2


def is_gated(product: ir.Node) -> bool:
    """Whether it reads a product of two results: what gates let through."""
    x = product.inputs[0]
    source = x.producer() if x is not None else None
    return (
        source is not None
        and source.op_type == "Mul"
        and all(factor is not None and factor.const_value is None for factor in source.inputs)
    )


def weights_of(product: ir.Node) -> np.ndarray:
    """The matrix [in, out] of a product in float32."""
    stored = stored_weight(product.inputs[1])
    if stored is None or stored.const_value is None:
        raise TypeError(f"{product.name} reads no weights")
    return stored.const_value.numpy().astype(np.float32)
