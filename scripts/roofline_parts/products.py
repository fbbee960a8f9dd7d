"""How fast ONNX Runtime multiplies matrices here: large products, and one row that reads all of a large matrix."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONTRIB, BLOCK = "com.microsoft", 128
MATMUL, DYNAMIC, NBITS = "MatMul", "DynamicQuantizeMatMul", "MatMulNBits"
ONE_ROW = "ONNX Runtime MatMul of one row"
SPIN_US = "1000"  # workers that wait for longer sleep, or the next product would have to share the cores with them
SEVEN_BITS = 64  # weights up to here cannot saturate where products are summed in pairs of 16 bits
Sizes = tuple[int, int, int]  # rows, inner, columns


@dataclass(frozen=True, slots=True)
class ProductSizes:
    """Shapes to time: compute-bound ones, of which the best counts, and the matrix of the one row."""

    large: tuple[Sizes, ...] = ((512, 1024, 2048), (1024, 1024, 1024), (1024, 2048, 2048))
    one_row: Sizes = (1, 2048, 24576)


class Products:
    """Sessions of one product each."""

    def __init__(self, threads: int, sizes: ProductSizes) -> None:
        makers: dict[str, Callable[[Sizes], bytes]] = {
            MATMUL: plain,
            DYNAMIC: dynamic,
            f"{NBITS} of 8 bits": lambda size: blocked(size, 8),
            f"{NBITS} of 4 bits": lambda size: blocked(size, 4),
        }
        self._large = {
            how: [_Product(make(size), size, threads) for size in sizes.large] for how, make in makers.items()
        }
        self._one_row = _Product(plain(sizes.one_row), sizes.one_row, threads)

    def peaks(self) -> dict[str, float]:
        """Operations (a multiplication and an addition are two) per second of every kind, its best shape's."""
        return {
            how: max(product.operations / product.seconds() for product in products)
            for how, products in self._large.items()
        }

    def reads(self, least: int) -> dict[str, float]:
        """Bytes per second that a product of one row reads of its matrix; nothing if that has fewer than `least`."""
        if self._one_row.matrix_bytes < least:
            return {}
        return {ONE_ROW: self._one_row.matrix_bytes / self._one_row.seconds()}


class _Product:
    """One product, on random numbers."""

    def __init__(self, model: bytes, size: Sizes, threads: int) -> None:
        rows, inner, columns = size
        self.operations, self.matrix_bytes = 2 * rows * inner * columns, 4 * inner * columns
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._inputs = {"x": np.random.default_rng(0).standard_normal((rows, inner), dtype=np.float32)}

    def seconds(self) -> float:
        """Least time of a few runs."""
        times = []
        for _ in range(5):
            started = perf_counter()
            self._session.run(None, self._inputs)
            times.append(perf_counter() - started)
        return min(times)


def plain(size: Sizes) -> bytes:
    """A model of a MatMul in float32 with a constant matrix."""
    _, inner, columns = size
    matrix = np.random.default_rng(1).standard_normal((inner, columns), dtype=np.float32)
    return _model(size, helper.make_node(MATMUL, ["x", "matrix"], ["y"]), {"matrix": matrix})


def dynamic(size: Sizes) -> bytes:
    """The same with int8 weights, one scale for every column; x is quantised at every run."""
    _, inner, columns = size
    matrix = np.random.default_rng(1).integers(-SEVEN_BITS, SEVEN_BITS, (inner, columns), np.int8, endpoint=True)
    constants = {
        "matrix": matrix,
        "scale": np.full(columns, 0.01, np.float32),
        "zero": np.zeros(columns, np.int8),
    }
    return _model(size, helper.make_node(DYNAMIC, ["x", *constants], ["y"], domain=CONTRIB), constants)


def blocked(size: Sizes, bits: int) -> bytes:
    """The same with weights of 8 or 4 bits, a scale for every block of a column, computed in int8."""
    _, inner, columns = size
    block = min(BLOCK, inner)
    blocks = inner // block
    constants = {
        "matrix": np.random.default_rng(1).integers(0, 256, (columns, blocks, block * bits // 8), np.uint8),
        "scale": np.full((columns, blocks), 0.01, np.float32),
    }
    node = helper.make_node(
        NBITS, ["x", *constants], ["y"], domain=CONTRIB,
        K=inner, N=columns, bits=bits, block_size=block, accuracy_level=4,
    )  # fmt: skip
    return _model(size, node, constants)


def _model(size: Sizes, node: Any, constants: dict[str, Any]) -> bytes:
    rows, inner, columns = size
    shapes: dict[str, Sequence[int]] = {"x": (rows, inner), "y": (rows, columns)}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "product", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(CONTRIB, 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())
