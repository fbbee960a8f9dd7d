"""ONNX Runtime's sessions on the CPU: every file verified before any is parsed, every graph held to its contract."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from mt3_runtime.errors import BundleError, DependencyError
from mt3_runtime.interrupts import interrupts_held
from mt3_runtime.machine import may_spin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.bundle import Bundle
    from mt3_runtime.manifest import GraphFile

PROVIDER = "CPUExecutionProvider"
TYPES = {"float32": "tensor(float)", "int32": "tensor(int32)", "float16": "tensor(float16)"}
SPIN_US = 1000  # how long a worker waits awake: longer than the host between two steps, shorter than what it steals


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        with interrupts_held():  # ONNX Runtime makes an ImportError of it, as if it were not installed
            import onnxruntime  # noqa: PLC0415 -- not a base dependency: CPU and GPU builds exclude each other
    except ImportError as error:
        raise DependencyError(f"onnxruntime cannot be imported ({error}): pip install 'mt3-runtime[cpu]'") from None
    return onnxruntime


def open_session(bundle: Bundle, entry: GraphFile, *, threads: int, fused: bool = True) -> Any:
    """An onnxruntime.InferenceSession over one verified graph and its verified weights, on the CPU.

    Without `fused`, levels of `DequantizeLinear` are multiplied as the numbers they stand for: weights may have all
    levels of 8 bits then, whatever the processor (see `mt3_export.qdq`).

    Raises:
        BundleError: see `open_sessions`.
    """
    return open_sessions(bundle, [entry], threads=threads, fused=fused)[entry.graph]


def open_sessions(bundle: Bundle, entries: Sequence[GraphFile], *, threads: int, fused: bool = True) -> dict[str, Any]:
    """The sessions of several graphs by name, made side by side; each file is read for its hash once.

    Raises:
        BundleError: a file is not what the manifest lists, ONNX Runtime refuses a graph, or a graph does not keep
            its contract.
    """
    ort = import_onnxruntime()
    texts = [bundle.read(entry.file) for entry in entries]
    for weights in dict.fromkeys(entry.weights for entry in entries):
        bundle.verify(weights)
    options = session_options(bundle, threads)
    options.add_session_config_entry("session.disable_quant_qdq", str(int(not fused)))
    # Also for a single one: the thread that makes a process's first session computes without denormals for ever after.
    with ThreadPoolExecutor(max_workers=threads) as executor:
        made = [executor.submit(_make, ort, bundle, *pair, options) for pair in zip(entries, texts, strict=True)]
        return {entry.graph: session.result() for entry, session in zip(entries, made, strict=True)}


def session_options(bundle: Bundle, threads: int) -> Any:
    """How every session runs: `threads` threads, and no memory for plans of shapes that it has met."""
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A plan is made in a first run and used from the second on, in memory of its own beside that of the first.
    options.enable_mem_pattern = False
    entries = {
        "session.set_denormal_as_zero": "1",
        "session.model_external_initializers_file_folder_path": str(bundle.path),
        "session.intra_op.allow_spinning": str(int(may_spin(threads))),
        "session.intra_op.spin_duration_us": str(SPIN_US),
    }
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return options


def _make(ort: Any, bundle: Bundle, entry: GraphFile, text: bytes, options: Any) -> Any:
    try:
        session = ort.InferenceSession(text, options, providers=[PROVIDER])
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BundleError(f"ONNX Runtime cannot load {entry.file} of {bundle.path} ({reason}): export again") from error
    contract = next(spec for spec in bundle.manifest.contracts if spec.name == entry.graph).typed(entry.precision)
    for nodes, tensors in ((session.get_inputs(), contract.inputs), (session.get_outputs(), contract.outputs)):
        found = [(node.name, node.type, tuple(node.shape)) for node in nodes]
        if found != [(tensor.name, TYPES[tensor.dtype], tensor.shape) for tensor in tensors]:
            raise BundleError(f"{entry.file} of {bundle.path} is not the {entry.graph} graph: export again")
    return session
