"""A `Gpu` on CUDA: memory, one stream, events and captured graphs, through `cuda.bindings.runtime`.

Kept thin: it has not run on a GPU in the test suite. Names and meanings of the calls are those of the CUDA runtime's
reference, in the form of cuda-python 12.8 and 13 (every call returns its error code first).
"""

from __future__ import annotations

import ctypes
import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.errors import DependencyError, DeviceError, DeviceLostError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from mt3_runtime.backends.gpu import Plane

INSTALL = "pip install 'mt3-runtime[cuda]'"
# After one of these every later call of the process fails too (CUDA runtime reference, cudaError_t).
LOST = frozenset(
    f"cudaError{name}"
    for name in (
        "IllegalAddress",
        "IllegalInstruction",
        "MisalignedAddress",
        "InvalidAddressSpace",
        "InvalidPc",
        "HardwareStackError",
        "Assert",
        "LaunchFailure",
        "LaunchTimeout",
        "ECCUncorrectable",
        "NvlinkUncorrectable",
        "DevicesUnavailable",
        "Contained",
        "ExternalDevice",
        "MpsClientTerminated",
        "TensorMemoryLeak",
    )
)


def import_cuda() -> Any:
    """The module cuda.bindings.runtime.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")  # an extra, which a machine without a GPU does not need
    except ImportError as error:
        raise DependencyError(f"cuda.bindings cannot be imported ({error}): {INSTALL}") from None


class CudaGpu:
    """One GPU and one stream on it, for one thread at a time.

    Raises:
        DependencyError: cuda-bindings is not installed.
        DeviceError: there is no such GPU, or its driver is too old or not there.
    """

    def __init__(self, index: int = 0) -> None:
        self._cuda, self._index = import_cuda(), index
        self._allocated: set[int] = set()
        self._pinned: list[int] = []
        self._events: list[Any] = []
        self._graphs: list[Any] = []
        count = self._checked("cudaGetDeviceCount")
        if not 0 <= index < count:
            raise DeviceError(f"there is no GPU {index}, only {count}: use --device cuda:0 to cuda:{count - 1}")
        properties = self._call("cudaGetDeviceProperties", index)
        self.name = str(properties.name.split(b"\0")[0].decode())
        self.capability = int(properties.major), int(properties.minor)
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    @property
    def versions(self) -> dict[str, str]:
        """CUDA versions of the runtime, and the newest that the driver knows."""
        numbers = {name: self._call(f"cuda{name}GetVersion") for name in ("Driver", "Runtime")}
        return {name.lower(): f"{number // 1000}.{number % 1000 // 10}" for name, number in numbers.items()}

    @property
    def free_memory(self) -> int:
        """Bytes that nobody on this GPU uses."""
        return int(self._call("cudaMemGetInfo")[0])

    def use(self) -> None:
        """See `Gpu.use`."""
        self._checked("cudaSetDevice", self._index)

    def allocate(self, size: int) -> int:
        """See `Gpu.allocate`."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        self._allocated.add(address)
        return address

    def free(self, address: int) -> None:
        """See `Gpu.free`."""
        self.synchronize()  # the reference does not promise that cudaFree waits for other streams
        self._call("cudaFree", address)
        self._allocated.discard(address)

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """See `Gpu.pinned`."""
        address = int(self._call("cudaMallocHost", max(size, 1)))
        self._pinned.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """See `Gpu.upload`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, self._stream)

    def download(self, target: NDArray[Any], source: int) -> None:
        """See `Gpu.download`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, self._stream)

    def copy(self, target: Plane, address: int, pitch: int) -> None:
        """See `Gpu.copy`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if target.height == 1:
            self._call("cudaMemcpyAsync", target.address, address, target.width, kind, self._stream)
        else:
            lines = target.width, target.height
            self._call("cudaMemcpy2DAsync", target.address, target.pitch, address, pitch, *lines, kind, self._stream)

    def clear(self, target: Plane) -> None:
        """See `Gpu.clear`."""
        lines = target.width, target.height
        self._call("cudaMemset2DAsync", target.address, target.pitch, 0, *lines, self._stream)

    def event(self) -> Any:
        """See `Gpu.event`."""
        event = self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
        self._events.append(event)
        return event

    def record(self, event: Any) -> None:
        """See `Gpu.record`."""
        self._call("cudaEventRecord", event, self._stream)

    def wait(self, event: Any) -> None:
        """See `Gpu.wait`."""
        self._call("cudaEventSynchronize", event)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """See `Gpu.capture`."""
        # thread-local: another thread's allocation would break a global capture
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            self._abandon_capture()
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._cuda.cudaGraphDestroy(graph)
        self._graphs.append(executable)
        return lambda: self._call("cudaGraphLaunch", executable, self._stream)

    def synchronize(self) -> None:
        """See `Gpu.synchronize`."""
        if self._stream is not None:
            self._call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """See `Gpu.close`; errors are left to whoever uses the GPU next, as the process may be ending for one."""
        if self._stream is None:
            return
        cuda = self._cuda
        cuda.cudaSetDevice(self._index)
        cuda.cudaStreamSynchronize(self._stream)
        for destroy, things in (
            (cuda.cudaGraphExecDestroy, self._graphs),
            (cuda.cudaEventDestroy, self._events),
            (cuda.cudaFreeHost, self._pinned),
            (cuda.cudaFree, sorted(self._allocated)),
            (cuda.cudaStreamDestroy, [self._stream]),
        ):
            for thing in things:
                destroy(thing)
        self._graphs, self._events, self._pinned, self._allocated, self._stream = [], [], [], set(), None

    def _abandon_capture(self) -> None:
        """End a capture whose commands failed; what CUDA says to that is a consequence of the error under way."""
        _, graph = self._cuda.cudaStreamEndCapture(self._stream)
        self._cuda.cudaGetLastError()  # or a later call would report it
        if graph is not None and int(graph):
            self._cuda.cudaGraphDestroy(graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What a call returns, made on this GPU: CUDA has one current device a thread, which others change too."""
        self.use()
        return self._checked(name, *arguments)

    def _checked(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise cuda_error(error.name, name, self._cuda)
        return results[0] if len(results) == 1 else results


def cuda_error(code: str, call: str, cuda: Any) -> DeviceError:
    """The error of this family for an error code of CUDA, by its name; clears it where CUDA keeps it for later."""
    cuda.cudaGetLastError()
    if code == "cudaErrorMemoryAllocation":
        return OutOfMemoryError("the GPU has not enough free memory: use fewer --slots, or end what else runs on it")
    if code in LOST:
        return DeviceLostError(
            f"the GPU stopped with {code} in {call}, and this process cannot use it any more: run again, and report "
            "it with the output of mt3-run doctor if it comes back"
        )
    if code in {"cudaErrorInsufficientDriver", "cudaErrorNoDevice", "cudaErrorInitializationError"}:
        return DeviceError(
            f"CUDA cannot be used here ({code}): install or update the NVIDIA driver, see mt3-run doctor"
        )
    return DeviceError(f"CUDA refused {call} ({code}): run mt3-run doctor, and report it")
