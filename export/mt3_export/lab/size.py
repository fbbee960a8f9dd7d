"""How much of a bundle a precision reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from mt3_export.graph_reading import read_graph

if TYPE_CHECKING:
    from mt3_runtime.bundle import Bundle


def bytes_read(bundle: Bundle, lowering: str, precision: str) -> int | None:
    """Bytes of the graphs of one form and of the weights that they refer to, each once; None if it has none.

    Graphs share a file of weights without reading all of it.

    Raises:
        BundleError: a graph is not what the manifest lists.
    """
    graphs: set[str] = set()
    weights: dict[tuple[str, int], int] = {}
    for entry in bundle.manifest.graphs:
        if (entry.lowering, entry.precision) == (lowering, precision):
            graphs.add(entry.file)
            model = read_graph(bundle, entry)
            for value in model.graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    tensor = value.const_value
                    weights[entry.weights, tensor.offset or 0] = tensor.length or tensor.nbytes
    total = sum(bundle.manifest.files[name].size for name in graphs) + sum(weights.values())
    return total if graphs else None
