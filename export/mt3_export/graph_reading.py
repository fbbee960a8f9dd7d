"""Reads graphs of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

if TYPE_CHECKING:
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.manifest import GraphFile


def read_graph(bundle: Bundle, entry: GraphFile) -> ir.Model:
    """A graph as it stands in its bundle; its weights stay where they are.

    Raises:
        BundleError: the file is not what the manifest lists.
    """
    return ir.from_proto(onnx.load_from_string(bundle.read(entry.file)))
