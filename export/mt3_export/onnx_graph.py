"""Traces one torch module to one ONNX graph that keeps its contract."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING

import onnx
import torch

from mt3_export.experts import expand_experts
from mt3_export.kept_products import keep_products
from mt3_export.typed_weights import check_range, write_types
from mt3_runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from mt3_export.mixed_plan import MixedPlan
    from mt3_runtime.graphs import GraphSpec, TensorSpec

OPSET = 24
CUDA_OPSET, CUDA_OPSET_BF16 = 18, 22  # the latter has convolutions in bfloat16
PREFIX = "weights"  # initializers are named `weights.{parameter}`, apart from everything the exporter names
# Sizes to trace with: not 1, which the exporter would take for a constant, and unlike each other.
TRACE_SIZES = {"segments": 2, "rows": 3, "length": 48, "written": 80}


def trace(module: torch.nn.Module, spec: GraphSpec, mixed: MixedPlan | None = None) -> ir.Model:
    """Trace `module` to opset 24.

    Args:
        module: of half precision, or not.
        spec: the graph's contract, in the module's precision.
        mixed: names products that stay in float32 in half precision.

    Raises:
        BundleError: the traced graph does not have the inputs and outputs that `spec` promises.
        OptionError: a weight does not fit its type, or there is no product that the plan keeps.
    """
    examples = tuple(_example(tensor) for tensor in spec.inputs)
    axes = {name: torch.export.Dim(name) for name in TRACE_SIZES}
    dynamic = tuple(
        {i: axes[size] for i, size in enumerate(tensor.shape) if isinstance(size, str)} for tensor in spec.inputs
    )
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Positional(module).eval(),
            examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=spec.input_names,
            output_names=spec.output_names,
            dynamic_shapes=(dynamic,),
            verbose=False,
        )
    if program is None:  # pragma: no cover -- only the old exporter returns nothing
        raise BundleError(f"torch exported no graph for {spec.name}: use torch >= 2.10")
    model = program.model
    _check_contract(model.graph, spec)
    expand_experts(model)
    originals = write_types(model)
    if mixed:
        keep_products(model.graph, spec.name, mixed, originals)
    check_range(model.graph, originals)
    _tidy(model, spec)
    return model


def for_cuda(model: ir.Model) -> None:
    """Say that a graph is of an older opset, which has all of its operators.

    ONNX Runtime's CUDA provider finds a kernel by the exact version of an operator, and has none for Cast, Reshape,
    Transpose and others as opset 24 has them (docs/OperatorKernels.md): such a node would run on the CPU.

    Raises:
        BundleError: that opset lacks an operator.
    """
    graph = model.graph
    older = all(_is_known(node.op_type, node.outputs[0]) for node in graph)
    version = graph.opset_imports[""] = CUDA_OPSET if older else CUDA_OPSET_BF16
    newer = {node.op_type for node in graph if not node.domain and not onnx.defs.has(node.op_type, version, "")}
    if newer:
        raise BundleError(f"opset {version} has no {', '.join(sorted(newer))}: use the pinned torch and onnxscript")


def _is_known(operator: str, output: ir.Value) -> bool:
    """Whether opset 18 has the operator for that type: bfloat16 came later to some."""
    return operator not in ("Conv", "AveragePool") or output.dtype is None or output.dtype.name != "BFLOAT16"


class _Positional(torch.nn.Module):
    """Gives every module the same signature, so that axes are described in one way; and its weights a prefix."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        setattr(self, PREFIX, module)

    def forward(self, *inputs: torch.Tensor) -> object:
        return getattr(self, PREFIX)(*inputs)


def _example(tensor: TensorSpec) -> torch.Tensor:
    shape = [TRACE_SIZES[size] if isinstance(size, str) else size for size in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says of itself: packages it does not find, its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", category=UserWarning, message=".*axis name.*will not be used.*")
            yield
    finally:
        logger.setLevel(level)


def _tidy(model: ir.Model, spec: GraphSpec) -> None:
    """Unname outputs that nobody reads, and drop what only a debugger wants."""
    graph = model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            if not output.uses() and not output.is_graph_output():
                output.name = ""
                output.shape = None
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name = spec.name
    model.producer_name, model.producer_version = "mt3-runtime", ""


def _check_contract(graph: ir.Graph, spec: GraphSpec) -> None:
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        found = [_describe(value) for value in values]
        wanted = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
        for given, promised in zip_longest(found, wanted):
            if given != promised:
                message = f"{spec.name} was traced with {given}, not {promised}: use the pinned torch and onnxscript"
                raise BundleError(message)


def _describe(value: ir.Value) -> tuple[str | None, str, tuple[int | str | None, ...]]:
    dtype = value.dtype.numpy().name if value.dtype else "no type"
    return value.name, dtype, tuple(size if isinstance(size, int) else size.value for size in value.shape or ())
