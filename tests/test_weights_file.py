"""The weights of all graphs in one file: each once, on a page of its own, in the values they are meant to have."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from conftest import TINY_FEATURES, TINY_MODEL
from fast_export import FastExport
from graph_cases import extents, one_thread
from mt3_export.lowering import Eager
from mt3_export.network import build_modules
from mt3_export.verify import verify_bundle
from mt3_export.weights_file import WeightsFile, stored_weights
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def fast(tiny_folder):
    return FastExport(tiny_folder)


@pytest.fixture(scope="module")
def half_folder(fast, tmp_path_factory):
    """The tiny bundle with its matrices stored in fp16."""
    return fast(tmp_path_factory.mktemp("half") / "tiny", weights_storage="fp16")


def all_extents(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Of every graph file and initializer."""
    return {
        (path.name, name): place
        for path in sorted(folder.glob("*.onnx"))
        for name, place in extents(folder, path.name).items()
    }


def fused(tensors: dict[str, torch.Tensor]) -> dict[tuple[str, str], np.ndarray]:
    """What some initializers of the graphs have to hold, put together by hand from the state dict."""
    state = {key: value.numpy() for key, value in tensors.items()}

    def beside(*names: str) -> np.ndarray:
        return np.concatenate([state[f"{name}.weight"].T for name in names], axis=1)

    own, feed = "encoder.block.1.layer.0.SelfAttention", "decoder.block.0.layer.2.DenseReluDense"
    return {
        ("encoder", "projection"): state["proj.weight"].T,
        ("encoder", "layers.1.qkv"): beside(f"{own}.q", f"{own}.k", f"{own}.v"),
        ("encoder", "layers.1.output"): state[f"{own}.o.weight"].T,
        ("cross_kv", "projections.1"): state["decoder.block.1.layer.1.EncDecAttention.k.weight"].T,
        ("cross_kv", "projections.2"): state["decoder.block.0.layer.1.EncDecAttention.v.weight"].T,
        ("decode_step", "layers.0.feed_forward.gates"): beside(f"{feed}.wi_0", f"{feed}.wi_1"),
        ("decode_step", "layers.0.feed_forward.output"): state[f"{feed}.wo.weight"].T,
        ("decode_step", "embedding"): state["decoder_embed_tokens.weight"],
        ("decode_step", "head"): state["lm_head.weight"].T,
    }


