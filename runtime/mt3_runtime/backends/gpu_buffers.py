"""Memory of a device as decoding uses it: blocks that come back by themselves, uploads from arrays, caches."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.backends.gpu import SIZES, DeviceTensor, Plane, aligned
from mt3_runtime.errors import OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mt3_runtime.backends.gpu import Gpu
    from mt3_runtime.graphs import DType

STAGES = 4  # uploads under way before the host waits for the oldest
SLACK = 2  # a block that was given back is used again for anything down to this part of its size


class Block:
    """Memory of a `Pool`, which it returns to when nobody holds it."""

    __slots__ = ("__weakref__", "address", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size


class Pool:
    """Hands out blocks and takes them back without asking the device: commands are carried out in order.

    A block may be dropped in any thread at any time.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._returned: deque[tuple[int, int]] = deque()  # appended to by finalizers
        self._free: list[tuple[int, int]] = []  # size, address; rising

    def take(self, size: int) -> Block:
        """A block of at least `size` bytes with anything in it.

        Raises:
            OutOfMemoryError: there are not so many, after all free blocks were given up.
        """
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort()
        for i, (room, address) in enumerate(self._free):
            if size <= room <= SLACK * size:
                del self._free[i]
                return self._block(address, room)
        return self._block(self._allocate(size), size)

    def _block(self, address: int, size: int) -> Block:
        block = Block(address, size)
        weakref.finalize(block, self._returned.append, (size, address)).atexit = False
        return block

    def _allocate(self, size: int) -> int:
        try:
            return self._gpu.allocate(size)
        except OutOfMemoryError:
            for _, address in self._free:
                self._gpu.free(address)
            self._free.clear()
            return self._gpu.allocate(size)


class Uploads:
    """Copies arrays to the device through pinned memory, without waiting while no more than `STAGES` are under way."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._next = gpu, 0
        self._stages = [(gpu.pinned(4096), gpu.event()) for _ in range(STAGES)]

    def send(self, array: NDArray[Any], address: int) -> None:
        """Copy `array` to `address`; the array may change afterwards."""
        memory, event = self._stages[self._next]
        self._gpu.wait(event)
        if memory.nbytes < array.nbytes:
            memory = self._gpu.pinned(1 << (array.nbytes - 1).bit_length())
            self._stages[self._next] = memory, event
        stage = memory[: array.nbytes]
        stage[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._gpu.upload(address, stage)
        self._gpu.record(event)
        self._next = (self._next + 1) % STAGES


@dataclass(frozen=True, slots=True)
class Caches:
    """Keys of every layer, then values of every layer, for all slots: [2 * layers, slots, heads, length, width].

    In one piece, so that one command reaches a slot's stretch in all of them; every layer starts at an address that a
    graph can be bound to.
    """

    address: int
    dtype: DType
    shape: tuple[int, int, int, int, int]

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self.shape[0] * self.layer

    @property
    def layer(self) -> int:
        """Bytes from one layer's keys or values to the next one's."""
        return aligned(self.shape[1] * self.row)

    @property
    def row(self) -> int:
        """Bytes of one slot in one layer's keys or values."""
        return prod(self.shape[2:]) * SIZES[self.dtype]

    @property
    def stretch(self) -> int:
        """Bytes of `length` positions of one head."""
        return self.shape[3] * self.shape[4] * SIZES[self.dtype]

    def tensors(self, names: Sequence[str], first: int, count: int) -> list[DeviceTensor]:
        """Slots first..first+count-1 of every layer [count, heads, length, width], under these names."""
        layers, _, *rest = self.shape
        if len(names) != layers:
            raise AssertionError(f"{layers} caches have {len(names)} names")
        start = self.address + first * self.row
        return [
            DeviceTensor(name, self.dtype, (count, *rest), start + layer * self.layer)
            for layer, name in enumerate(names)
        ]

    def rows(self, first: int, count: int) -> Plane:
        """Slots first..first+count-1 in every layer."""
        return Plane(self.address + first * self.row, self.layer, count * self.row, self.shape[0])


def allocate_caches(gpu: Gpu, dtype: DType, shape: tuple[int, int, int, int, int]) -> Caches:
    """Caches with zeros in them: what was never written must not be NaN, which would reach what it is multiplied by."""
    caches = Caches(gpu.allocate(Caches(0, dtype, shape).size), dtype, shape)
    gpu.clear(caches.rows(0, shape[1]))
    return caches


def copy_slots(gpu: Gpu, target: Caches, source: Caches, slots: int) -> None:
    """Copy slots 0..slots-1 to caches of another length, as far as both reach; zeros behind."""
    gpu.clear(target.rows(0, slots))
    width = min(target.stretch, source.stretch)
    places = [caches.tensors([""] * caches.shape[0], 0, slots) for caches in (target, source)]
    for into, out_of in zip(*places, strict=True):
        heads = slots * target.shape[2]
        gpu.copy(Plane(into.address, target.stretch, width, heads), out_of.address, source.stretch)
