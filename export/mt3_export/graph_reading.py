"""Reads graphs of a bundle: verified, parsed, and held to what the runtime would load; weights are not read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto
from onnx.numpy_helper import to_array

from mt3_runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from mt3_runtime.bundle import Bundle
    from mt3_runtime.manifest import GraphFile


def read_graph(bundle: Bundle, entry: GraphFile) -> ir.Model:
    """A graph as it stands in its bundle; its weights stay where they are, and are for the caller to verify.

    Raises:
        BundleError: see `read_proto`.
    """
    return _graph(read_proto(bundle, entry), bundle.path, entry)


def read_proto(bundle: Bundle, entry: GraphFile) -> onnx.ModelProto:
    """The same as a message of ONNX.

    Raises:
        BundleError: the file is not what the manifest lists, or holds no whole graph, or refers to weights that do not
            stand in the file listed for them.
    """
    return _checked(bundle.read(entry.file), bundle.path, entry, bundle.manifest.files[entry.weights].size)


def read_written(folder: Path, entry: GraphFile) -> ir.Model:
    """A graph of a folder that is being written and has no manifest yet.

    Raises:
        BundleError: see `read_proto`.
    """
    data, room = (folder / entry.file).read_bytes(), (folder / entry.weights).stat().st_size
    return _graph(_checked(data, folder, entry, room), folder, entry)


def _graph(proto: onnx.ModelProto, folder: Path, entry: GraphFile) -> ir.Model:
    try:
        model = ir.from_proto(proto)
        ir.to_proto(model)  # what cannot be written, as names that are no text, is found here
    except (ir.serde.SerdeError, ValueError):
        raise _refusal(folder, entry, "it is no graph of ONNX") from None
    ir.external_data.set_base_dir(model.graph, folder)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _Weight.of(value.const_value, folder)
    return model


class _Weight(ir.ExternalTensor):
    """A tensor in the file that the manifest lists for it, by whatever other names that file is known.

    onnx_ir reads no file that has a second name, and some installers give every file of a package one. What it guards
    against, a graph that names a foreign file, `_problems` has refused.
    """

    @classmethod
    def of(cls, tensor: ir.ExternalTensor, folder: Path) -> _Weight:
        """The same tensor, its file being in that folder."""
        place = (tensor.location, tensor.offset, tensor.length, tensor.dtype)
        return cls(*place, shape=tensor.shape, name=tensor.name or "", base_dir=folder)

    def _check_path_containment(self) -> None:
        """What onnx_ir asks before it opens the file."""


def _checked(data: bytes, folder: Path, entry: GraphFile, room: int) -> onnx.ModelProto:
    try:
        model = onnx.load_from_string(data)
        problem = next(_problems(model, entry.weights, room), None)
    except (DecodeError, ValueError, TypeError, KeyError):  # the last two of types that cannot be
        problem = "it is no graph of ONNX"
    if problem:
        raise _refusal(folder, entry, problem)
    return model


def _refusal(folder: Path, entry: GraphFile, problem: str) -> BundleError:
    return BundleError(f"{folder / entry.file} cannot be used ({problem}): copy or export the bundle again")


def _problems(model: onnx.ModelProto, weights: str, room: int) -> Iterator[str]:
    """What keeps a graph from being loaded, with weights in a file of `room` bytes."""
    graph = model.graph
    if not graph.node:
        yield "it has no nodes"
    versions = {opset.domain: opset.version for opset in model.opset_import}
    for node in graph.node:
        if not _has_its_inputs(node, versions.get("", 0)):
            yield f"{node.op_type!r:.80} has too few or too many inputs or outputs"
    for name in _missing(graph, ()):
        yield f"nothing in it gives {name!r:.80}"
    for tensor in _tensors(graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            to_array(tensor)  # raises where there are more or fewer numbers than the shape says
        elif not _stands_in(tensor, weights, room):
            yield f"weight {tensor.name!r:.80} does not stand in {weights}"


def _has_its_inputs(node: onnx.NodeProto, version: int) -> bool:
    """Whether the operator takes and gives so many; of other domains, and of what is not known, nobody says."""
    if node.domain not in {"", "ai.onnx"} or not onnx.defs.has(node.op_type, version, ""):
        return True
    schema = onnx.defs.get_schema(node.op_type, version, "")
    takes, gives = len(node.input), len(node.output)
    return schema.min_input <= takes <= schema.max_input and schema.min_output <= gives <= schema.max_output


def _missing(graph: onnx.GraphProto, outer: Collection[str]) -> Iterator[str]:
    """Names that are read and that nothing gives; a graph inside of a node reads what stands around it, too."""
    given = {value.name for value in (*graph.input, *graph.initializer)}
    given |= {tensor.values.name for tensor in graph.sparse_initializer}
    given |= {name for node in graph.node for name in node.output}
    known = given.union(outer)
    read = [name for node in graph.node for name in node.input] + [value.name for value in graph.output]
    yield from (name for name in read if name and name not in known)
    for inner in _inner(graph):
        yield from _missing(inner, known)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every tensor of a graph and of those inside of its nodes."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors
    for inner in _inner(graph):
        yield from _tensors(inner)


def _inner(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs


def _stands_in(tensor: TensorProto, weights: str, room: int) -> bool:
    size = -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
    place = {entry.key: entry.value for entry in tensor.external_data}
    start, length = int(place.get("offset", 0)), int(place.get("length", -1))
    return place.get("location") == weights and length == size and 0 <= start <= start + length <= room
