"""What a segment is told of the one before it: every graph, in every lowering, against the network in float64."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from conftest import TINY_FEATURES, TINY_MODEL
from graph_cases import HEADS, LAYERS, LOWERINGS, WIDTH, Decoder, engine, evaluator, extents, one_thread, relative_error
from memory_cases import SPAN, TIE, export_with
from mt3_export.lowering import Eager
from mt3_export.memory import fill_table
from mt3_export.network import build_modules, sinusoid
from t5_numpy import NumpyT5, log_softmax

ROWS, LENGTH, STEPS = 4, 32, 8
LIMIT = 2e-6  # of float32 graphs against float64
COUNTS = (2, 32, 33, 100)  # tokens of each row
WRITTEN = [LENGTH, LENGTH + 1, 100, SPAN - 1, SPAN]


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def told():
    """Rows of so many tokens, fill among them too, then fill [rows, span]."""
    generator = np.random.default_rng(11)
    ids = np.zeros((ROWS, SPAN), np.int32)
    ids[0, :2] = TIE, 1
    for row, count in enumerate(COUNTS[1:], start=1):
        ids[row, :count] = generator.integers(2, TINY_MODEL.vocab_size, count)
        ids[row, [0, 7]] = 0
    return ids


@pytest.fixture(scope="module")
def states():
    return np.random.default_rng(12).normal(size=(ROWS, TINY_FEATURES.segment_frames, TINY_MODEL.d_model))


@pytest.fixture(scope="module")
def tokens():
    chosen = np.random.default_rng(13).integers(TINY_MODEL.vocab_size, size=(ROWS, STEPS))
    chosen[:, 0] = TINY_MODEL.start_token
    return chosen


@pytest.fixture(scope="module")
def network(context_checkpoint):
    return NumpyT5(context_checkpoint.model, context_checkpoint.tensors)  # which also is that of the prefix


@pytest.fixture(scope="module")
def vectors(network, told):
    """What all of the span makes of every row [rows, length, d_model]."""
    return np.stack([network.remember(ids)[:LENGTH] for ids in told.tolist()])


@pytest.fixture(scope="module")
def bundles(context_bundle, prefix_bundle):
    return {"context": context_bundle, "prefix": prefix_bundle}


def single(array):
    return array.astype(np.float32)


def cross_of(network, rows):
    """Keys and values of every layer [rows, heads, frames, d_kv]."""
    return [np.stack([network.cross(row, layer, name) for row in rows]) for name in "kv" for layer in range(LAYERS)]


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("written", WRITTEN)
def test_fill_that_is_left_out_is_attended_to(context_bundle, told, vectors, lowering, written):
    rows = [row for row, count in enumerate(COUNTS) if count <= written]
    found = engine(context_bundle, "memory", lowering)(told[rows, :written])[0]
    assert relative_error(found, vectors[rows]) < LIMIT


def test_fill_counts(network, told, vectors):
    """Without this the test above could pass if nobody attended to it."""
    for row, count in enumerate(COUNTS):
        without = network.remember(told[row, : max(count, LENGTH)].tolist())[:LENGTH]
        assert relative_error(without, vectors[row]) > 0.01
        half = network.remember(told[row, : SPAN // 2].tolist())[:LENGTH]
        assert relative_error(half, vectors[row]) > 1e-3


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("rows", [[0], [3, 1], [2, 2, 0, 1, 3, 2]])
def test_any_rows_in_any_order(context_bundle, told, vectors, lowering, rows):
    found = engine(context_bundle, "memory", lowering)(told[rows, :112])[0]
    assert relative_error(found, vectors[rows]) < LIMIT


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_row_does_not_depend_on_the_others(context_bundle, told, lowering):
    memory = engine(context_bundle, "memory", lowering)
    together = memory(told[:, :112])[0]
    for row in range(ROWS):
        np.testing.assert_allclose(memory(told[[row], :112])[0][0], together[row], rtol=1e-5, atol=1e-6)


def test_eager_torch(context_checkpoint, told, vectors):
    modules = build_modules(context_checkpoint.model, TINY_FEATURES, context_checkpoint.tensors, Eager())
    memory = modules["memory"].double()
    with torch.inference_mode():
        for written in (112, SPAN):
            assert relative_error(memory(torch.from_numpy(told[:, :written])).numpy(), vectors) < 1e-6


def test_the_standards_own_evaluator(context_folder, told, vectors):
    found = evaluator(context_folder, "memory.fp32.tensorrt.onnx")(told[:, :112])[0]
    assert relative_error(found, vectors) < LIMIT


def test_fewer_tokens_than_vectors_are_an_error(context_bundle, told):
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of"):
        engine(context_bundle, "memory", "ort")(told[:, : LENGTH - 1])


def test_the_table_of_fill_is_rounded_once(context_checkpoint, network):
    found = fill_table(context_checkpoint.tensors, sinusoid(SPAN, TINY_MODEL.d_model, 255), 0).numpy()
    embedded = network._linear(network.tensors["decoder_embed_tokens.weight"][0], "segmem_proj")
    hidden = embedded + sinusoid(SPAN, TINY_MODEL.d_model, 255).numpy()
    normed = network._norm(hidden, "segmem_encoder.block.0.layer.0.layer_norm")
    exact = [network._linear(normed, f"segmem_encoder.block.0.layer.0.SelfAttention.{name}") for name in "kv"]
    wanted = np.concatenate(exact, axis=1)
    assert found.shape == wanted.shape == (SPAN, 2 * HEADS * WIDTH)
    np.testing.assert_array_less(np.abs(found - wanted), 2**-23 * np.abs(wanted) + 1e-12)


# ---- what the decoder sees of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_vectors_stand_behind_the_states(context_bundle, network, states, vectors, lowering):
    found = engine(context_bundle, "cross_kv", lowering)(single(states), single(vectors))
    wanted = cross_of(network, np.concatenate([states, vectors], axis=1))
    for array, exact in zip(found, wanted, strict=True):
        assert array.shape == (ROWS, HEADS, TINY_FEATURES.segment_frames + LENGTH, WIDTH)
        assert relative_error(array, exact) < LIMIT


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_decoding_with_vectors_behind_the_states(context_bundle, network, states, vectors, tokens, lowering):
    context = np.concatenate([states, vectors], axis=1)
    cross = [single(array) for array in cross_of(network, context)]
    decoder = Decoder(engine(context_bundle, "decode_step", lowering), cross, fill=9)
    wanted = np.stack([network.decode(row, state) for row, state in zip(tokens, context, strict=True)])
    assert relative_error(decoder.follow(tokens), wanted) < LIMIT


def self_of(network, states, vectors, monkeypatch):
    """Keys and values that self-attention of every layer makes of the vectors [rows, heads, length, d_kv].

    Taken from the network while it decodes; the last token's are left out.
    """
    seen = {}
    plain = network._linear

    def noted(x, name):
        result = plain(x, name)
        if "SelfAttention.k" in name or "SelfAttention.v" in name:
            seen.setdefault(name, []).append(network._heads(result)[:, :LENGTH])
        return result

    monkeypatch.setattr(network, "_linear", noted)
    for state, before in zip(states, vectors, strict=True):
        network.decode([0], state, before)
    monkeypatch.undo()
    names = [f"decoder.block.{layer}.layer.0.SelfAttention.{name}" for name in "kv" for layer in range(LAYERS)]
    return [np.stack(seen[name]) for name in names]


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_prefix(prefix_bundle, network, states, vectors, lowering, monkeypatch):
    wanted = self_of(network, states, vectors, monkeypatch)
    run, cross = engine(prefix_bundle, "prefix", lowering), [single(array) for array in cross_of(network, states)]
    for array, exact in zip(run(single(vectors), *cross), wanted, strict=True):
        assert array.shape == (ROWS, HEADS, LENGTH, WIDTH)
        assert relative_error(array, exact) < LIMIT
    alone = run(single(vectors[2:3]), *(array[2:3] for array in cross))
    for array, exact in zip(alone, wanted, strict=True):
        assert relative_error(array, exact[2:3]) < LIMIT


def test_the_standards_own_evaluator_on_a_prefix(prefix_folder, network, states, vectors, monkeypatch):
    wanted = self_of(network, states[:2], vectors[:2], monkeypatch)
    run = evaluator(prefix_folder, "prefix.fp32.tensorrt.onnx")
    for array, exact in zip(run(single(vectors[:2]), *map(single, cross_of(network, states[:2]))), wanted, strict=True):
        assert relative_error(array, exact) < LIMIT


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_decoding_behind_a_prefix(prefix_bundle, network, states, vectors, tokens, lowering):
    cross = [single(array) for array in cross_of(network, states)]
    decoder = Decoder(engine(prefix_bundle, "decode_step", lowering), cross, length=LENGTH + STEPS, fill=9)
    found = engine(prefix_bundle, "prefix", lowering)(single(vectors), *cross)
    for cache, array in zip(decoder.cache, found, strict=True):
        cache[:, :, :LENGTH] = array
    for i in range(STEPS):
        token, log_prob, logits = decoder.step(tokens[:, i], [LENGTH + i] * ROWS)
        wanted = [network.decode(tokens[row, : i + 1], states[row], vectors[row])[-1] for row in range(ROWS)]
        assert relative_error(logits, np.stack(wanted)) < LIMIT
        assert token.tolist() == np.argmax(wanted, -1).tolist()
        np.testing.assert_allclose(log_prob, log_softmax(np.stack(wanted)).max(-1), rtol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_poisoned_memory_stays_in_its_row(bundles, network, states, vectors, tokens, lowering, value):
    poisoned = single(vectors)
    poisoned[2, 5, 3] = value
    others = [0, 1, 3]
    for name, bundle in bundles.items():
        given = [single(states), *([poisoned] if name == "context" else [])]
        decoder = Decoder(
            engine(bundle, "decode_step", lowering), engine(bundle, "cross_kv", lowering)(*given), length=LENGTH + 1
        )
        first = LENGTH if name == "prefix" else 0
        if first:
            found = engine(bundle, "prefix", lowering)(poisoned, *decoder.cross)
            for cache, array in zip(decoder.cache, found, strict=True):
                cache[:, :, :LENGTH] = array
        _, log_prob, _ = decoder.step(tokens[:, 0], [first] * ROWS)
        assert np.isnan(log_prob).tolist() == [False, False, True, False]
        for row in others:
            parts = (states[row], vectors[row]) if first else (np.concatenate([states[row], vectors[row]]), None)
            wanted = log_softmax(network.decode([0], *parts)).max()
            np.testing.assert_allclose(log_prob[row], wanted, rtol=1e-5)


# ---- what the graphs are made of --------------------------------------------------------------------------------


def load(folder, graph, lowering):
    return onnx.load(folder / f"{graph}.fp32.{lowering}.onnx", load_external_data=False)


@pytest.mark.parametrize(
    ("kind", "graph"),
    [("context", "memory"), ("context", "cross_kv"), ("context", "decode_step"), ("prefix", "prefix")],
)
def test_tensorrt_gets_standard_operators_only(bundles, kind, graph):
    folder = bundles[kind].path
    model = load(folder, graph, "tensorrt")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not {node.op_type for node in model.graph.node} & {"NonZero", "If", "Loop", "Unique", "Compress"}
    onnx.checker.check_model(str(folder / f"{graph}.fp32.tensorrt.onnx"), full_check=True)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_attention_over_all_of_the_span_is_one_operator_and_unscaled(context_folder, lowering):
    nodes = load(context_folder, "memory", lowering).graph.node
    found = [node for node in nodes if "Attention" in node.op_type or node.op_type == "Softmax"]
    assert [node.op_type for node in found] == [{"ort": "MultiHeadAttention", "tensorrt": "Attention"}[lowering]]
    [scale] = [attribute.f for attribute in found[0].attribute if attribute.name == "scale"]
    assert scale == 1.0


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_of_the_last_layer_a_prefix_computes_keys_and_values_only(prefix_folder, lowering):
    model = load(prefix_folder, "prefix", lowering)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["Softmax"] == LAYERS - 1
    # query, key and value; scores, mix, output; query, output; gates, output - and keys and values of the last layer
    assert counts["MatMul"] == 8 * (LAYERS - 1) + 1
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used


def test_weights_of_the_decoder_stand_in_the_file_once(prefix_folder):
    prefix, step = (extents(prefix_folder, f"{name}.fp32.ort.onnx") for name in ("prefix", "decode_step"))
    for name in ("qkv", "output", "cross_query", "cross_output", "feed_forward.gates", "feed_forward.output"):
        assert prefix[f"weights.layers.0.{name}"] == step[f"weights.layers.0.{name}"]


def test_graphs_with_other_weights_are_the_graphs_of_an_export(prefix_folder, prefix_checkpoint, tmp_path):
    """What the fixtures rest on: the decode step of the prefix was never traced, and this one is."""
    names = ("encoder", "memory", "cross_kv", "prefix")
    folder = export_with(prefix_checkpoint, tmp_path / "traced", dict.fromkeys(names, prefix_folder), ["ort"])
    for path in folder.glob("*.onnx"):
        assert path.read_bytes() == (prefix_folder / path.name).read_bytes()
