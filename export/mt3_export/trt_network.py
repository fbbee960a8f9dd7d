"""Parses a graph to a strongly typed TensorRT network, and compares every type that can be seen with the graph's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnx import TensorProto

from mt3_export.trt_graph import DTYPES
from mt3_runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mt3_export.trt_graph import ReadyGraph
    from mt3_runtime.graphs import TensorSpec

TRT_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT32: "INT32",
    TensorProto.INT8: "INT8",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
# Operators that must have become a layer of TensorRT's own, one each: their decompositions would compute wrongly or
# copy whole caches.
OWN_LAYERS = {"TensorScatter": "KV_CACHE_UPDATE", "Attention": "ATTENTION_INPUT"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a network: its type and the types of its outputs, as TensorRT spells them, by name."""

    kind: str
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Parsed:
    """A checked network. `compared`: how many tensors of the graph were found in it, with their types."""

    network: Any
    layers: tuple[Layer, ...]
    compared: int


def parse(trt: Any, builder: Any, logger: Any, graph: ReadyGraph) -> Parsed:
    """A network that has the inputs, outputs and types of the graph.

    Args:
        trt: the module of TensorRT or TensorRT-RTX.
        builder: a builder of it.
        logger: its logger, which keeps what it is told in `problems`.
        graph: what to parse.

    Raises:
        BundleError: the parser refuses it, or makes something else of it.
    """
    # TensorRT 10 asks for strong typing; from 11 on there is nothing else, and the flag may go.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        told = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors[:3])
        raise BundleError(f"TensorRT cannot parse {graph.spec.name} ({one_line(told)}): use a newer TensorRT")
    layers = tuple(_layers(network))
    _check_border("input", _tensors(network.get_input, network.num_inputs), graph.spec.inputs)
    _check_border("output", _tensors(network.get_output, network.num_outputs), graph.spec.outputs)
    _check_own_layers(layers, graph)
    compared = compare_types(layers, graph.types)
    _let_attention_be_decomposed(trt, network)
    return Parsed(network, layers, compared)


def one_line(text: str, limit: int = 400) -> str:
    """Text of a library without line breaks and not too long."""
    return " ".join(text.split())[:limit]


def compare_types(layers: Sequence[Layer], types: Mapping[str, int]) -> int:
    """How many outputs of layers are tensors of the graph, all of them of the graph's types.

    Raises:
        BundleError: one is of another type.
    """
    compared = 0
    for name, found in (output for layer in layers for output in layer.outputs):
        if name not in types:
            continue
        wanted = TRT_TYPES.get(types[name], "unknown")
        if found != wanted:
            raise BundleError(f"TensorRT computes {name:.80} in {found}, not {wanted}: use another TensorRT version")
        compared += 1
    return compared


def count_layers(layers: Sequence[Layer]) -> dict[str, int]:
    """How many layers of each type and type of output there are: `MATRIX_MULTIPLY HALF`."""
    counts = Counter(f"{layer.kind} {layer.outputs[0][1] if layer.outputs else '-'}" for layer in layers)
    return dict(sorted(counts.items()))


def _layers(network: Any) -> Iterator[Layer]:
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        outputs = (layer.get_output(i) for i in range(layer.num_outputs))
        yield Layer(layer.type.name, tuple((out.name, out.dtype.name) for out in outputs if out is not None))


def _tensors(get: Any, count: int) -> list[tuple[str, str, tuple[int, ...]]]:
    tensors = [get(i) for i in range(count)]
    return [(tensor.name, tensor.dtype.name, tuple(tensor.shape)) for tensor in tensors]


def _check_border(kind: str, found: list[tuple[str, str, tuple[int, ...]]], wanted: Sequence[TensorSpec]) -> None:
    """TensorRT drops what it has no use for, and says so to nobody."""
    names, promised = [name for name, _, _ in found], [tensor.name for tensor in wanted]
    if names != promised:
        differing = [name for name in (*promised, *names) if (name in names) != (name in promised)]
        problem = ", ".join(differing[:3]) or "their order"
        raise BundleError(f"TensorRT's network has other {kind}s than the graph ({problem}): use another version")
    for (name, dtype, shape), tensor in zip(found, wanted, strict=True):
        right = dtype == TRT_TYPES[DTYPES[tensor.dtype]] and len(shape) == len(tensor.shape)
        sized = all(not isinstance(size, int) or size == got for size, got in zip(tensor.shape, shape, strict=False))
        if not right or not sized:
            raise BundleError(f"TensorRT's {kind} {name} is {dtype} {shape}, not {tensor}: use another version")


def _check_own_layers(layers: Sequence[Layer], graph: ReadyGraph) -> None:
    for operator, kind in OWN_LAYERS.items():
        wanted = graph.operators.get(operator, 0)
        found = sum(layer.kind == kind for layer in layers)
        if found < wanted:
            problem = f"made {found} {kind} layers of {wanted} {operator} operators of {graph.spec.name}"
            raise BundleError(f"TensorRT {problem}: use TensorRT 10.15 or newer")


def _let_attention_be_decomposed(trt: Any, network: Any) -> None:
    """Where a GPU has no kernel for an attention of this size and type, plain products are better than no engine."""
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
