"""Engines as TensorRT shows them, that compute with numpy on a fake GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from device_cases import LENGTH, Numbers
from mt3_runtime.backends.fake_gpu import NUMPY_TYPES, THREAD
from mt3_runtime.backends.tensorrt_graphs import Engine, check_engine

MAXIMA = {"segments": 4, "rows": 8, "written": 64}
TRT = SimpleNamespace(
    TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"),
    __version__="0",
)
TRT_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}


class StandInEngine:
    """An engine of one graph, for one length of its cache, as TensorRT shows it."""

    device_memory_size_v2 = 512

    def __init__(self, gpu, contract, function, length=-1):
        self.gpu, self.function, self.contract, self.length, self.contexts = gpu, function, contract, length, 0
        kinds = (("in", contract.inputs), ("out", contract.outputs))
        self.tensors = {tensor.name: (kind, tensor) for kind, tensors in kinds for tensor in tensors}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return self.tensors[name][0]

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=TRT_TYPES[self.tensors[name][1].dtype])

    def sizes(self, name, largest):
        named = {**(MAXIMA if largest else {}), "length": self.length}
        return [named.get(size, -1) if isinstance(size, str) else size for size in self.tensors[name][1].shape]

    def get_tensor_shape(self, name):
        return self.sizes(name, largest=False)

    def get_tensor_profile_shape(self, name, profile):
        return [self.sizes(name, largest=True)] * 3

    def create_execution_context(self, strategy):
        assert strategy == "ours"
        assert THREAD.gpu is self.gpu
        self.contexts += 1
        return StandInContext(self)


class StandInContext:
    def __init__(self, engine):
        self.engine, self.shapes, self.places, self.memory = engine, {}, {}, None

    def set_device_memory(self, address, size):
        assert size >= self.engine.device_memory_size_v2
        self.memory = self.engine.gpu.view(address, size)

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        largest = self.engine.sizes(name, largest=True)
        return all(size <= most for size, most in zip(shape, largest, strict=True))

    def get_tensor_shape(self, name):
        first = next(iter(self.shapes.values()))[0]
        return [first if size == -1 else size for size in self.engine.sizes(name, largest=False)]

    def set_tensor_address(self, name, address):
        self.places[name] = address
        assert address % 256 == 0
        return name in self.engine.tensors

    def execute_async_v3(self, stream):
        assert stream == 7
        assert THREAD.gpu is self.engine.gpu
        assert self.memory is not None
        gpu, arrays = self.engine.gpu, {}
        for name, (kind, tensor) in self.engine.tensors.items():
            shape = tuple(self.shapes[name] if kind == "in" else self.get_tensor_shape(name))
            size = int(np.prod(shape)) * np.dtype(NUMPY_TYPES[tensor.dtype]).itemsize
            arrays[name] = (self.places[name], size, NUMPY_TYPES[tensor.dtype], shape)
        gpu.run(
            lambda: self.engine.function(
                {name: gpu.view(at, size).view(kind).reshape(shape) for name, (at, size, kind, shape) in arrays.items()}
            )
        )
        return True


def engines(gpu, manifest, precision="fp16"):
    functions, found = Numbers(precision).functions(), {}
    for spec in manifest.contracts:
        for length in (8, 16, LENGTH) if spec.name == "decode_step" else (None,):
            made = StandInEngine(gpu, spec.typed(precision), functions[spec.name], length or -1)
            check_engine(TRT, made, spec.typed(precision))
            found[spec.name, length] = Engine(made)
    return found
