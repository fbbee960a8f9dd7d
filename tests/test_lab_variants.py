"""Bundles in which all or some products are in another precision."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from bundle_cases import copied, forge
from mt3_export.lab.probes import Probe, places_of
from mt3_export.lab.variants import VARIANTS, changed_products, parse_variants, write_variant
from mt3_export.products import products
from mt3_export.quantize_bundle import quantize_bundle
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import BundleError, OptionError, OutputError
from mt3_runtime.loading import load

GRAPHS = ("encoder", "cross_kv", "decode_step")


def files_of(bundle, precision):
    return {
        entry.graph: entry.file
        for entry in bundle.manifest.graphs
        if (entry.lowering, entry.precision) == ("ort", precision)
    }


def graph_of(bundle, name, precision):
    return ir.load(bundle.path / bundle.graph(name, "ort", precision).file).graph


def test_names():
    assert [variant.name for variant in parse_variants(["int8", "w4", "int8", " fp16"])] == [
        "fp32",
        "int8",
        "w4",
        "fp16",
    ]
    with pytest.raises(OptionError, match="unknown precision 'fp8': use fp32, fp16"):
        parse_variants(["fp8"])


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "fp32"])
def test_every_variant_changes_its_products_and_no_others(name, tiny_bundle, tmp_path):
    variant = VARIANTS[name]
    made = write_variant(tiny_bundle, variant, tmp_path / "made", {}, {})
    label = "fp32" if variant.is_half else variant.precision
    changed = changed_products(tiny_bundle, variant)
    assert changed
    assert len(set(changed)) == len(changed)
    original = files_of(tiny_bundle, "fp32")
    for graph in GRAPHS:
        mine = [layer for other, layer in changed if other == graph]
        assert bool(mine) == variant.changes(graph)
        assert (files_of(made, label)[graph] == original[graph]) == (not mine)
        plain = products(graph_of(tiny_bundle, graph, "fp32"))
        left = products(graph_of(made, graph, label))
        assert set(left) == set(plain) - set(mine)  # what reads rounded weights is not found there any more
    transcriber = load(made.path, "cpu", precision=label)
    features = tiny_bundle.manifest.features
    states = transcriber.backend.encode(np.zeros((1, features.segment_frames, features.bins), np.float32))
    assert np.isfinite(states).all()


def test_parts_of_int8(tiny_bundle):
    whole, encoder, decoder = (
        changed_products(tiny_bundle, VARIANTS[name]) for name in ("int8", "int8-encoder", "int8-decoder")
    )
    assert encoder + decoder == whole
    assert {graph for graph, _ in encoder} == {"encoder"}


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_kept_products_are_those_of_fp32(name, tiny_bundle, tmp_path):
    variant = VARIANTS[name]
    keep = {"encoder": {"layers.0.qkv"}, "decode_step": {layer for _, layer in changed_products(tiny_bundle, variant)}}
    made = write_variant(tiny_bundle, variant, tmp_path / "made", keep)
    label = "fp32" if variant.is_half else name
    assert set(products(graph_of(made, "encoder", label))) == {"layers.0.qkv"}
    plain, kept = (graph_of(bundle, "decode_step", form) for bundle, form in ((tiny_bundle, "fp32"), (made, label)))
    # Casts stay around attention and at the outputs, which are half in any case: see `test_lab_emulation.py`.
    assert [node.op_type for node in plain if node.op_type != "Cast"] == [
        node.op_type for node in kept if node.op_type != "Cast"
    ]


def test_weights_that_the_bundle_has_are_used_as_they_are(tiny_bundle, tmp_path):
    quantized = quantize_bundle(tiny_bundle, tmp_path / "quantized", ["int8"])
    entry = open_bundle(quantized).graph("encoder", "ort", "int8")
    model = ir.load(quantized / entry.file)
    scales = model.graph.initializers["weights.layers.0.qkv.scales"]
    mine = np.full(scales.shape.numpy(), 123.0, np.float32)
    scales.const_value = ir.tensor(mine, name=scales.name)
    folder = forge(quantized, {entry.file: ir.to_proto(model).SerializeToString()})
    made = write_variant(open_bundle(folder), VARIANTS["int8"], tmp_path / "made", {})
    initializers = graph_of(made, "encoder", "int8").initializers
    assert np.array_equal(initializers["weights.layers.0.qkv.scales"].const_value.numpy(), mine)
    assert initializers["weights.layers.1.qkv.scales"].const_value.numpy().max() < 1


def test_a_damaged_bundle_leaves_nothing_behind(tiny_bundle, tmp_path):
    folder = copied(tiny_bundle.path, tmp_path / "damaged")
    path = folder / tiny_bundle.graph("encoder", "ort", "fp32").weights
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match="copy it again"):
        write_variant(open_bundle(folder), VARIANTS["int8"], tmp_path / "made", {})
    assert not (tmp_path / "made").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        write_variant(tiny_bundle, VARIANTS["fp16"], tmp_path / "there", {})


def swap_weights(folder, file):
    """Let two weights of one shape stand in each other's place; the manifest lists the file as it was."""
    model = onnx.load(folder / file, load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    first, second = next((a, b) for a in outside for b in outside if a.name < b.name and a.dims == b.dims)
    places = [list(first.external_data), list(second.external_data)]
    for tensor, place in zip((second, first), places, strict=True):
        del tensor.external_data[:]
        tensor.external_data.extend(place)
    (folder / file).write_bytes(model.SerializeToString())


def test_a_changed_graph_is_not_used(tiny_bundle, tmp_path):
    """A bundle's own numbers in a precision, above all: nothing else reads that graph."""
    quantized = quantize_bundle(tiny_bundle, tmp_path / "quantized", ["int8"])
    swap_weights(quantized, "encoder.int8.ort.onnx")
    with pytest.raises(BundleError, match="is not what the manifest lists"):
        write_variant(open_bundle(quantized), VARIANTS["int8-encoder"], tmp_path / "made", {})
    assert not (tmp_path / "made").exists()


def test_a_changed_graph_of_fp32_is_not_looked_into(tiny_bundle, tmp_path):
    bundle = open_bundle(copied(tiny_bundle.path, tmp_path / "changed"))
    swap_weights(bundle.path, "encoder.fp32.ort.onnx")
    for look in (
        lambda: changed_products(bundle, VARIANTS["int8"]),
        lambda: write_variant(bundle, VARIANTS["fp16"], tmp_path / "made", {}),
        lambda: places_of(bundle, "encoder"),
        lambda: Probe(bundle, "encoder", "fp32", {}, 1),
    ):
        with pytest.raises(BundleError, match="is not what the manifest lists"):
            look()
