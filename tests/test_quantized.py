"""Graphs of 8 and 4 bits: what they hold, what they compute, and that no row depends on another one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundle_cases import copied
from conftest import TINY_FEATURES, TINY_MODEL
from fast_export import FastExport
from graph_cases import check_rows_are_alone, relative_error
from mt3_export.cli import main
from mt3_export.quantize_bundle import quantize_bundle
from mt3_export.quantized import DYNAMIC_LARGEST, Form, block_size, blocks, columns, quantize
from mt3_export.verify import verify_bundle
from mt3_runtime.backends.ort import OrtBackend, import_onnxruntime
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import BundleError, DeviceError, OptionError, OutputError
from mt3_runtime.graphs import UNCALIBRATED
from mt3_runtime.loading import load
from mt3_runtime.version import __version__

OPERATORS = {"encoder": "DynamicQuantizeMatMul", "cross_kv": "MatMulIntegerToFloat", "decode_step": "MatMulNBits"}


@pytest.fixture(scope="module")
def quantized(tiny_bundle, tmp_path_factory):
    """The tiny bundle in all of them: read it, never change it."""
    return quantize_bundle(tiny_bundle, tmp_path_factory.mktemp("quantized") / "all", UNCALIBRATED)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def read_levels(levels, bits):
    """Whole numbers [out, blocks, size] of the bytes of `MatMulNBits`, the low four bits first."""
    if bits == 8:
        return levels.astype(int) - 128
    return np.stack([levels & 15, levels >> 4], -1).reshape(*levels.shape[:2], -1).astype(int) - 8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [16, 48, 100, 384])
def test_blocks(bits, rows):
    matrix = gaussian(rows, 5)
    matrix[:, 2] = 0
    size, levels, scales = blocks(matrix, bits, 128)
    assert size == block_size(rows, 128) <= max(rows, 16)
    assert levels.shape == (5, -(-rows // size), size * bits // 8)
    back = (read_levels(levels, bits) * scales[..., None]).reshape(5, -1)
    assert not back[:, rows:].any()
    step = np.repeat(np.abs(scales), size, 1)[:, :rows].T
    off = np.abs(back[:, :rows].T - matrix)
    # Half a step, but for what is nearly as large as the largest and of the other sign: a whole one.
    assert (off <= step * 1.0001).all()
    assert np.mean(off <= step * 0.5001) > 0.9


def test_columns():
    matrix = gaussian(64, 7)
    matrix[:, 3] = 0
    levels, scales = columns(matrix)
    assert levels.dtype == np.int8
    assert np.abs(levels).max(0).tolist() == [DYNAMIC_LARGEST] * 3 + [0] + [DYNAMIC_LARGEST] * 3
    assert (np.abs(levels * scales - matrix) <= scales * 0.5001).all()


def one_product(matrix, *, gated=False):
    """y = x @ matrix, or (x * x) @ matrix."""
    nodes = [helper.make_node("Mul", ["x", "x"], ["h"], name="gate")] if gated else []
    nodes.append(helper.make_node("MatMul", ["h" if gated else "x", "m"], ["y"], name="product"))
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", matrix.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", matrix.shape[1]])],
        [numpy_helper.from_array(matrix, "m")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def run(model, x):
    data = ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(onnx.load_model_from_string(data))
    session = import_onnxruntime().InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("gated", [False, True])
def test_dynamic_product(gated):
    matrix, x = gaussian(96, 24), gaussian(9, 96, seed=1)
    x[4] *= 100  # one row drowns the others, unless each is divided by its own largest number
    model = one_product(matrix, gated=gated)
    quantize(model, Form("dynamic"))
    given = x * x if gated else x
    largest = np.abs(given).max(1, keepdims=True) if gated else np.float32(1)
    rows = given / largest
    low, high = min(rows.min(), 0), max(rows.max(), 0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    rounded = (np.clip(np.rint(rows / scale) + zero, 0, 255) - zero) * scale
    levels, scales = columns(matrix)
    wanted = rounded @ (levels * scales).astype(np.float64) * largest
    np.testing.assert_allclose(run(model, x), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert relative_error(run(model, x)[:4], (given @ matrix)[:4]) < (0.02 if gated else 10)


def test_shared_factor():
    """What several products read is rounded once, to the same numbers."""
    first, second, x = gaussian(96, 24), gaussian(96, 24, seed=2), gaussian(9, 96, seed=1)
    alone = one_product(first)
    both = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", name], [f"y{name}"], name=f"product{name}") for name in "mn"]
            + [helper.make_node("Sub", ["ym", "yn"], ["y"], name="difference")],
            "both",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 96])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 24])],
            [numpy_helper.from_array(first, "m"), numpy_helper.from_array(second, "n")],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    other, shared = one_product(second), ir.from_proto(both)
    for model in (alone, other, shared):
        quantize(model, Form("dynamic"))
    operators = [node.op_type for node in shared.graph]
    assert operators == ["DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat", "Sub"]
    np.testing.assert_allclose(run(shared, x), run(alone, x) - run(other, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_block_product(bits):
    matrix, x = gaussian(96, 24), gaussian(9, 96, seed=1)
    x[4] *= 100
    model = one_product(matrix)
    quantize(model, Form("blocks", bits))
    _, levels, scales = blocks(matrix, bits, 128)
    stored = (read_levels(levels, bits) * scales[..., None]).reshape(24, -1)[:, :96].T
    found = run(model, x)
    for row, wanted in zip(found, x @ stored, strict=True):
        assert relative_error(row, wanted) < 0.02  # what 8 bits of x cost: each row has scales of its own
    for i in range(len(x)):  # sums are added up in another order
        np.testing.assert_allclose(
            run(model, x[i : i + 1]), found[i : i + 1], rtol=1e-4, atol=1e-5 * np.abs(found[i]).max()
        )


def test_what_is_not_replaced():
    matrix = gaussian(96, 24)
    model = one_product(matrix)
    model.graph.initializers["m"].name = "weights.layers.0.router"
    quantize(model, Form("dynamic"))
    assert [node.op_type for node in model.graph] == ["MatMul"]
    both = ir.from_proto(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("MatMul", ["x", "z"], ["y"])],
                "both",
                [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xz"],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])],
            )
        )
    )
    quantize(both, Form("blocks"))
    assert [node.op_type for node in both.graph] == ["MatMul"]


def test_bundle(quantized, tiny_bundle):
    manifest = open_bundle(quantized).manifest
    tools = manifest.origin.tools
    assert tools == tiny_bundle.manifest.origin.tools | {"quantizer": f"mt3-runtime {__version__}"}
    bare = {"graphs": (), "files": {}, "origin": manifest.origin}
    assert replace(manifest, **bare) == replace(tiny_bundle.manifest, **bare)
    assert set(tiny_bundle.manifest.graphs) < set(manifest.graphs)
    assert tiny_bundle.manifest.files.items() < manifest.files.items()
    of = {(entry.precision, entry.graph): entry for entry in manifest.graphs if entry.lowering == "ort"}
    for (precision, graph), entry in of.items():
        changed = precision == "int8" or (precision in UNCALIBRATED and graph == "decode_step")
        assert (entry.file == of["fp32", graph].file) is not changed
        if changed:
            model = onnx.load(quantized / entry.file, load_external_data=False)
            assert entry.weights == f"weights.{precision}.bin"
            assert sum(node.op_type == OPERATORS[graph] for node in model.graph.node) > 1
            finer = [node.input[1] for node in model.graph.node if node.op_type == "MatMulNBits"]
            assert graph != "encoder" or all(".qkv" in name or ".projection" in name for name in finer)
            assert len(finer) == {"encoder": 1 + TINY_MODEL.encoder_layers, "cross_kv": 0}.get(graph, len(finer))
            named = {tensor.name for tensor in model.graph.initializer}
            kept = {name for name in named if name.startswith("weights.") and not name.endswith((".levels", ".scales"))}
            products = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
            assert not kept & products
    assert manifest.files["weights.w8.bin"].size > manifest.files["weights.w4.bin"].size


def test_same_as_exported(quantized, tiny_folder, tmp_path):
    """Of a checkpoint or of a bundle: the same files."""
    exported = open_bundle(FastExport(tiny_folder)(tmp_path / "new", precisions=("w4", "int8")))
    files, again = exported.manifest.files, open_bundle(quantized).manifest.files
    assert {name: again[name] for name in files} == files
    assert "weights.w8.bin" not in files
    assert not any(entry.lowering == "cuda" for entry in exported.manifest.graphs)


@pytest.mark.parametrize("precision", UNCALIBRATED)
def test_rows_alone(quantized, precision):
    """Whoever is beside a row, all that differs is the order in which sums are added up."""
    features = gaussian(3, TINY_FEATURES.segment_frames, TINY_FEATURES.bins)
    features[2] *= 50
    backend = OrtBackend(open_bundle(quantized), slots=3, threads=1, precision=precision)
    assert backend.precision == precision
    check_rows_are_alone(backend, features)


@pytest.mark.parametrize("precision", UNCALIBRATED)
def test_no_number_is_made_of_none(quantized, precision):
    """A row whose states hold one that is not finite fails wherever it stands, and no other."""
    backend = OrtBackend(open_bundle(quantized), slots=3, threads=1, precision=precision)
    features = gaussian(3, TINY_FEATURES.segment_frames, TINY_FEATURES.bins)
    states = backend.encode(features)[:, 0]
    states[2, 100, 5] = np.inf
    backend.admit(0, states)
    tokens = np.zeros(3, np.int32)
    assert np.isnan(backend.step(tokens, tokens)[1]).tolist() == [False, False, True]
    backend.move(2, 0, 1)
    assert np.isnan(backend.step(tokens[:2], tokens[:2] + 1)[1]).tolist() == [True, False]
    backend.admit(0, backend.encode(features[:1])[:, 0])
    assert np.isfinite(backend.step(tokens[:2], tokens[:2])[1]).all()


@pytest.mark.parametrize("precision", UNCALIBRATED)
def test_head_sees_what_is_no_number(quantized, precision):
    """One that appears in the decoder, here in the table of positions, is found in its step."""
    model = onnx.load(quantized / f"decode_step.{precision}.ort.onnx")
    [table] = [tensor for tensor in model.graph.initializer if tensor.name == "weights.positions"]
    positions = numpy_helper.to_array(table).copy()
    positions[7] = np.nan
    table.CopyFrom(numpy_helper.from_array(positions, table.name))
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sizes = {"rows": 2, "length": 16}
    shapes = {value.name: [sizes.get(size, size) for size in value.shape] for value in session.get_inputs()}
    feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    feeds |= {"token": np.zeros(2, np.int32), "position": np.array([3, 7], np.int32)}
    assert np.isnan(session.run(["log_prob"], feeds)[0]).tolist() == [False, True]


def test_verify(quantized, tiny_checkpoint):
    reports = verify_bundle(open_bundle(quantized), tiny_checkpoint, segments=1, steps=8)
    found = {(report.precision, report.graph): report for report in reports if report.precision in UNCALIBRATED}
    assert set(found) == {("int8", graph) for graph in OPERATORS} | {("w8", "decode_step"), ("w4", "decode_step")}
    for report in found.values():
        assert report.passed
        assert report.relative_error > 1e-4  # it is another graph indeed
    assert found["w4", "decode_step"].relative_error > 2 * found["w8", "decode_step"].relative_error


def test_verify_finds_damage(tiny_bundle, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("mt3_export.quantized.columns", lambda matrix: columns(np.roll(matrix, 1, 0)))
    broken = open_bundle(quantize_bundle(tiny_bundle, tmp_path / "broken", ["int8"]))
    reports = verify_bundle(broken, tiny_checkpoint, segments=1, steps=4)
    failed = {(report.precision, report.graph) for report in reports if not report.passed}
    assert failed == {("int8", "encoder"), ("int8", "cross_kv")}


def test_refusals(quantized, tiny_bundle, tmp_path):
    bundle = open_bundle(quantized)
    with pytest.raises(OptionError, match=r"fp16.*use int8, w8, w4, qdq"):
        quantize_bundle(tiny_bundle, tmp_path / "new", ["fp16"])
    with pytest.raises(OptionError, match="holds int8 already"):
        quantize_bundle(bundle, tmp_path / "new", ["int8"])
    with pytest.raises(OutputError, match="exists already"):
        quantize_bundle(tiny_bundle, tmp_path, ["int8"])
    for_devices = replace(tiny_bundle.manifest, graphs=tiny_bundle.manifest.graphs[3:])
    with pytest.raises(BundleError, match="no graphs for the CPU"):
        quantize_bundle(replace(tiny_bundle, manifest=for_devices), tmp_path / "new", ["w8"])
    assert list(tmp_path.iterdir()) == []


def test_damaged_source(tiny_folder, tmp_path):
    folder = copied(tiny_folder, tmp_path / "copy")
    data = bytearray((folder / "weights.fp32.bin").read_bytes())
    data[5000] ^= 1
    (folder / "weights.fp32.bin").write_bytes(data)
    with pytest.raises(BundleError, match="not what the manifest lists"):
        quantize_bundle(open_bundle(folder), tmp_path / "new", ["w8"])
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_choice(quantized, tiny_folder):
    assert load(quantized, "cpu").backend.precision == "fp32"  # fewer bits only for who asks
    assert load(quantized, "cpu", precision="w4").backend.precision == "w4"
    with pytest.raises(DeviceError, match="has no int8 graphs: mt3-export quantize"):
        load(tiny_folder, "cpu", precision="int8")
    with pytest.raises(OptionError, match="bf16 is for GPUs"):
        load(tiny_folder, "cpu", precision="bf16")


def test_command(tiny_folder, tmp_path, capsys):
    assert main(["quantize", str(tiny_folder), "--precision", "w8,w4", "--output", str(tmp_path / "new")]) == 0
    assert "w8, w4" in capsys.readouterr().err
    held = {entry.precision for entry in open_bundle(tmp_path / "new").manifest.graphs}
    assert held == {"fp32", "w8", "w4"}
    assert main(["quantize", str(tiny_folder), "--precision", "w5", "--output", str(tmp_path / "newer")]) == 2
    assert "'w5'" in capsys.readouterr().err


def test_damaged_bundles_are_said_to_be_so(tiny_folder, tmp_path):
    """Links are no part of a bundle: a copy of one would be what the runtime refuses."""
    for damage in (
        lambda file: file.unlink(),
        lambda file: (file.rename(tmp_path / "away"), file.symlink_to(tmp_path / "away")),
    ):
        folder = copied(tiny_folder, tmp_path / "damaged")
        damage(folder / "encoder.fp32.tensorrt.onnx")
        with pytest.raises(BundleError, match=r"encoder\.fp32\.tensorrt\.onnx"):
            quantize_bundle(open_bundle(folder), tmp_path / "new", ["w8"])
        assert not (tmp_path / "new").exists()
        shutil.rmtree(folder)


def test_without_torch(tiny_folder, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from mt3_export.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["quantize", tiny_folder, "--output", tmp_path / "new"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    assert open_bundle(tmp_path / "new").manifest.files["weights.int8.bin"].size


def test_model_sizes():
    """A matrix narrower than the smallest block is filled up."""
    matrix, x = gaussian(10, 3), gaussian(2, 10, seed=1)
    model = one_product(matrix)
    quantize(model, Form("blocks"))
    assert relative_error(run(model, x), x @ matrix) < 0.02


@pytest.mark.parametrize("kind", ["context", "prefix"])
def test_memory(kind, request, tmp_path):
    """Of a model with memory all graphs are quantised, products of activations aside."""
    bundle, checkpoint = request.getfixturevalue(f"{kind}_bundle"), request.getfixturevalue(f"{kind}_checkpoint")
    found = open_bundle(quantize_bundle(bundle, tmp_path / kind, ["int8"]))
    graphs = [entry for entry in found.manifest.graphs if entry.precision == "int8"]
    assert [entry.graph for entry in graphs] == [spec.name for spec in bundle.manifest.contracts]
    reports = verify_bundle(found, checkpoint, segments=2, steps=6)
    assert all(report.passed for report in reports)
    if kind == "prefix":
        operators = [node.op_type for node in onnx.load(found.path / "prefix.int8.ort.onnx").graph.node]
        assert operators.count("MatMul") == 2 * (checkpoint.model.decoder_layers - 1)  # scores, and what they weigh
