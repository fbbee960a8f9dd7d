"""CUDA's runtime over memory of the host, and graphs that work on it."""

from __future__ import annotations

import ctypes
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from device_cases import LENGTH
from mt3_runtime.backends.fake_gpu import NUMPY_TYPES

runtime = pytest.importorskip("cuda.bindings.runtime")
HAS_GPU = runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess
HARMLESS = ("cudaGetLastError", "cudaDriverGetVersion", "cudaRuntimeGetVersion")  # these succeed without a driver


def snake(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class HostCuda:
    """`cuda.bindings.runtime` over memory of the host; each call is made to the real module first.

    That refuses arguments of the wrong number or type, and does nothing else on a machine without a driver.
    """

    def __init__(self):
        self.memory, self.host, self.names, self.recording, self.size = {}, {}, [], None, 1 << 30
        self.current, self.devices, self.returned, self.refused = threading.local(), [], None, ()

    def __getattr__(self, name):
        real = getattr(runtime, name)
        if not name.startswith("cuda") or isinstance(real, type) or not callable(real):
            return real

        def call(*arguments):
            self.names.append(name)
            self.devices.append((name, getattr(self.current, "device", 0)))
            assert real(*arguments)[0] != runtime.cudaError_t.cudaSuccess or name in HARMLESS
            if name in self.refused:
                return (runtime.cudaError_t.cudaErrorStreamCaptureInvalidated, self.returned)
            result = getattr(self, f"do_{snake(name[4:])}", lambda *_: ())(*arguments)
            if isinstance(result, runtime.cudaError_t):
                return (result, None)
            return (runtime.cudaError_t.cudaSuccess, *(result if isinstance(result, tuple) else (result,)))

        return call

    def ask(self, command):
        (self.recording.append if self.recording is not None else lambda run: run())(command)

    def do_set_device(self, index):
        self.current.device = index

    def do_get_device_count(self):
        return 2

    def do_get_device_properties(self, index):
        return SimpleNamespace(name=f"Stand-in {index}".encode() + bytes(8), major=8, minor=9)

    def do_driver_get_version(self):
        return 13_010

    def do_runtime_get_version(self):
        return 12_080

    def do_mem_get_info(self):
        return 1000, 2000

    def do_stream_create_with_flags(self, flags):
        return runtime.cudaStream_t(7)

    def do_malloc(self, size):
        if size + sum(map(len, self.memory.values())) > self.size:
            return runtime.cudaError_t.cudaErrorMemoryAllocation
        whole = np.full(size + 256, 255, np.uint8)
        start = -whole.ctypes.data % 256
        array = whole[start : start + size]
        self.memory[array.ctypes.data] = array
        return array.ctypes.data

    def do_free(self, address):
        del self.memory[address]

    def do_malloc_host(self, size):
        array = np.zeros(size, np.uint8)
        self.host[array.ctypes.data] = array
        return array.ctypes.data

    def do_free_host(self, address):
        del self.host[address]

    def do_event_create_with_flags(self, flags):
        return runtime.cudaEvent_t(9)

    def do_memcpy_async(self, target, source, size, kind, stream):
        assert int(stream) == 7
        self.ask(lambda: ctypes.memmove(target, source, size))

    def do_memcpy2_dasync(self, target, pitch, source, source_pitch, width, height, kind, stream):
        assert int(stream) == 7
        assert width <= min(pitch, source_pitch)
        for line in range(height):
            self.ask(lambda i=line: ctypes.memmove(target + i * pitch, source + i * source_pitch, width))

    def do_memset2_dasync(self, target, pitch, value, width, height, stream):
        for line in range(height):
            self.ask(lambda i=line: ctypes.memset(target + i * pitch, value, width))

    def do_stream_begin_capture(self, stream, mode):
        self.recording = []

    def do_stream_end_capture(self, stream):
        self.captured, self.recording = self.recording, None
        return runtime.cudaGraph_t(3)

    def do_graph_instantiate(self, graph, flags):
        executable = runtime.cudaGraphExec_t(len(self.names))
        self.graphs = {**getattr(self, "graphs", {}), int(executable): self.captured}
        return executable

    def do_graph_launch(self, executable, stream):
        for command in self.graphs[int(executable)]:
            command()


class HostGraphs:
    """Functions of arrays on memory of `HostCuda`."""

    captures, lengths, segments, rows = True, (8, 16, LENGTH), None, None

    def __init__(self, host, functions):
        self.host, self.functions, self.names = host, functions, frozenset(functions)

    def bind(self, graph, tensors):
        arrays = {}
        for tensor in tensors:
            dtype = np.dtype(NUMPY_TYPES[tensor.dtype])
            assert tensor.address % 256 == 0
            size = int(np.prod(tensor.shape)) * dtype.itemsize
            assert any(
                at <= tensor.address <= tensor.address + size <= at + len(a) for at, a in self.host.memory.items()
            )
            buffer = (ctypes.c_uint8 * size).from_address(tensor.address)
            arrays[tensor.name] = np.frombuffer(buffer, dtype).reshape(tensor.shape)
        return lambda: self.host.ask(lambda: self.functions[graph](arrays))

    def close(self):
        pass
