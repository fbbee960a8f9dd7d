"""A GPU that is not there: the same schedule on the CPU, as late as CUDA may carry it out, and with its traps.

Commands are queued and carried out when somebody waits, or at once (`eager`), so that results that are read too early,
and buffers that change too early, show. Memory comes with NaN in it and goes back with NaN in it; every access is
checked against what was allocated. Captured commands keep the addresses that they were captured with.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.backends.device_rows import DeviceOptions, DeviceRows
from mt3_runtime.backends.gpu import ALIGNMENT, SIZES
from mt3_runtime.backends.ort import import_onnxruntime, open_session
from mt3_runtime.errors import OutOfMemoryError
from mt3_runtime.graphs import FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from mt3_runtime.backends.gpu import DeviceTensor, Plane
    from mt3_runtime.bundle import Bundle

POISON = 0xFF  # NaN in every type of float, -1 in every type of integer
NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int32": np.int32}
THREAD = threading.local()  # `gpu`: the one that this thread uses


class FakeEvent:
    """Stands for the first `commands` commands."""

    def __init__(self) -> None:
        self.commands = 0


class FakeGpu:
    """A `Gpu` in memory of the host, with room for `size` bytes.

    Raises:
        AssertionError: a call that CUDA would not forgive, a fault of the code under test.
    """

    def __init__(self, *, eager: bool = False, size: int = 1 << 40) -> None:
        self.name, self.eager, self.size = "fake", eager, size
        self.asked, self.done = 0, 0  # commands
        self._queue: list[Callable[[], None]] = []
        self._recording: list[Callable[[], None]] | None = None
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._starts: list[int] = []  # of what is allocated, rising
        self._pinned: list[NDArray[np.uint8]] = []
        self._graveyard: list[NDArray[np.uint8]] = []  # so that no address comes twice

    def use(self) -> None:
        """See `Gpu.use`."""
        THREAD.gpu = self

    @property
    def allocated(self) -> int:
        """Bytes in use."""
        return sum(array.nbytes for array in self._memory.values())

    def allocate(self, size: int) -> int:
        """See `Gpu.allocate`."""
        self._insist_not_capturing()
        if self.allocated + size > self.size:
            raise OutOfMemoryError(f"the fake GPU has no {size} bytes left: use fewer slots")
        whole = np.full(size + ALIGNMENT, POISON, np.uint8)
        start = -whole.ctypes.data % ALIGNMENT
        array = whole[start : start + size]
        self._memory[array.ctypes.data] = array
        self._starts = sorted(self._memory)
        return int(array.ctypes.data)

    def free(self, address: int) -> None:
        """See `Gpu.free`."""
        self.synchronize()
        array = self._memory.pop(address)
        array.fill(POISON)
        self._graveyard.append(array)
        self._starts = sorted(self._memory)

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """See `Gpu.pinned`."""
        self._insist_not_capturing()
        self._pinned.append(np.full(size, POISON, np.uint8))
        return self._pinned[-1]

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """See `Gpu.upload`."""
        self._insist_pinned(source)
        self._ask(lambda: _assign(self.view(target, source.nbytes), source.view(np.uint8).reshape(-1)))

    def download(self, target: NDArray[Any], source: int) -> None:
        """See `Gpu.download`."""
        self._insist_pinned(target)
        self._ask(lambda: _assign(target.view(np.uint8).reshape(-1), self.view(source, target.nbytes)))

    def copy(self, target: Plane, address: int, pitch: int) -> None:
        """See `Gpu.copy`."""
        insist(target.width <= min(target.pitch, pitch) or target.height == 1, "stretches overlap")

        def run() -> None:
            for line in range(target.height):
                source = self.view(address + line * pitch, target.width)
                _assign(self.view(target.address + line * target.pitch, target.width), source)

        self._ask(run)

    def clear(self, target: Plane) -> None:
        """See `Gpu.clear`."""

        def run() -> None:
            for line in range(target.height):
                self.view(target.address + line * target.pitch, target.width).fill(0)

        self._ask(run)

    def event(self) -> FakeEvent:
        """See `Gpu.event`."""
        return FakeEvent()

    def record(self, event: FakeEvent) -> None:
        """See `Gpu.record`."""
        self._insist_not_capturing()
        event.commands = self.asked

    def wait(self, event: FakeEvent) -> None:
        """See `Gpu.wait`."""
        self._insist_not_capturing()
        self._carry_out(event.commands)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """See `Gpu.capture`."""
        self._insist_not_capturing()
        recorded: list[Callable[[], None]] = []
        self._recording = recorded
        try:
            enqueue()
        finally:
            self._recording = None

        def replay() -> None:
            for command in recorded:
                self._ask(command)

        return replay

    def synchronize(self) -> None:
        """See `Gpu.synchronize`."""
        self._insist_not_capturing()
        self._carry_out(self.asked)

    def close(self) -> None:
        """See `Gpu.close`."""
        self._queue.clear()
        for memory in self._pinned:
            memory.fill(POISON)
        self.done = self.asked
        for address in list(self._memory):
            self.free(address)

    def run(self, command: Callable[[], None]) -> None:
        """Ask for a command: what a graph does."""
        self._ask(command)

    def view(self, address: int, size: int) -> NDArray[np.uint8]:
        """Memory of the device, which must be allocated and in one piece."""
        index = bisect_right(self._starts, address) - 1
        insist(index >= 0, f"{address} is no address of this device")
        array = self._memory[self._starts[index]]
        start = address - self._starts[index]
        insist(start + size <= array.nbytes, f"{size} bytes at {start} of {array.nbytes} that were allocated")
        return array[start : start + size]

    def array(self, tensor: DeviceTensor) -> NDArray[Any]:
        """A tensor's memory as an array; bfloat16 as its bits."""
        count = int(np.prod(tensor.shape, dtype=np.int64))
        return (
            self.view(tensor.address, count * SIZES[tensor.dtype]).view(NUMPY_TYPES[tensor.dtype]).reshape(tensor.shape)
        )

    def _ask(self, command: Callable[[], None]) -> None:
        if self._recording is not None:
            self._recording.append(command)
            return
        self._queue.append(command)
        self.asked += 1
        if self.eager:
            self._carry_out(self.asked)

    def _carry_out(self, commands: int) -> None:
        while self.done < commands:
            command = self._queue.pop(0)
            self.done += 1
            try:
                command()
            except BaseException:
                self._queue.clear()  # a device that failed does nothing any more
                self.done = self.asked
                raise

    def _insist_not_capturing(self) -> None:
        insist(self._recording is None, "this call cannot be captured")

    def _insist_pinned(self, array: NDArray[Any]) -> None:
        insist(any(np.shares_memory(array, own) for own in self._pinned), "this memory of the host is not pinned")


