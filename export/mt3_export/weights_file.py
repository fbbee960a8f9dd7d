"""One file for the weights of all graphs of a bundle: every tensor stands in it once."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import onnx_ir as ir

from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from torch import Tensor

    from mt3_runtime.manifest import WeightsStorage

ALIGNMENT = 4096  # pages: a mapped tensor then starts on one
INLINE_BYTES = 1024  # smaller tensors stay in the graph
TABLES = (".positions", ".latents")
FP16_OVERFLOW = 65520  # rounds to infinity; what is below rounds to 65504 at most


class WeightsFile:
    """Moves initializers of graphs into one external file, sharing equal ones.

    `storage` "fp16" stores matrices at half the size; the graph casts them back, and ONNX Runtime and TensorRT
    fold the cast when they load it.
    """

    def __init__(self, path: Path, storage: WeightsStorage) -> None:
        self.name, self.storage = path.name, storage
        self._file: BinaryIO = path.open("xb")
        self._places: dict[tuple[bytes, tuple[int, ...]], tuple[int, int]] = {}

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def move(self, model: ir.Model, tables: Collection[str] = ()) -> None:
        """Replace the large initializers of `model` by references into this file; `tables` are never rounded.

        Raises:
            OptionError: a matrix does not fit fp16.
        """
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None:
                continue
            is_matrix = len(tensor.shape) == 2 and tensor.dtype == ir.DataType.FLOAT
            halved = self.storage == "fp16" and is_matrix and value.name not in tables
            if tensor.nbytes <= INLINE_BYTES and not halved:
                if isinstance(tensor, ir.ExternalTensor):  # of another file, which need not be there
                    value.const_value = ir.tensor(tensor.numpy(), name=value.name)
                continue
            array = np.ascontiguousarray(tensor.numpy())
            if halved:
                array = _halve(array, value.name or "")
                _cast_back(model.graph, value)
            value.const_value = self._external(value.name or "", array)
            value.dtype = value.const_value.dtype

    def _external(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        data = array.tobytes()
        key = (hashlib.sha256(data).digest(), array.shape)
        if key not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._places[key] = (self._file.tell(), len(data))
            self._file.write(data)
        offset, length = self._places[key]
        dtype = ir.DataType.from_numpy(array.dtype)
        return ir.ExternalTensor(self.name, offset, length, dtype, shape=ir.Shape(array.shape), name=name)


def _halve(array: np.ndarray, name: str) -> np.ndarray:
    _check_range(float(np.abs(array).max()), name)
    return array.astype(np.float16)


def _cast_back(graph: ir.Graph, value: ir.Value) -> None:
    """Let every reader of `value` read a float32 copy of it."""
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}.widen")
    widened = node.outputs[0]
    widened.name, widened.dtype, widened.shape = f"{value.name}.fp32", ir.DataType.FLOAT, value.shape
    for user, index in tuple(value.uses()):
        user.replace_input_with(index, widened)
    node.replace_input_with(0, value)
    graph.insert_before(graph[0], node)


def stored_weights(tensors: Mapping[str, Tensor], storage: WeightsStorage) -> dict[str, Tensor]:
    """The float32 values that come back from a file: matrices rounded to fp16 if so stored.

    Tables, which are added and not multiplied by, keep their precision.

    Raises:
        OptionError: a matrix does not fit fp16.
    """
    if storage == "fp32":
        return dict(tensors)
    return {name: _rounded(tensor, name) if _is_matrix(tensor, name) else tensor for name, tensor in tensors.items()}


def _is_matrix(tensor: Tensor, name: str) -> bool:
    return tensor.ndim == 2 and not name.endswith(TABLES)


def _rounded(tensor: Tensor, name: str) -> Tensor:
    _check_range(float(tensor.abs().max()), name)
    return tensor.half().float()


def _check_range(largest: float, name: str) -> None:
    if largest >= FP16_OVERFLOW:
        raise OptionError(f"{name} reaches {largest:g}, which fp16 cannot hold: store the weights in fp32")
