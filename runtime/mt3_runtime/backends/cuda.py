"""The backend on ONNX Runtime's CUDA provider: sessions on our stream, bound to our memory.

Written from ONNX Runtime's documentation and sources (1.31); nothing here has run on a GPU in the test suite:
* A session takes our stream as `user_compute_stream`, and does not wait for it with the run option
  `disable_synchronize_execution_providers`; since pull request 28686 that also holds for its replays of CUDA graphs.
* Its own CUDA graphs are used (`enable_cuda_graph`, one `gpu_graph_id` a shape and step): a capture around its runs
  fails in these releases (pull request 32081). It captures during the first run with an id, after it has run the same
  step a few times: harmless, as a step reads nothing that it writes. -1 means neither capture nor replay.
* Captured graphs belong to the thread that ran them: use a backend from one thread.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

from mt3_runtime.backends.device_rows import DeviceOptions, DeviceRows, give_back
from mt3_runtime.backends.gpu_memory import INSTALL, CudaGpu
from mt3_runtime.backends.ort import import_onnxruntime
from mt3_runtime.errors import BundleError, DeviceError, DeviceLostError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mt3_runtime.backends.gpu import DeviceTensor
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.graphs import DType, GraphSpec, Precision
    from mt3_runtime.manifest import GraphFile

LOWERING = "cuda"
PROVIDER, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
CHUNK = 8  # steps; each is captured on its own
TYPES: dict[DType, str] = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int32": "int32"}
ELEMENTS: dict[DType, int] = {"float32": 1, "float16": 10, "bfloat16": 16, "int32": 6}  # onnx.TensorProto.DataType
NO_MEMORY = ("out of memory", "failed to allocate memory", "memoryallocation", "alloc_failed", "allocation_failed")
STEP = "decode_step"
# ONNX Runtime computes sizes of tensors on the CPU by design, with these: `session.disable_cpu_ep_fallback` would
# refuse them too. A captured step may have them, as sizes never change; sums could also be of positions, which do.
SIZES = frozenset(
    (
        "Shape",
        "Size",
        "Constant",
        "Gather",
        "Slice",
        "Concat",
        "Squeeze",
        "Unsqueeze",
        "Cast",
        "Add",
        "Sub",
        "Mul",
        "Range",
    )
)
STEP_SIZES = SIZES - {"Add", "Sub", "Mul"}


class CudaBackend(DeviceRows):
    """Runs a bundle on an NVIDIA GPU with ONNX Runtime.

    Raises:
        BundleError: the bundle has no such graphs, or they are damaged.
        DependencyError: onnxruntime or cuda-bindings is not installed.
        DeviceError: the GPU, its driver, CUDA or cuDNN is missing, or a part of the network would run on the CPU.
        OutOfMemoryError: fewer slots may fit.
        OptionError: see `DeviceRows`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device_index: int = 0,
        slots: int = 8,
        length: int | None = None,
        precision: Precision = "fp16",
        chunk: int = CHUNK,
        capture: bool = True,
    ) -> None:
        import_provider()
        gpu = CudaGpu(device_index)
        graphs: CudaGraphs | None = None
        try:
            graphs = CudaGraphs(bundle, gpu, device_index, precision, capture=capture)
            options = DeviceOptions(slots, length, precision, chunk)
            super().__init__(bundle.manifest, gpu, graphs, options, device=f"cuda:{device_index}", provider=PROVIDER)
            self.capture_problem = graphs.capture_problem
        except BaseException:
            give_back(gpu, graphs)
            raise


class CudaGraphs:
    """Sessions of all graphs of a bundle; see `Graphs`."""

    captures = False  # ONNX Runtime captures by itself
    lengths: tuple[int, ...] | None = None
    segments: int | None = None
    rows: int | None = None

    def __init__(self, bundle: Bundle, gpu: CudaGpu, index: int, precision: Precision, *, capture: bool) -> None:
        self._ort, self._index, self._capture = import_provider(), index, capture
        self._ids, self.capture_problem = count(1), ""
        self.sessions: dict[str, Any] = {}
        try:
            for spec in bundle.manifest.contracts:
                entry = bundle.graph(spec.name, LOWERING, precision)
                self.sessions[spec.name] = self._open(bundle, entry, spec.typed(precision), gpu.stream)
            self.names = frozenset(self.sessions)
        except BaseException:
            self.close()  # before the stream that they were given
            raise

    def _open(self, bundle: Bundle, entry: GraphFile, contract: GraphSpec, stream: int) -> Any:
        """A session; of a step without capture if ONNX Runtime refuses that: it only costs time."""
        if self._capture and entry.graph == STEP:
            try:
                options = provider_options(self._index, stream, capture=True)
                return open_session(bundle, entry, contract, [(PROVIDER, options)])
            except OutOfMemoryError:
                raise
            except DeviceError as error:
                self._capture, self.capture_problem = False, str(error)
        options = provider_options(self._index, stream, capture=False)
        return open_session(bundle, entry, contract, [(PROVIDER, options)])

    def bind(self, graph: str, tensors: Sequence[DeviceTensor]) -> Callable[[], None]:
        """See `Graphs.bind`."""
        session = self.sessions[graph]
        binding, outputs = session.io_binding(), {node.name for node in session.get_outputs()}
        for tensor in tensors:
            bind = binding.bind_output if tensor.name in outputs else binding.bind_input
            bind(tensor.name, "cuda", self._index, ELEMENTS[tensor.dtype], tensor.shape, tensor.address)
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        captured = self._capture and graph == STEP
        options.add_run_config_entry("gpu_graph_id", str(next(self._ids)) if captured else "-1")

        def run() -> None:
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:
                raise run_error(graph, error) from error

        return run

    def placement(self) -> dict[str, dict[str, int]]:
        """By graph, how many nodes each provider runs."""
        return {
            name: {who: len(nodes) for who, nodes in placed(session).items()} for name, session in self.sessions.items()
        }

    def close(self) -> None:
        """See `Graphs.close`."""
        self.sessions.clear()


