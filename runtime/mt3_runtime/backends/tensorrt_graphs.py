"""Engines of TensorRT and TensorRT-RTX as `Graphs`: contexts over our memory, on our stream.

Written from the Python API's reference and from what the module of TensorRT-RTX 1.7 says of itself; nothing here has
run on a GPU in the test suite.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from mt3_runtime.backends.gpu import ALIGNMENT, SIZES, DeviceTensor
from mt3_runtime.errors import BundleError, DeviceError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mt3_runtime.backends.gpu_memory import CudaGpu
    from mt3_runtime.graphs import DType, GraphSpec

STEP = "decode_step"
SEGMENTS = ("features", "encoder")
ROWS = ("cross_kv", "prefix", STEP)  # graphs that take many rows at once; a memory is computed row by row
TYPES: dict[str, DType] = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32"}
FIRST_INPUTS = {
    "features": "samples",
    "encoder": "features",
    "cross_kv": "states",
    "memory": "tokens",
    "prefix": "memory",
}
REBUILD = "build it again with mt3-export engines"
EngineName = tuple[str, int | None]  # graph, and length of its cache


@dataclass(slots=True, eq=False)
class Engine:
    """A plan that was loaded. `runtime_cache`: what TensorRT-RTX compiled for this GPU, kept for the next process."""

    engine: Any
    config: Any = None
    runtime_cache: Any = None

    def largest(self, tensor: str, axis: int) -> int:
        """The largest size of an axis of an input that it was built for."""
        return int(self.engine.get_tensor_profile_shape(tensor, 0)[2][axis])


class TrtGraphs:
    """Engines by graph and cache length; see `Graphs`.

    A decode step has one context for every number of rows, as what is captured must not change its shapes; the others
    have one each. All contexts work in one stretch of scratch memory: on one stream they never overlap.
    """

    captures = True

    def __init__(self, trt: Any, gpu: CudaGpu, engines: Mapping[EngineName, Engine]) -> None:
        self._trt, self._gpu, self.engines = trt, gpu, dict(engines)
        self.names = frozenset(name for name, _ in engines)
        self.lengths: tuple[int, ...] | None = tuple(sorted(length for name, length in engines if length is not None))
        self.segments: int | None = min(
            engine.largest(first_input(name), 0) for (name, _), engine in engines.items() if name in SEGMENTS
        )
        self.rows: int | None = min(
            engine.largest(first_input(name), 0) for (name, _), engine in engines.items() if name in ROWS
        )
        size = max(int(engine.engine.device_memory_size_v2) for engine in engines.values())
        self._scratch, self._scratch_size = gpu.allocate(size), size
        self._contexts: dict[tuple[EngineName, int], Any] = {}
        self._unread: dict[tuple[EngineName, str], int] = {}  # addresses of outputs that nobody wants

    def bind(self, graph: str, tensors: Sequence[DeviceTensor]) -> Callable[[], None]:
        """See `Graphs.bind`."""
        if odd := [tensor.name for tensor in tensors if tensor.address % ALIGNMENT]:
            raise DeviceError(f"{odd[0]} of {graph} stands at an address that TensorRT does not take: report it")
        length = next(tensor.shape[2] for tensor in tensors if tensor.name == "self_key.0") if graph == STEP else None
        name = graph, length
        engine = self.engines[name].engine
        rows = tensors[0].shape[0] if graph == STEP else 0
        context = self._context(name, rows)
        inputs = [tensor for tensor in tensors if is_input(self._trt, engine, tensor.name)]
        places = {tensor.name: tensor.address for tensor in tensors}
        self._set_shapes(graph, context, inputs)
        for index in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(index)
            if tensor not in places:
                places[tensor] = self._place_for(name, tensor, context)

        def run() -> None:
            self._gpu.use()
            if graph != STEP:
                self._set_shapes(graph, context, inputs)
            for tensor, address in places.items():
                if not context.set_tensor_address(tensor, address):
                    raise DeviceError(f"TensorRT takes no memory for {tensor} of {graph}: {REBUILD}")
            if not context.execute_async_v3(self._gpu.stream):
                raise DeviceError(f"TensorRT could not run {graph}: see what it printed above, and mt3-run doctor")

        return run

    def close(self) -> None:
        """See `Graphs.close`."""
        with suppress(DeviceError):
            self._gpu.use()
        self._contexts.clear()
        self.engines.clear()

    def _context(self, name: EngineName, rows: int) -> Any:
        if (name, rows) not in self._contexts:
            self._gpu.use()
            engine = self.engines[name]
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = engine.engine.create_execution_context(engine.config or strategy)
            if context is None:
                raise OutOfMemoryError(f"TensorRT has no room to run {name[0]}: use fewer --slots")
            context.set_device_memory(self._scratch, self._scratch_size)
            self._contexts[name, rows] = context
        return self._contexts[name, rows]

    def _set_shapes(self, graph: str, context: Any, inputs: Sequence[DeviceTensor]) -> None:
        for tensor in inputs:
            if not context.set_input_shape(tensor.name, tensor.shape):
                shape = " x ".join(map(str, tensor.shape))
                raise DeviceError(f"the engine of {graph} takes no {tensor.name} of {shape}: build a larger profile")

    def _place_for(self, name: EngineName, tensor: str, context: Any) -> int:
        """Memory for an output that nobody reads, for the largest of its shapes so far."""
        engine = self.engines[name].engine
        if is_input(self._trt, engine, tensor):
            raise BundleError(f"the engine of {name[0]} asks for {tensor}, which it should not: {REBUILD}")
        rows = self.engines[name].largest(first_input(name[0]), 0)
        if (name, tensor) not in self._unread:
            shape = (rows, *tuple(context.get_tensor_shape(tensor))[1:])
            self._unread[name, tensor] = self._gpu.allocate(prod(shape) * SIZES[tensor_type(engine, tensor)])
        return self._unread[name, tensor]


def first_input(graph: str) -> str:
    """The input whose first axis counts the segments or rows of a call."""
    return FIRST_INPUTS.get(graph, "token")


def is_input(trt: Any, engine: Any, tensor: str) -> bool:
    """Whether a tensor of an engine is an input."""
    return bool(engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT)


def tensor_type(engine: Any, tensor: str) -> DType:
    """The type of a tensor of an engine, by our name."""
    return TYPES[engine.get_tensor_dtype(tensor).name]


def load_engine(trt: Any, runtime: Any, plan: bytes, contract: GraphSpec, cache: bytes | None) -> Engine:
    """An engine that keeps its contract, ready for contexts.

    Args:
        trt: module of TensorRT or TensorRT-RTX.
        runtime: its `Runtime`.
        plan: the serialised engine, checked to be one that was built here.
        contract: of the graph, in the precision of the engine.
        cache: what an earlier process saved of `Engine.runtime_cache`; refused by TensorRT-RTX if anything changed.

    Raises:
        BundleError: it has other inputs or outputs.
        DeviceError: TensorRT refuses it.
    """
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise DeviceError(f"TensorRT {trt.__version__} refuses the engine of {contract.name} on this GPU: {REBUILD}")
    check_engine(trt, engine, contract)
    if not hasattr(engine, "create_runtime_config") or not hasattr(trt, "CudaGraphStrategy"):
        return Engine(engine)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # we capture, several steps at once
    # kernels for the very shapes before the first run: nothing may be compiled inside a capture
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    kept = config.create_runtime_cache()
    if cache:
        kept.deserialize(cache)
    config.set_runtime_cache(kept)
    return Engine(engine, config, kept)


def check_engine(trt: Any, engine: Any, contract: GraphSpec) -> None:
    """Compare names, kinds, types and fixed sizes of inputs and outputs with the contract.

    Raises:
        BundleError: one is missing, or differs.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {
        (is_input(trt, engine, name), name, tensor_type(engine, name), tuple(engine.get_tensor_shape(name)))
        for name in names
    }
    lengths = {shape[2] for _, name, _, shape in found if name.startswith("self_key")}
    wanted = set()
    for kind, tensors in ((True, contract.inputs), (False, contract.outputs)):
        for tensor in tensors:
            length = next(iter(lengths), -1)
            sizes = [length if size == "length" else -1 if isinstance(size, str) else size for size in tensor.shape]
            wanted.add((kind, tensor.name, tensor.dtype, tuple(sizes)))
    if wrong := sorted(found ^ wanted):
        kind, name, dtype, shape = wrong[0]
        which, role = "has" if wrong[0] in found else "lacks", "input" if kind else "output"
        raise BundleError(f"the engine of {contract.name} {which} an {role} {name} of {dtype} {list(shape)}: {REBUILD}")
