"""Every lowering of every graph computes the network, and nothing but its own rows and positions matters to it."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from conftest import TINY_FEATURES, TINY_MODEL
from graph_cases import LAYERS, LOWERINGS, Decoder, engine, evaluator, extents, one_thread, relative_error
from mt3_export.lowering import Eager
from mt3_export.network import build_modules, choose, sinusoid
from mt3_runtime.backends.ort import open_session
from mt3_runtime.graphs import GRAPH_NAMES
from t5_numpy import NumpyT5, log_softmax, positions

FORMS = [(graph, lowering) for graph in GRAPH_NAMES for lowering in LOWERINGS]
ROWS, STEPS = 5, 40
LIMIT = 2e-6  # of float32 graphs against float64; they come to 4e-7


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def network(tiny_checkpoint):
    return NumpyT5(TINY_MODEL, tiny_checkpoint.tensors)


@pytest.fixture(scope="module")
def features():
    """Log-mel-like frames: smooth in time, of the range of music [rows, frames, bins]."""
    shape = (ROWS, TINY_FEATURES.segment_frames, TINY_FEATURES.bins)
    noise = np.random.default_rng(5).normal(size=shape)
    return (np.cumsum(noise, axis=1) / 4 - 4).astype(np.float32)


@pytest.fixture(scope="module")
def states(network, features):
    return np.stack([network.encode(segment) for segment in features])


@pytest.fixture(scope="module")
def tokens():
    chosen = np.random.default_rng(6).integers(TINY_MODEL.vocab_size, size=(ROWS, STEPS))
    chosen[:, 0] = TINY_MODEL.start_token
    return chosen


@pytest.fixture(scope="module")
def logits(network, states, tokens):
    """What every step should give [rows, steps, vocab], from whole sequences."""
    return np.stack([network.decode(row, state) for row, state in zip(tokens, states, strict=True)])


@pytest.fixture(scope="module")
def cross(network, states):
    """Keys and values of every layer [rows, heads, frames, d_kv]."""
    arrays = [
        np.stack([network.cross(state, layer, name) for state in states]) for name in "kv" for layer in range(LAYERS)
    ]
    return [array.astype(np.float32) for array in arrays]


@pytest.fixture(scope="module")
def graphs(tiny_bundle):
    return {form: engine(tiny_bundle, *form) for form in FORMS}


@pytest.fixture(scope="module", params=LOWERINGS)
def step(request, graphs):
    return graphs["decode_step", request.param]


# ---- the network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_encoder(graphs, lowering, features, states):
    assert relative_error(graphs["encoder", lowering](features)[0], states[:, None]) < LIMIT


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_cross_kv(graphs, lowering, states, cross):
    for found, wanted in zip(graphs["cross_kv", lowering](states.astype(np.float32)), cross, strict=True):
        assert relative_error(found, wanted) < LIMIT


def test_decode_step(step, cross, tokens, logits):
    decoder = Decoder(step, cross)
    for i in range(STEPS):
        token, log_prob, found = decoder.step(tokens[:, i], [i] * ROWS)
        assert relative_error(found, logits[:, i]) < LIMIT
        assert token.tolist() == logits[:, i].argmax(-1).tolist()
        np.testing.assert_allclose(log_prob, log_softmax(logits[:, i]).max(-1), rtol=1e-5)


def test_the_last_position(step, cross, network, states):
    sequence = np.random.default_rng(8).integers(TINY_MODEL.vocab_size, size=(1, TINY_MODEL.max_length))
    found = Decoder(step, [array[:1] for array in cross], length=TINY_MODEL.max_length).follow(sequence)
    assert relative_error(found[0], network.decode(sequence[0], states[0])) < LIMIT


def test_eager_torch(tiny_checkpoint, features, states, cross, tokens, logits):
    modules = {
        name: module.double()
        for name, module in build_modules(TINY_MODEL, TINY_FEATURES, tiny_checkpoint.tensors, Eager()).items()
    }

    def run(*arrays):
        with torch.inference_mode():
            given = [torch.from_numpy(a) if a.dtype == np.int32 else torch.from_numpy(a).double() for a in arrays]
            return [result.numpy() for result in modules["decode_step"](*given)]

    with torch.inference_mode():
        assert relative_error(modules["encoder"](torch.from_numpy(features).double()).numpy()[:, 0], states) < 1e-7
    assert relative_error(Decoder(run, cross).follow(tokens), logits) < 1e-6  # the tables are float32


def test_the_standards_own_evaluator(tiny_folder, cross, tokens, logits):
    """TensorScatter, Attention, RMSNormalization and Gelu as the standard means them."""
    decoder = Decoder(evaluator(tiny_folder, "decode_step.fp32.tensorrt.onnx"), cross, length=8, fill=1e4)
    for i in range(6):
        token, log_prob, found = decoder.step(tokens[:, i], [i] * ROWS)
        assert relative_error(found, logits[:, i]) < LIMIT
        assert token.tolist() == logits[:, i].argmax(-1).tolist()
        np.testing.assert_allclose(log_prob, log_softmax(logits[:, i]).max(-1), rtol=1e-5)


def test_the_standards_own_evaluator_on_the_encoder(tiny_folder, features, states):
    found = evaluator(tiny_folder, "encoder.fp32.tensorrt.onnx")(features[:2])[0]
    assert relative_error(found, states[:2, None]) < LIMIT


# ---- positions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [255, 256])
@pytest.mark.parametrize("width", [32, 512])
def test_tables(base, width):
    found = sinusoid(1024, width, base).numpy()
    assert found.dtype == np.float32
    exact = positions(1024, width, base)
    # float32 angles, as the ports have them, are off by up to half a unit in the last place of 1023
    np.testing.assert_allclose(found, exact, atol=1e-7 if base == 255 else 2e-4)
    assert np.abs(found - positions(1024, width, 511 - base)).max() > 0.1


def test_frequencies_at_full_size():
    for base, divisor in ((255, 255), (256, 256)):
        table = sinusoid(2, 512, base).numpy()  # sines of position 1 are the frequencies' own
        np.testing.assert_allclose(np.arcsin(table[1, 1:256]), 10000.0 ** (-np.arange(1, 256) / divisor), rtol=1e-5)


@pytest.mark.parametrize("base", [255, 256])
def test_tables_of_a_network(tiny_checkpoint, base):
    model = replace(TINY_MODEL, position_base=base)
    modules = build_modules(model, TINY_FEATURES, tiny_checkpoint.tensors, Eager())
    for name, length in (("encoder", TINY_FEATURES.segment_frames), ("decode_step", TINY_MODEL.max_length)):
        np.testing.assert_allclose(modules[name].positions.numpy(), positions(length, 32, base), atol=1e-4)


@pytest.mark.parametrize(("graph", "length"), [("encoder", 256), ("decode_step", 96)])
def test_tables_of_a_bundle(tiny_folder, graph, length):
    for lowering in LOWERINGS:
        offset, size = extents(tiny_folder, f"{graph}.fp32.{lowering}.onnx")["weights.positions"]
        stored = np.fromfile(tiny_folder / "weights.fp32.bin", np.float32, size // 4, offset=offset)
        np.testing.assert_allclose(stored.reshape(length, 32), positions(length, 32, 255), atol=1e-7)


# ---- what the graphs are made of --------------------------------------------------------------------------


def nodes(folder, graph, lowering):
    return onnx.load(folder / f"{graph}.fp32.{lowering}.onnx", load_external_data=False).graph.node


@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_tensorrt_gets_standard_operators_only(tiny_folder, graph):
    assert {node.domain for node in nodes(tiny_folder, graph, "tensorrt")} <= {"", "ai.onnx"}
    model = onnx.load(tiny_folder / f"{graph}.fp32.tensorrt.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import if opset.domain == ""] == [("", 24)]
    assert not model.functions
    onnx.checker.check_model(str(tiny_folder / f"{graph}.fp32.tensorrt.onnx"), full_check=True)


@pytest.mark.parametrize(
    ("graph", "lowering", "operators"),
    [
        ("encoder", "ort", {"MultiHeadAttention": 2}),
        ("decode_step", "ort", {"GroupQueryAttention": 2, "MultiHeadAttention": 2}),
        ("encoder", "tensorrt", {"Attention": 2}),
        ("decode_step", "tensorrt", {"Attention": 4, "TensorScatter": 4}),
    ],
)
def test_attention_is_one_operator_and_unscaled(tiny_folder, graph, lowering, operators):
    found = Counter()
    for node in nodes(tiny_folder, graph, lowering):
        assert node.op_type != "Softmax"
        if "Attention" in node.op_type:
            [scale] = [attribute.f for attribute in node.attribute if attribute.name == "scale"]
            assert scale == 1.0
        if "Attention" in node.op_type or "Scatter" in node.op_type:
            found[node.op_type] += 1
    assert found == operators


def test_the_mask_comes_from_the_positions(tiny_folder):
    """TensorRT's parser drops Attention's seventh input, `nonpad_kv_seqlen`, without a word."""
    for node in nodes(tiny_folder, "decode_step", "tensorrt"):
        assert node.op_type != "Attention" or len(node.input) in (3, 4)


# ---- rows, lengths and what else a step is given -----------------------------------------------------------


@pytest.mark.parametrize("rows", [[0], [3, 1], [4, 0, 2, 1, 3], [2, 2, 2, 2, 2, 2, 2]])
def test_any_number_of_rows_in_any_order(step, cross, tokens, logits, rows):
    found = Decoder(step, [array[rows] for array in cross]).follow(tokens[rows, :12])
    assert relative_error(found, logits[rows, :12]) < LIMIT


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_segments(graphs, lowering, features, states, count):
    rows = np.arange(count) % ROWS
    assert relative_error(graphs["encoder", lowering](features[rows])[0], states[rows, None]) < LIMIT
    for array in graphs["cross_kv", lowering](states[rows].astype(np.float32)):
        assert array.shape[0] == count


@pytest.mark.parametrize("length", [12, 16, 64, 500])
def test_any_length_of_the_cache(step, cross, tokens, logits, length):
    decoder = Decoder(step, cross, length)
    assert relative_error(decoder.follow(tokens[:, :12]), logits[:, :12]) < LIMIT
    assert {array.shape[2] for array in decoder.cache} == {length}


def test_rows_at_unequal_positions(step, cross, tokens, logits):
    at = [0, 39, 7, 1, 23]
    alone = []
    for row, position in enumerate(at):
        decoder = Decoder(step, [array[row : row + 1] for array in cross])
        if position:
            decoder.follow(tokens[row : row + 1, :position])
        alone.append((decoder.cache, decoder.step([tokens[row, position]], [position])))
    together = Decoder(step, cross)
    together.cache = [np.concatenate(caches) for caches in zip(*(cache for cache, _ in alone), strict=True)]
    token, log_prob, found = together.step(tokens[range(ROWS), at], at)
    for row, (_, (its_token, its_log_prob, its_logits)) in enumerate(alone):
        assert token[row] == its_token[0]
        np.testing.assert_allclose(log_prob[row], its_log_prob[0], rtol=1e-6)
        np.testing.assert_allclose(found[row], its_logits[0], atol=1e-6 * np.abs(its_logits).max())
    assert relative_error(found, logits[range(ROWS), at]) < LIMIT


def changed_places(before, after):
    """Positions [rows][...] at which any number of any head differs."""
    return [np.flatnonzero(row).tolist() for row in (before != after).any(axis=(1, 3))]


def test_a_step_writes_its_position_and_keeps_those_before(step, cross, tokens):
    decoder = Decoder(step, cross, length=16, fill=3.0)
    before, at = decoder.cache, [0, 15, 7, 1, 4]
    decoder.step(tokens[:, 0], at)
    for old, new in zip(before, decoder.cache, strict=True):
        for row, position in enumerate(at):
            upto = slice(position + 1)
            assert changed_places(old[[row], :, upto], new[[row], :, upto]) == [[position]]


def test_a_step_in_place_writes_nothing_else(tiny_bundle, cross, tokens):
    session = open_session(tiny_bundle, tiny_bundle.graph("decode_step", "ort", "fp32"), threads=1)
    at = np.array([0, 15, 7, 1, 4], np.int32)
    cache = [np.full((ROWS, 2, 16, 16), 3, np.float32) for _ in range(2 * LAYERS)]
    binding = session.io_binding()
    given = [tokens[:, 0].astype(np.int32), at, *cross, *cache]
    held = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in given]
    for node, value in zip(session.get_inputs(), held, strict=True):
        binding.bind_ortvalue_input(node.name, value)
    for node, value in zip(session.get_outputs()[2 : 2 + len(cache)], held[-len(cache) :], strict=True):
        binding.bind_ortvalue_output(node.name, value)
    binding.bind_output("next_token")
    session.run_with_iobinding(binding)
    for array in cache:
        assert changed_places(np.full_like(array, 3), array) == [[position] for position in at]


@pytest.mark.parametrize("value", [1e4, -1e30, 1e30])
def test_what_stands_behind_a_position_is_not_read(step, cross, tokens, value):
    clean, poisoned = (Decoder(step, cross, fill=fill).follow(tokens[:, :10]) for fill in (0.0, value))
    np.testing.assert_array_equal(clean, poisoned)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_grouped_query_attention_never_reads_it(graphs, cross, tokens, value):
    step = graphs["decode_step", "ort"]
    clean, poisoned = (Decoder(step, cross, fill=fill).follow(tokens[:, :10]) for fill in (0.0, value))
    np.testing.assert_array_equal(clean, poisoned)


# ---- numbers that are not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_poisoned_row_says_so_and_leaves_the_others(graphs, lowering, states, tokens, logits, value):
    """Poisoned where rows are admitted: one number of one row's states."""
    poisoned = states.astype(np.float32)
    poisoned[2, 100, 3] = value
    decoder = Decoder(graphs["decode_step", lowering], graphs["cross_kv", lowering](poisoned))
    for i in range(3):
        token, log_prob, found = decoder.step(tokens[:, i], [i] * ROWS)
        assert np.isnan(log_prob).tolist() == [False, False, True, False, False]
        others = [0, 1, 3, 4]
        assert relative_error(found[others], logits[others, i]) < LIMIT
        assert token[others].tolist() == logits[others, i].argmax(-1).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_one_logit_that_is_not_finite_is_enough(tiny_folder, tmp_path, cross, tokens, logits, lowering, value):
    """An overflow to -inf is the treacherous one: it is never chosen, and its exponential is a harmless 0."""
    column = int(logits[:, 0].mean(0).argmin())
    file = f"decode_step.fp32.{lowering}.onnx"
    offset, length = extents(tiny_folder, file)["weights.head"]
    weights = bytearray((tiny_folder / "weights.fp32.bin").read_bytes())
    head = np.frombuffer(weights, np.float32, length // 4, offset).reshape(TINY_MODEL.d_model, -1)
    head[5, column] = value
    (tmp_path / "weights.fp32.bin").write_bytes(weights)
    shutil.copy(tiny_folder / file, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / file, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    decoder = Decoder(lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True))), cross)
    token, log_prob, found = decoder.step(tokens[:, 0], [0] * ROWS)
    assert not np.isfinite(found[:, column]).any()
    assert np.isfinite(np.delete(found, column, axis=1)).all()
    assert np.isnan(log_prob).all()
    harmless = np.isneginf(found[:, column])
    assert token[harmless].tolist() == logits[harmless, 0].argmax(-1).tolist()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_choice_of_a_token(kind):
    generator = np.random.default_rng(9)
    for scale in (1e-3, 1.0, 50.0, 1e4, 1e30):
        given = (scale * generator.normal(size=(200, 50))).astype(kind)
        token, log_prob = choose(torch.from_numpy(given))
        assert token.dtype == torch.int32
        assert token.tolist() == given.argmax(-1).tolist()
        np.testing.assert_allclose(log_prob.numpy(), log_softmax(given).max(-1), rtol=1e-5, atol=1e-6)
        for value in (np.nan, np.inf, -np.inf):
            spoiled = given.copy()
            places = generator.integers(50, size=200)
            spoiled[range(200), places] = value
            assert np.isnan(choose(torch.from_numpy(spoiled))[1].numpy()).all()