def import_provider() -> Any:
    """The onnxruntime module, with CUDA's libraries loaded.

    Raises:
        DependencyError: it is not installed.
        DeviceError: it was built without CUDA.
    """
    ort = import_onnxruntime()
    if PROVIDER not in ort.get_available_providers():
        raise DeviceError(
            f"this onnxruntime {ort.__version__} was built without CUDA: pip uninstall onnxruntime, then {INSTALL}"
        )
    ort.preload_dlls()
    return ort


def provider_options(index: int, stream: int, *, capture: bool) -> dict[str, str]:
    """Of the CUDA provider; TensorFloat-32 would round the products that are meant to be fp32."""
    return {
        "device_id": str(index),
        "user_compute_stream": str(stream),
        "enable_cuda_graph": str(int(capture)),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",  # the exhaustive one runs anew for every number of segments
    }


def open_session(bundle: Bundle, entry: GraphFile, contract: GraphSpec, providers: Sequence[Any]) -> Any:
    """An onnxruntime.InferenceSession over one verified graph, of which no part but sizes may run on the CPU.

    Raises:
        BundleError: a file is not what the manifest lists, or the graph does not keep its contract.
        DeviceError: the provider cannot be had, or the graph would not run there.
        OutOfMemoryError: the GPU has no room for it.
    """
    ort = import_onnxruntime()
    data = bundle.read(entry.file)
    bundle.verify(entry.weights)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        # without its own way back to the CPU, which prints and hides why
        session = ort.InferenceSession(data, options, providers=list(providers), enable_fallback=0)
    except Exception as error:
        raise run_error(entry.file, error) from error
    wanted = providers[0][0] if isinstance(providers[0], tuple) else providers[0]
    check_placement(entry, session, wanted)
    for nodes, tensors in ((session.get_inputs(), contract.inputs), (session.get_outputs(), contract.outputs)):
        found = [(node.name, node.type, tuple(node.shape)) for node in nodes]
        if found != [(tensor.name, f"tensor({TYPES[tensor.dtype]})", tensor.shape) for tensor in tensors]:
            raise BundleError(f"{entry.file} of {bundle.path} is not the {entry.graph} graph: export again")
    return session


def check_placement(entry: GraphFile, session: Any, provider: str) -> None:
    """Refuse a session that does not run where it was asked to: ONNX Runtime goes to the CPU without an error.

    Raises:
        DeviceError: it has another provider, or some of its nodes have.
    """
    if session.get_providers()[0] != provider:
        raise DeviceError(
            f"ONNX Runtime could not start {provider} and went to {', '.join(session.get_providers())}: "
            "CUDA or cuDNN is missing or of another version, see mt3-run doctor"
        )
    elsewhere = [
        f"{operator} ({who})"
        for who, operators in placed(session).items()
        for operator in operators
        if who != provider and operator not in (STEP_SIZES if entry.graph == STEP else SIZES)
    ]
    if elsewhere:
        shown = ", ".join(sorted(set(elsewhere))[:5])
        raise DeviceError(
            f"{len(elsewhere)} nodes of {entry.file} would not run on {provider} but as {shown}: export again"
        )


def placed(session: Any) -> dict[str, list[str]]:
    """The operators that each provider of a session runs, one for every node."""
    found: dict[str, list[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, []).extend(node.op_type for node in part.get_nodes())
    return found


def run_error(what: str, error: Exception) -> DeviceError:
    """The error of this family for one of ONNX Runtime, which has only texts."""
    text = " ".join(str(error).split()) or type(error).__name__
    lower = text.lower()
    if any(word in lower for word in NO_MEMORY):
        return OutOfMemoryError(f"the GPU has not enough free memory for {what}: use fewer --slots")
    if any(
        word in lower
        for word in ("illegal memory access", "misaligned address", "launch failure", "device-side assert")
    ):
        return DeviceLostError(f"the GPU stopped in {what} ({text:.200}): run again, and report it if it comes back")
    return DeviceError(f"ONNX Runtime cannot run {what} on the GPU ({text:.300}): see mt3-run doctor")
