"""Segments on a GPU: encoded there, kept there, and made into what decoding a row attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mt3_runtime.backends.gpu import ALIGNMENT, SIZES, DeviceTensor, Plane, aligned, contiguous, to_device_type
from mt3_runtime.backends.gpu_buffers import Caches, Pool, Uploads
from mt3_runtime.backends.ort import without_fill
from mt3_runtime.errors import OptionError
from mt3_runtime.graphs import FEATURES, HALVES

if TYPE_CHECKING:
    from mt3_runtime.arrays import FloatArray, IntArray, RowStates
    from mt3_runtime.backends.gpu import Gpu, Graphs
    from mt3_runtime.backends.gpu_buffers import Block
    from mt3_runtime.graphs import Precision
    from mt3_runtime.manifest import Manifest
    from mt3_runtime.specs import MemorySpec


@dataclass(frozen=True, slots=True, eq=False)
class DeviceState:
    """Encoder states of one channel of one segment [frames, d_model], as long as this is held."""

    block: Block
    address: int


class SegmentsOnDevice:
    """The graphs before the first token: encoder, memory, cross_kv and prefix, for up to `rows` rows at once."""

    def __init__(self, manifest: Manifest, gpu: Gpu, graphs: Graphs, precision: Precision, rows: int) -> None:
        model, features = manifest.model, manifest.features
        self._gpu, self._graphs, self._type = gpu, graphs, HALVES[precision]
        self._contracts = {spec.name: spec.typed(precision) for spec in manifest.contracts}
        self._memory, self._prefix = model.memory, model.prefix_length
        self._cross_names = self._contracts["cross_kv"].output_names
        self._channels, self._state = model.channels, (features.segment_frames, model.d_model)
        self._features = (features.segment_frames, features.bins)
        self.uploads, self._pool = Uploads(gpu), Pool(gpu)
        self._gathered = gpu.allocate(rows * self._bytes(self._state))
        if self._memory:
            self._vector = (self._memory.length, model.d_model)
            self._told = gpu.allocate(self._memory.span * SIZES["int32"])
            self._vectors = gpu.allocate(rows * self._bytes(self._vector))
            self._written = gpu.allocate(self._bytes(self._vector))
        if self._prefix:
            self._before = (model.num_heads, self._prefix, model.d_kv)
            self._prefixes = gpu.allocate(2 * model.decoder_layers * aligned(rows * self._bytes(self._before)))

    @property
    def takes_audio(self) -> bool:
        """Whether there is a graph of the features."""
        return FEATURES in self._graphs.names

    def encode(self, features: FloatArray) -> list[list[DeviceState]]:
        """Features [segments, frames, bins] -> states [segment][channel], without waiting for them."""
        return self._in_parts(features)

    def encode_audio(self, samples: FloatArray, frames: IntArray) -> list[list[DeviceState]]:
        """Samples [segments, segment_samples], of which `frames` [segments] are real -> states [segment][channel]."""
        return self._in_parts(samples, frames)

    def _in_parts(self, given: FloatArray, frames: IntArray | None = None) -> list[list[DeviceState]]:
        most = self._graphs.segments or len(given)
        states = []
        for first in range(0, len(given), most):
            part = slice(first, first + most)
            features = self._upload(given[part]) if frames is None else self._extract(given[part], frames[part])
            states += self._encode(features, len(given[part]))
        return states

    def fill(self, cross: Caches, own: Caches, first: int, states: RowStates, memory: IntArray | None) -> None:
        """Write what rows attend to straight into slots first, first+1, ..., and the prefix of their own caches.

        Where a slot starts at an address that no graph can be bound to, it is written elsewhere and then copied.
        """
        count = len(states)
        given = [DeviceTensor("states", self._type, (count, *self._state), self._gather(states))]
        vectors = [] if memory is None or not self._memory else [self._recall(memory, self._memory)]
        if not self._prefix:
            given += vectors
        if first * cross.row % ALIGNMENT == 0:
            written = cross.tensors(self._cross_names, first, count)
            self._graphs.bind("cross_kv", [*given, *written])()
        else:
            aside = Caches(0, cross.dtype, (cross.shape[0], count, *cross.shape[2:]))
            block = self._pool.take(aside.size)  # free when this returns: what uses it was asked for by then
            aside = replace(aside, address=block.address)
            written, source = aside.tensors(self._cross_names, 0, count), aside.rows(0, count)
            self._graphs.bind("cross_kv", [*given, *written])()
            self._gpu.copy(cross.rows(first, count), source.address, source.pitch)
        if self._prefix:
            inputs = zip(self._contracts["prefix"].input_names[1:], written, strict=True)
            self._fill_prefix(own, first, count, [*vectors, *(replace(held, name=name) for name, held in inputs)])

    def _upload(self, array: FloatArray) -> Block:
        """An array of float32 on the device."""
        block = self._pool.take(array.size * SIZES["float32"])
        self.uploads.send(np.asarray(array, np.float32), block.address)
        return block

    def _extract(self, samples: FloatArray, frames: IntArray) -> Block:
        """Features of audio, computed on the device."""
        segments = len(samples)
        audio, counts = self._upload(samples), self._pool.take(segments * SIZES["int32"])
        self.uploads.send(np.asarray(frames, np.int32), counts.address)
        block = self._pool.take(segments * prod(self._features) * SIZES["float32"])
        tensors = [
            DeviceTensor("samples", "float32", samples.shape, audio.address),
            DeviceTensor("frames", "int32", (segments,), counts.address),
            DeviceTensor("features", "float32", (segments, *self._features), block.address),
        ]
        self._graphs.bind(FEATURES, tensors)()
        return block

    def _encode(self, features: Block, segments: int) -> list[list[DeviceState]]:
        size = self._bytes(self._state)
        block = self._pool.take(segments * self._channels * size)
        tensors = [
            DeviceTensor("features", "float32", (segments, *self._features), features.address),
            DeviceTensor("states", self._type, (segments, self._channels, *self._state), block.address),
        ]
        self._graphs.bind("encoder", tensors)()
        places = range(block.address, block.address + segments * self._channels * size, size)
        flat = [DeviceState(block, address) for address in places]
        return [flat[i : i + self._channels] for i in range(0, len(flat), self._channels)]

    def _gather(self, states: RowStates) -> int:
        """Address of the states of all rows, one behind the other."""
        size = self._bytes(self._state)
        if isinstance(states, np.ndarray) or isinstance(states[0], np.ndarray):  # from elsewhere, as a check has them
            self.uploads.send(to_device_type(np.asarray(states, np.float32), self._type), self._gathered)
            return self._gathered
        places, block = [state.address for state in states], states[0].block
        neighbours = places == list(range(places[0], places[0] + len(places) * size, size))
        if neighbours and places[0] % ALIGNMENT == 0 and all(state.block is block for state in states):
            return int(places[0])
        for row, address in enumerate(places):
            self._gpu.copy(contiguous(self._gathered + row * size, size), address, size)
        return self._gathered

    def _recall(self, memory: IntArray, spec: MemorySpec) -> DeviceTensor:
        """Vectors of memory [rows, length, d_model], row by row: no row is computed differently for its neighbours."""
        size = self._bytes(self._vector)
        for row, told in enumerate(memory):
            tokens = without_fill(told, spec)
            self.uploads.send(np.asarray(tokens, np.int32), self._told)
            given = DeviceTensor("tokens", "int32", (1, len(tokens)), self._told)
            vectors = DeviceTensor("memory", self._type, (1, *self._vector), self._written)
            self._graphs.bind("memory", [given, vectors])()
            self._gpu.copy(contiguous(self._vectors + row * size, size), self._written, size)
        return DeviceTensor("memory", self._type, (len(memory), *self._vector), self._vectors)

    def _fill_prefix(self, own: Caches, first: int, count: int, inputs: list[DeviceTensor]) -> None:
        """Write the first positions of the rows' own caches, a stretch that the graph cannot write in place."""
        names = self._contracts["prefix"].output_names
        shape, stride = (count, *self._before), aligned(count * self._bytes(self._before))
        outputs = [DeviceTensor(name, self._type, shape, self._prefixes + i * stride) for i, name in enumerate(names)]
        self._graphs.bind("prefix", [*inputs, *outputs])()
        width = self._bytes(self._before[1:])
        for cache, prefix in zip(own.tensors(names, first, count), outputs, strict=True):
            self._gpu.copy(Plane(cache.address, own.stretch, width, count * self._before[0]), prefix.address, width)

    def _bytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) * SIZES[self._type]


def check_memory(spec: MemorySpec | None, count: int, memory: IntArray | None) -> None:
    """Refuse a memory that the model does not ask for, and none where it does.

    Raises:
        OptionError: it does not fit.
    """
    given, asked = None if memory is None else memory.shape, (count, spec.span) if spec else None
    if given != asked:
        fix = f"one of shape {asked}" if asked else "none"
        raise OptionError(f"{count} rows came with a memory of shape {given}: give them {fix}")