class FakeGraphs:
    """`Graphs` as functions of arrays by name, which write their outputs into the arrays they are given.

    Raises:
        AssertionError: a tensor that the function does not know, or of another shape.
    """

    def __init__(
        self,
        gpu: FakeGpu,
        functions: Mapping[str, Callable[[dict[str, NDArray[Any]]], None]],
        *,
        captures: bool = True,
        lengths: tuple[int, ...] | None = None,
        segments: int | None = None,
        rows: int | None = None,
    ) -> None:
        self._gpu, self._functions, self.names = gpu, dict(functions), frozenset(functions)
        self.captures, self.lengths, self.segments, self.rows = captures, lengths, segments, rows

    def bind(self, graph: str, tensors: Sequence[DeviceTensor]) -> Callable[[], None]:
        """See `Graphs.bind`."""
        for tensor in tensors:
            insist(tensor.address % ALIGNMENT == 0, f"{tensor.name} of {graph} stands at an odd address")
        function = self._functions[graph]
        return lambda: self._gpu.run(lambda: function({tensor.name: self._gpu.array(tensor) for tensor in tensors}))

    def close(self) -> None:
        """See `Graphs.close`."""
        self._functions.clear()


def session_function(session: Any, outputs: Sequence[str]) -> Callable[[dict[str, NDArray[Any]]], None]:
    """A graph on ONNX Runtime, over arrays that stay where they are; those of `outputs` that are given are written."""
    value = import_onnxruntime().OrtValue.ortvalue_from_numpy

    def run(arrays: dict[str, NDArray[Any]]) -> None:
        binding, kept = session.io_binding(), {name: value(array) for name, array in arrays.items()}
        for name, held in kept.items():
            (binding.bind_ortvalue_output if name in outputs else binding.bind_ortvalue_input)(name, held)
        session.run_with_iobinding(binding)

    return run


def fake_backend(
    bundle: Bundle,
    options: DeviceOptions,
    *,
    gpu: FakeGpu | None = None,
    captures: bool = True,
    lengths: tuple[int, ...] | None = None,
    threads: int = 1,
) -> DeviceRows:
    """The fp32 graphs of a bundle on a fake GPU, whose arithmetic is that of `OrtBackend`."""
    gpu = gpu or FakeGpu()
    functions = {}
    for spec in bundle.manifest.contracts:
        lowering = "cuda" if spec.name == FEATURES else "ort"
        session = open_session(bundle, bundle.graph(spec.name, lowering, "fp32"), threads=threads)
        functions[spec.name] = session_function(session, spec.output_names)
    graphs = FakeGraphs(gpu, functions, captures=captures, lengths=lengths)
    return DeviceRows(bundle.manifest, gpu, graphs, options, device="fake:0", provider="FakeGpu")


def _assign(target: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
    target[:] = source


def insist(condition: bool, broken: str) -> None:
    """Raise AssertionError with `broken` unless `condition` holds."""
    if not condition:
        raise AssertionError(broken)
