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
    from collections.abc import Mapping

    from torch import Tensor

OWN = "mt3_export.types"
STORED, WIDENED = "Stored", "Widened"


def stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """For tracing: a weight in the type that the file holds it in."""
    return symbolic(f"{OWN}::{STORED}", (weight,), dtype=dtype, shape=weight.shape)


def widened(weight: Tensor) -> Tensor:
    """For tracing: float32 of a stored weight, cast when the graph runs."""
    return symbolic(f"{OWN}::{WIDENED}", (weight,), dtype=torch.float32, shape=weight.shape)


def write_types(model: ir.Model) -> dict[str, np.ndarray]:
    """Put weights in place of `stored`, and casts in place of `widened`; every product gets casts of its own.

    Returns:
        In float32 what is now stored in half, by name: numbers that do not fit are infinite, see `check_range`.
    """
    graph = model.graph
    originals: dict[str, np.ndarray] = {}
    for node in [node for node in graph if node.domain == OWN and node.op_type == STORED]:
        _store(graph, node, originals)
    for node in graph:
        if node.domain == OWN and node.op_type == WIDENED:
            node.domain, node.op_type = "", "Cast"
            node.attributes.add(ir.AttrInt64("to", ir.DataType.FLOAT))
            for product, _ in tuple(node.outputs[0].uses()):
                _unshare(graph, product)
    model.opset_imports.pop(OWN, None)
    return originals


def check_range(graph: ir.Graph, originals: Mapping[str, np.ndarray]) -> None:
    """Compare the weights that a graph still holds in half with what they were.

    Raises:
        OptionError: a number of a weight does not fit its type.
    """
    for name, original in originals.items():
        tensor = graph.initializers[name].const_value if name in graph.initializers else None
        if tensor is None or not np.isfinite(original).all() or np.isfinite(tensor.numpy().astype(np.float32)).all():
            continue
        raise OptionError(
            f"{name} reaches {np.abs(original).max():g}, which {tensor.numpy().dtype.name} cannot hold: "
            "keep it in fp32 with a --plan, or export without that precision"
        )


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


def _store(graph: ir.Graph, node: ir.Node, originals: dict[str, np.ndarray]) -> None:
    [weight], [typed] = node.inputs, node.outputs
    if weight is None or weight.name is None or weight.const_value is None or typed.dtype is None:
        raise TypeError(f"{node.name} does not read a weight")
    array = weight.const_value.numpy()
    originals.setdefault(weight.name, array)
    with np.errstate(over="ignore"):
        converted: np.ndarray = array.astype(typed.dtype.numpy())
    ir.convenience.replace_all_uses_with(typed, weight)
    graph.remove(node, safe=True)
    weight.const_value = ir.tensor(converted, dtype=typed.dtype, name=weight.name)
    weight.dtype = typed.dtype
