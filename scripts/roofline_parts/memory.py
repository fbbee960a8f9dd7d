"""How fast this machine reads and copies memory, with all threads at once and far beyond its caches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.machine import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
UNKNOWN_CACHE = 32 * MIB  # where the system does not say
LEAST, CACHES = 256 * MIB, 6  # a buffer takes so much, or so many times the largest cache
SHARE = 6  # of the memory that is free, a buffer takes at most one in so many

# What is fastest depends on the processor: on some a sum waits for its own additions, on others for memory.
READS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "numpy sum of float64": ("float64", np.add.reduce),
    "numpy maximum of float32": ("float32", np.maximum.reduce),
    "numpy maximum of float64": ("float64", np.maximum.reduce),
    "numpy or of uint64": ("uint64", np.bitwise_or.reduce),
}
COPY = "numpy copy"


class Memory:
    """Two buffers, of which every thread has its part; numpy reads and copies without holding the interpreter."""

    def __init__(self, threads: int, size: int) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._bytes = size // threads // 64 * 64 * threads
        # each thread writes its own part first: memory is given where it is written
        self._source, self._target = (
            list(self._pool.map(_filled, [self._bytes // threads] * threads)) for _ in range(2)
        )

    def reads(self) -> dict[str, float]:
        """Bytes read per second, by the way of reading."""
        return {
            how: self._bytes / self._seconds(kernel, [part.view(dtype) for part in self._source])
            for how, (dtype, kernel) in READS.items()
        }

    def copies(self) -> dict[str, float]:
        """Bytes read and written per second, together."""
        return {COPY: 2 * self._bytes / self._seconds(np.copyto, self._target, self._source)}

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _seconds(self, kernel: Callable[..., Any], *parts: list[Any]) -> float:
        """Least time of a few passes over all parts."""
        times = []
        for _ in range(4):
            started = perf_counter()
            list(self._pool.map(kernel, *parts))
            times.append(perf_counter() - started)
        return min(times)


def _filled(size: int) -> Any:
    """So many bytes that are no denormals in any type."""
    part = np.empty(size // 8, np.float64)
    part.fill(1.5)
    return part


def largest_cache(root: Path = Path("/")) -> int:
    """Bytes of the largest cache of the first CPU, a likely size where the system does not say."""
    units = {"K": 1 << 10, "M": MIB, "G": 1 << 30}
    sizes = []
    for file in root.glob("sys/devices/system/cpu/cpu0/cache/index*/size"):
        text = file.read_text().strip()
        digits, unit = text.rstrip("KMG"), units.get(text[-1:], 1)
        if digits.isdecimal():
            sizes.append(int(digits) * unit)
    return max(sizes, default=UNKNOWN_CACHE)


def buffer_bytes(cache: int) -> int:
    """Size of one buffer: far beyond the caches, and no more than the machine can spare."""
    wanted, free = max(LEAST, CACHES * cache), available_memory()
    return wanted if free is None else min(wanted, free // SHARE)