def initializers(path: Path) -> dict[str, np.ndarray]:
    """Every initializer of a graph, wherever it stands, as it is stored."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_values_are_the_checkpoints(tiny_folder, tiny_checkpoint):
    for (graph, name), wanted in fused(tiny_checkpoint.tensors).items():
        for lowering in ("ort", "tensorrt"):
            found = initializers(tiny_folder / f"{graph}.fp32.{lowering}.onnx")[f"weights.{name}"]
            np.testing.assert_array_equal(found, wanted)


def test_every_tensor_stands_once_on_a_page_of_its_own(tiny_folder, half_folder):
    for folder in (tiny_folder, half_folder):
        data = (folder / "weights.fp32.bin").read_bytes()
        places = sorted(set(all_extents(folder).values()))
        for (offset, length), following in zip(places, [*places[1:], (len(data), 0)], strict=True):
            assert offset % PAGE == 0
            assert offset + length <= following[0] < offset + length + PAGE
        pieces = {data[offset : offset + length] for offset, length in places}
        assert len(pieces) == len(places)  # nothing twice, under whatever name
        # everything in it belongs to a tensor, or fills up a page
        used = bytearray(len(data))
        for offset, length in places:
            used[offset : offset + length] = b"\1" * length
        assert not any(byte for byte, mine in zip(data, used, strict=True) if not mine)


def test_lowerings_share(tiny_folder):
    places = all_extents(tiny_folder)
    named = [key for key in places if key[0].endswith(".ort.onnx") and key[1].startswith("weights.")]
    assert len(named) > 15
    for file, name in named:
        assert places[file, name] == places[file.replace(".ort.", ".tensorrt."), name]


def test_the_size_is_that_of_the_parameters(tiny_folder, tiny_checkpoint):
    # every tensor of the state dict is used by one graph, but for norms, which are small enough to stay inline
    matrices = sum(tensor.numel() for tensor in tiny_checkpoint.tensors.values() if tensor.ndim == 2)
    tables = (TINY_FEATURES.segment_frames + TINY_MODEL.max_length) * TINY_MODEL.d_model
    places = set(all_extents(tiny_folder).values())
    assert sum(length for _, length in places) == 4 * (matrices + tables)


def test_fp16_rounds_each_matrix_once_to_nearest(tiny_folder, half_folder, tiny_checkpoint):
    wanted = fused(stored_weights(tiny_checkpoint.tensors, "fp16"))
    exact = fused(tiny_checkpoint.tensors)
    for (graph, name), values in wanted.items():
        found = initializers(half_folder / f"{graph}.fp32.ort.onnx")[f"weights.{name}"]
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found.astype(np.float32), values)
        np.testing.assert_array_equal(found, exact[graph, name].astype(np.float16))
        assert not np.array_equal(values, exact[graph, name])
    for path in sorted(half_folder.glob("*.onnx")):
        whole, half = initializers(tiny_folder / path.name), initializers(path)
        assert whole.keys() == half.keys()
        for name in whole:
            if whole[name].ndim == 2 and name != "weights.positions":
                np.testing.assert_array_equal(half[name], whole[name].astype(np.float16))
            else:
                np.testing.assert_array_equal(half[name], whole[name])
                assert half[name].dtype == whole[name].dtype


def test_fp16_halves_the_file(tiny_folder, half_folder):
    tables = 4 * (TINY_FEATURES.segment_frames + TINY_MODEL.max_length) * TINY_MODEL.d_model
    places, half_places = (set(all_extents(folder).values()) for folder in (tiny_folder, half_folder))
    whole, half = (sum(length for _, length in found) for found in (places, half_places))
    assert half - tables == (whole - tables) / 2
    assert (half_folder / "weights.fp32.bin").stat().st_size < 0.6 * (tiny_folder / "weights.fp32.bin").stat().st_size


def test_fp16_graphs_compute_with_the_rounded_weights(half_folder, tiny_checkpoint):
    reports = verify_bundle(open_bundle(half_folder), tiny_checkpoint, steps=8)
    assert len(reports) == 6
    assert all(report.passed for report in reports)
    assert max(report.relative_error for report in reports) < 2e-6


def test_fp16_keeps_types_at_the_boundary(half_folder):
    for path in half_folder.glob("*.onnx"):
        model = onnx.load(path)
        boundary = [*model.graph.input, *model.graph.output]
        assert onnx.TensorProto.FLOAT16 not in {value.type.tensor_type.elem_type for value in boundary}
        onnx.checker.check_model(model)


# ---- the file by itself -----------------------------------------------------------------------------------


def graph_of(arrays: dict[str, np.ndarray]) -> ir.Model:
    """A graph that returns its initializers."""
    outputs = [
        onnx.helper.make_tensor_value_info(
            f"{name}.out", onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
        )
        for name, array in arrays.items()
    ]
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}.out"]) for name in arrays]
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "graph", [], outputs, tensors)
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10))


def through_file(folder: Path, models: list[ir.Model], storage: str, tables: tuple[str, ...] = ()) -> list[dict]:
    """What ONNX Runtime reads back from graphs whose weights were moved into one file."""
    with closing(WeightsFile(folder / "weights.bin", storage)) as weights:
        for model in models:
            weights.move(model, tables)
    found = []
    for index, model in enumerate(models):
        path = folder / f"{index}.onnx"
        path.write_bytes(ir.to_proto(model).SerializeToString())
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_outputs()]
        found.append(
            {name.removesuffix(".out"): value for name, value in zip(names, session.run(None, {}), strict=True)}
        )
    return found


def samples() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(4)
    return {
        "small": generator.normal(size=(8, 8)).astype(np.float32),
        "edge": generator.normal(size=(16, 16)).astype(np.float32),  # of the 1024 bytes that stay in a graph
        "large": generator.normal(size=(50, 70)).astype(np.float32),
        "vector": generator.normal(size=2000).astype(np.float32),
        "cube": generator.normal(size=(9, 9, 9)).astype(np.float32),
        "table": generator.normal(size=(40, 40)).astype(np.float32),
        "whole": generator.integers(2**40, size=300),
    }


@pytest.mark.parametrize("storage", ["fp32", "fp16"])
def test_what_comes_back(tmp_path, storage):
    arrays = samples()
    [found] = through_file(tmp_path, [graph_of(arrays)], storage, tables=("table",))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        rounded = storage == "fp16" and name in ("small", "edge", "large")
        wanted = torch.from_numpy(array).half().float().numpy() if rounded else array
        np.testing.assert_array_equal(found[name], wanted)
        assert found[name].dtype == array.dtype
        if name in ("small", "edge", "large"):
            verified = stored_weights({name: torch.from_numpy(array)}, storage)[name]
            np.testing.assert_array_equal(found[name], verified.numpy())


def test_equal_bytes_of_another_shape_or_type_are_told_apart(tmp_path):
    square = np.arange(1600, dtype=np.float32).reshape(40, 40)
    arrays = {"a": square, "b": square.copy(), "flat": square.ravel(), "wide": square.reshape(20, 80)}
    arrays["zeros"], arrays["none"] = np.zeros(1600, np.float32), np.zeros(1600, np.int32)
    first, second = through_file(tmp_path, [graph_of(arrays), graph_of({"again": square})], "fp32")
    for name, array in arrays.items():
        np.testing.assert_array_equal(first[name], array)
        assert first[name].dtype == array.dtype
    np.testing.assert_array_equal(second["again"], square)
    assert (tmp_path / "weights.bin").stat().st_size < 4 * (6400 + PAGE)  # six tensors and one more, four contents


@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e6, np.inf])
def test_weights_that_overflow_fp16_are_refused(tmp_path, value):
    array = np.ones((40, 40), np.float32)
    array[3, 5] = value
    with pytest.raises(
        OptionError, match=r"weights\.odd reaches .*, which fp16 cannot hold: store the weights in fp32"
    ):
        through_file(tmp_path, [graph_of({"weights.odd": array})], "fp16")


def test_the_largest_weights_that_fp16_holds(tmp_path):
    array = np.full((40, 40), np.nextafter(np.float32(65520), np.float32(0)))
    [found] = through_file(tmp_path, [graph_of({"weights": array})], "fp16")
    np.testing.assert_array_equal(found["weights"], np.full((40, 40), 65504, np.float32))


def test_an_overflow_leaves_no_bundle(fast, tiny_folder, tmp_path, monkeypatch):
    graphs = {name: onnx.ModelProto.FromString(model.SerializeToString()) for name, model in fast.graphs.items()}
    for model in graphs.values():
        for tensor in model.graph.initializer:
            if tensor.name == "weights.head":
                values = numpy_helper.to_array(tensor).copy()
                values[0, 0] = 1e5
                tensor.raw_data = values.tobytes()
    monkeypatch.setattr(fast, "graphs", graphs)
    with pytest.raises(OptionError, match=r"weights\.head reaches 100000"):
        fast(tmp_path / "new", weights_storage="fp16")
    assert not list(tmp_path.iterdir())


def test_a_network_has_no_other_tensors(tiny_checkpoint):
    """Every parameter of the modules comes from the state dict, so that what is compared above is all there is."""
    modules = build_modules(TINY_MODEL, TINY_FEATURES, tiny_checkpoint.tensors, Eager())
    count = sum(parameter.numel() for module in modules.values() for parameter in module.parameters())
    assert count == sum(tensor.numel() for tensor in tiny_checkpoint.tensors.values())
