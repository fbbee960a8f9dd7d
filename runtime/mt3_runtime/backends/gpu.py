"""What decoding on a GPU asks of it: memory, one stream of commands, and graphs that are bound to addresses.

Everything that is said twice to a GPU (`backends/gpu_memory.py` for CUDA, `backends/fake_gpu.py` for tests) is said
here once, so that `backends/device_rows.py` knows neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mt3_runtime.arrays import FloatArray
    from mt3_runtime.graphs import DType

SIZES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}  # bytes
# Of what a graph is bound to, in bytes: TensorRT takes nothing else (setTensorAddress in NvInferRuntime.h).
ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class DeviceTensor:
    """A tensor of a graph, and where it stands on the device."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    address: int


@dataclass(frozen=True, slots=True)
class Plane:
    """`height` stretches of `width` bytes, each `pitch` bytes after the one before."""

    address: int
    pitch: int
    width: int
    height: int = 1


class Gpu(Protocol):
    """One device and one stream on it. Calls that copy or clear return at once; they are carried out in order.

    `name` is what the maker calls the device.
    """

    name: str

    def use(self) -> None:
        """Make this the device of the calling thread: libraries that are called directly work on that one."""

    def allocate(self, size: int) -> int:
        """Address of `size` bytes with anything in them, a multiple of `ALIGNMENT`.

        Raises:
            OutOfMemoryError: there are not so many.
        """

    def free(self, address: int) -> None:
        """Give memory back; waits for everything that was asked for before."""

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Memory of the host that the device copies from and to by itself."""

    def upload(self, target: int, source: NDArray[Any]) -> None:
        """Copy pinned memory to the device: it must not change until an event after this call was waited for."""

    def download(self, target: NDArray[Any], source: int) -> None:
        """Copy from the device to pinned memory: it is there when an event after this call was waited for."""

    def copy(self, target: Plane, address: int, pitch: int) -> None:
        """Fill `target` from another place on the device, whose stretches are `pitch` bytes apart."""

    def clear(self, target: Plane) -> None:
        """Fill `target` with zeros."""

    def event(self) -> Any:
        """Something to wait for."""

    def record(self, event: Any) -> None:
        """Let `event` stand for all that was asked for until now."""

    def wait(self, event: Any) -> None:
        """Block until what `event` stands for is done; at once if it stands for nothing yet."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` asks for, without doing it: calling the result asks for all of it at once."""

    def synchronize(self) -> None:
        """Block until everything is done."""

    def close(self) -> None:
        """Give everything back. Nothing of it may be used afterwards."""


class Graphs(Protocol):
    """The graphs of a bundle on one device.

    `names`: of the graphs; "features" may be missing.
    `captures`: whether calls made of `bind` may be captured by `Gpu.capture`.
    `lengths`: cache lengths, in positions, for which there is a decode step, rising; None: any.
    `segments`, `rows`: the most that one call takes; None: any number.
    """

    names: frozenset[str]
    captures: bool
    lengths: tuple[int, ...] | None
    segments: int | None
    rows: int | None

    def bind(self, graph: str, tensors: Sequence[DeviceTensor]) -> Callable[[], None]:
        """A function that asks the device to run `graph` once on these tensors; outputs left out are not wanted.

        All addresses must be multiples of `ALIGNMENT`.
        """

    def close(self) -> None:
        """Give up what the graphs hold."""


def aligned(size: int) -> int:
    """The smallest multiple of `ALIGNMENT` that is not less."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def contiguous(address: int, size: int) -> Plane:
    """`size` bytes in one stretch."""
    return Plane(address, size, size)


def to_device_type(values: FloatArray, dtype: DType) -> NDArray[Any]:
    """Numbers as a device stores them; bfloat16, which numpy lacks, as its 16 bits, rounded to nearest even."""
    if dtype == "float16":
        with np.errstate(over="ignore"):  # a state too large for its type becomes infinite, and its row fails
            return values.astype(np.float16)
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # a NaN keeps its sign and its upper bits, and one of them is set: rounding could carry it into an infinity
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
