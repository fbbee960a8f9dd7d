"""Weights of half precision in a graph: stored as such, and cast nowhere but where the plan says.

The exporter folds casts of constants, be it to the wider type. Two operators of our own, which it does not know, keep
it from that; `write_types` takes them out again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch.onnx.ops import symbolic

from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

OWN = "mt3_export.types"
STORED, WIDENED = "Stored", "Widened"


def stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """For tracing: a weight in the type that the file holds it in."""
    return symbolic(f"{OWN}::{STORED}", (weight,), dtype=dtype, shape=weight.shape)


def widened(weight: Tensor) -> Tensor:
    """For tracing: float32 of a stored weight, cast when the graph runs."""
    return symbolic(f"{OWN}::{WIDENED}", (weight,), dtype=torch.float32, shape=weight.shape)


def write_types(model: ir.Model) -> None:
    """Put weights in place of `stored`, and casts in place of `widened`; every product gets casts of its own.

    Raises:
        OptionError: a number of a weight does not fit its type.
    """
    graph = model.graph
    for node in [node for node in graph if node.domain == OWN and node.op_type == STORED]:
        _store(graph, node)
    for node in graph:
        if node.domain == OWN and node.op_type == WIDENED:
            node.domain, node.op_type = "", "Cast"
            node.attributes.add(ir.AttrInt64("to", ir.DataType.FLOAT))
            for product, _ in tuple(node.outputs[0].uses()):
                _unshare(graph, product)
    model.opset_imports.pop(OWN, None)


def _unshare(graph: ir.Graph, product: ir.Node) -> None:
    """Cast what a product reads for it alone: TensorRT does not see its pattern where products share a cast."""
    shared = product.inputs[0]
    cast = shared.producer() if shared is not None else None
    if shared is None or cast is None or cast.op_type != "Cast" or len(shared.uses()) == 1:
        return
    own = ir.node("Cast", cast.inputs, {"to": ir.DataType.FLOAT}, name=f"{product.name}.widen")
    own.outputs[0].name = f"{product.name}.widened"
    own.outputs[0].dtype, own.outputs[0].shape = ir.DataType.FLOAT, shared.shape
    graph.insert_before(product, own)
    product.replace_input_with(0, own.outputs[0])


def _store(graph: ir.Graph, node: ir.Node) -> None:
    [weight], [typed] = node.inputs, node.outputs
    if weight is None or weight.const_value is None or typed.dtype is None:
        raise TypeError(f"{node.name} does not read a weight")
    array = _converted(weight, typed.dtype)
    ir.convenience.replace_all_uses_with(typed, weight)
    graph.remove(node, safe=True)
    weight.const_value = ir.tensor(array, dtype=typed.dtype, name=weight.name)
    weight.dtype = typed.dtype


def _converted(weight: ir.Value, dtype: ir.DataType) -> np.ndarray:
    array = weight.const_value.numpy() if weight.const_value else np.empty(0)
    with np.errstate(over="ignore"):
        converted: np.ndarray = array.astype(dtype.numpy())
    if np.isfinite(array).all() and not np.isfinite(converted.astype(np.float32)).all():
        raise OptionError(
            f"{weight.name} reaches {np.abs(array).max():g}, which {converted.dtype.name} cannot hold: "
            "export without that precision"
        )
    return converted
