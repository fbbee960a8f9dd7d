"""The backend on ONNX Runtime: what its slots and caches promise, and what it refuses."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys

import numpy as np
import pytest

from bundle_cases import forge
from conftest import TINY_FEATURES, TINY_MODEL
from decoding_cases import follow
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import open_bundle
from mt3_runtime.decoding import DecodingRules, Row, decode_rows
from mt3_runtime.errors import BundleError, DependencyError, OptionError
from mt3_runtime.loading import load

ROWS = 9
RULES = DecodingRules(start_token=0, end_token=None, max_tokens=24)


@pytest.fixture(scope="module")
def states():
    shape = (ROWS, TINY_FEATURES.segment_frames, TINY_MODEL.d_model)
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


@pytest.fixture
def backend(tiny_bundle):
    return OrtBackend(tiny_bundle, slots=ROWS, threads=1)


@pytest.fixture
def other(tiny_bundle):
    return OrtBackend(tiny_bundle, slots=ROWS, threads=1)


def ints(*values):
    return np.array(values, np.int32)


def decode(backend, states, rules=RULES):
    rows = (Row(key, one) for key, one in enumerate(states))
    return {row.key: row.tokens.tolist() for row in decode_rows(backend, rows, rules)}


@pytest.fixture(scope="module")
def wanted(tiny_bundle, states):
    """Tokens of every row, decoded alone."""
    alone = OrtBackend(tiny_bundle, slots=1, threads=1)
    return [decode(alone, states[key : key + 1])[0] for key in range(ROWS)]


def test_rows_decode_to_different_tokens(wanted):
    """Without this no test here could tell one row's cache from another's."""
    assert len({tuple(tokens) for tokens in wanted}) == ROWS


# ---- slots ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, ROWS + 1))
def test_a_step_over_some_slots_is_a_step_over_their_rows(backend, other, states, wanted, count):
    backend.admit(0, states)
    other.admit(0, states)
    all_tokens, all_log_probs = follow(other, 24, ROWS)
    tokens, log_probs = follow(backend, 24, count)
    assert tokens.tolist() == all_tokens[:count].tolist() == wanted[:count]
    np.testing.assert_allclose(log_probs, all_log_probs[:count], atol=1e-5)
    assert np.isfinite(log_probs).all()
    for cache in backend._own:
        assert cache[:count, :, :24].any(axis=(1, 2, 3)).all()
        assert not cache[:count, :, 24:].any()
        assert not cache[count:].any()


@pytest.mark.parametrize("groups", [[9], [1] * 9, [4, 5], [1, 7, 1]])
def test_rows_are_admitted_alike_one_by_one_and_in_groups(backend, other, states, wanted, groups):
    first = 0
    for size in groups:
        backend.admit(first, states[first : first + size])
        first += size
    other.admit(0, states)
    for cache, same in zip(backend._cross, other._cross, strict=True):
        np.testing.assert_allclose(cache, same, rtol=1e-5, atol=1e-6)
    assert follow(backend, 24, ROWS)[0].tolist() == wanted


def test_admitting_a_row_touches_its_slot_only(backend, states):
    for cache in (*backend._cross, *backend._own):
        cache.fill(7)
    backend.admit(3, states[:2])
    for cache in backend._cross:
        assert (cache[[0, 1, 2, 5, 6, 7, 8]] == 7).all()
        assert (cache[3:5] != 7).all()
    for cache in backend._own:
        assert (cache == 7).all()


def test_states_need_not_be_contiguous(backend, states, wanted):
    backend.admit(0, np.repeat(states, 2, axis=0)[::2])
    assert follow(backend, 24, ROWS)[0].tolist() == wanted
    backend.admit(0, np.asfortranarray(states))
    assert follow(backend, 24, ROWS)[0].tolist() == wanted


def test_rows_stand_at_their_own_positions(backend, states, wanted):
    """Three rows, each four steps behind the one before."""
    delays, found = [0, 4, 8], [[], [], []]
    for step in range(24 + 8):
        for row in range(3):
            if step == delays[row]:
                backend.admit(row, states[row : row + 1])
        live = [row for row in range(3) if delays[row] <= step]
        reads = ints(*((found[row] or [0])[-1] for row in live))
        tokens, _ = backend.step(reads, ints(*(len(found[row]) for row in live)))
        for row in live:
            found[row].append(int(tokens[row]))
    assert [tokens[:24] for tokens in found] == wanted[:3]


@pytest.mark.parametrize(("source", "target"), [(8, 0), (5, 4), (1, 8)])
def test_a_moved_row_goes_on_where_it_was(backend, states, wanted, source, target):
    backend.admit(0, states)
    done = follow(backend, 10, ROWS)[0]
    for cache in (*backend._cross, *backend._own):
        cache[target] = np.nan
    backend.move(source, target, 10)
    for cache in backend._own:
        assert np.isnan(cache[target, :, 10:]).all()
    token, found = done[source, -1], []
    for position in range(10, 24):
        tokens = np.zeros(target + 1, np.int32)
        tokens[target] = token
        positions = np.zeros(target + 1, np.int32)
        positions[target] = position
        token = int(backend.step(tokens, positions)[0][target])
        found.append(token)
    assert found == wanted[source][10:]


def test_a_move_leaves_every_other_slot_alone(backend, states):
    backend.admit(0, states)
    follow(backend, 10, ROWS)
    before = [cache.copy() for cache in (*backend._cross, *backend._own)]
    backend.move(8, 3, 10)
    for cache, old in zip((*backend._cross, *backend._own), before, strict=True):
        np.testing.assert_array_equal(np.delete(cache, 3, axis=0), np.delete(old, 3, axis=0))
        np.testing.assert_array_equal(cache[3], cache[8])


def test_encoding_a_segment_does_not_depend_on_the_others(backend):
    features = np.random.default_rng(1).normal(-5, 3, (5, 256, 512)).astype(np.float32)
    together = backend.encode(features)
    assert together.shape == (5, 1, TINY_FEATURES.segment_frames, TINY_MODEL.d_model)
    features[3] = np.nan
    poisoned = backend.encode(features)
    assert np.isnan(poisoned[3]).any()
    for index in (0, 1, 2, 4):
        np.testing.assert_allclose(poisoned[index], together[index], atol=1e-5)
        np.testing.assert_allclose(backend.encode(features[index : index + 1])[0], together[index], atol=1e-5)


# ---- options --------------------------------------------------------------------------------------------


def test_a_short_cache_decodes_the_same_tokens(tiny_bundle, states, wanted):
    short = OrtBackend(tiny_bundle, slots=4, length=20, threads=1)
    assert {cache.shape[2] for cache in short._own} == {20}
    decoded = decode(short, states, DecodingRules(0, None, 20))
    assert [decoded[key] for key in range(ROWS)] == [tokens[:20] for tokens in wanted]
    with pytest.raises(OptionError, match="21 tokens a row do not fit a cache of 20"):
        decode(short, states, DecodingRules(0, None, 21))


def test_the_whole_cache_can_be_used(backend, states):
    assert backend.length == TINY_MODEL.max_length
    decoded = decode(backend, states[:2], DecodingRules(0, None, TINY_MODEL.max_length))
    assert [len(tokens) for tokens in decoded.values()] == [TINY_MODEL.max_length] * 2
    for cache in backend._own:
        assert cache[:2, :, -1].any(axis=(1, 2)).all()


@pytest.mark.parametrize("sizes", [{"slots": 0}, {"slots": -1}, {"length": 0}, {"length": -5}, {"length": 97}])
def test_sizes_that_hold_no_row_or_that_the_model_has_no_positions_for_are_refused(tiny_bundle, sizes):
    with pytest.raises(OptionError, match="give 1 or more slots, and 1 to 96 tokens"):
        OrtBackend(tiny_bundle, **{"slots": 2, **sizes})


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_tokens(tiny_bundle, states, wanted, threads):
    backend = OrtBackend(tiny_bundle, slots=4, threads=threads)
    assert backend.threads == threads
    decoded = decode(backend, states)
    assert [decoded[key] for key in range(ROWS)] == wanted


def test_the_backend_says_what_it_is(backend):
    assert (backend.device, backend.provider, backend.precision) == ("cpu", "CPUExecutionProvider", "fp32")
    for session in backend._sessions.values():
        assert session.get_providers() == ["CPUExecutionProvider"]


def test_a_precision_that_the_bundle_lacks_is_named(tiny_bundle):
    made = "make it with mt3-export quantize --precision int8"
    with pytest.raises(BundleError, match=rf"no encoder graph as ort/int8, only ort/fp32, tensorrt/fp32: {made}$"):
        OrtBackend(tiny_bundle, slots=1, precision="int8")


def test_without_onnxruntime_the_fix_is_named(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError) as caught:
        load(tiny_folder)
    assert str(caught.value).endswith("pip install 'mt3-runtime[cpu]'")
    assert "\n" not in str(caught.value)


# ---- graphs that are not what they should be --------------------------------------------------------------


def refusal(folder, copy, file, data):
    """Replace one file of a bundle, list it as if it belonged there, and return why it is refused."""
    shutil.copytree(folder, copy)
    bundle = open_bundle(forge(copy, {file: data}))
    with pytest.raises(BundleError) as caught:
        OrtBackend(bundle, slots=1)
    message = str(caught.value)
    assert "\n" not in message
    assert str(copy) in message
    assert message.endswith("export again")
    return message


@pytest.mark.parametrize("data", [b"", b"\x00", b"not a graph", bytes(range(256)) * 40])
def test_a_file_that_is_no_graph_is_refused(tiny_folder, tmp_path, data):
    message = refusal(tiny_folder, tmp_path / "copy", "cross_kv.fp32.ort.onnx", data)
    assert message.startswith(("ONNX Runtime cannot load cross_kv.fp32.ort.onnx", "cross_kv.fp32.ort.onnx of"))


def test_a_graph_that_was_cut_off_is_refused(tiny_folder, tmp_path):
    data = (tiny_folder / "decode_step.fp32.ort.onnx").read_bytes()
    message = refusal(tiny_folder, tmp_path / "copy", "decode_step.fp32.ort.onnx", data[: len(data) // 2])
    assert "cannot load decode_step.fp32.ort.onnx" in message


def test_an_operator_that_onnx_runtime_does_not_know_is_refused(tiny_folder, tmp_path):
    data = (tiny_folder / "encoder.fp32.ort.onnx").read_bytes()
    assert b"FastGelu" in data
    message = refusal(tiny_folder, tmp_path / "copy", "encoder.fp32.ort.onnx", data.replace(b"FastGelu", b"SlowGelu"))
    assert "SlowGelu" in message


def test_weights_that_are_too_short_are_refused(tiny_folder, tmp_path):
    data = (tiny_folder / "weights.fp32.bin").read_bytes()
    message = refusal(tiny_folder, tmp_path / "copy", "weights.fp32.bin", data[:-4096])
    assert "cannot load" in message


def test_a_graph_in_the_place_of_another_is_refused(tiny_folder, tmp_path):
    data = (tiny_folder / "cross_kv.fp32.ort.onnx").read_bytes()
    message = refusal(tiny_folder, tmp_path / "copy", "encoder.fp32.ort.onnx", data)
    assert "encoder.fp32.ort.onnx" in message
    assert "is not the encoder graph" in message


# ---- memory and the process around it -------------------------------------------------------------------


GROWTH = """
import sys
import numpy as np
import psutil
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import open_bundle

def grown(slots):
    before = psutil.Process().memory_info().rss
    backend = OrtBackend(bundle, slots=slots, threads=1)
    backend.admit(0, states)
    backend.step(np.zeros(3, np.int32), np.zeros(3, np.int32))
    kept.append(backend)  # what is freed would be given to the next
    caches = sum(cache.nbytes for cache in (*backend._own, *backend._cross))
    return psutil.Process().memory_info().rss - before, caches

bundle, kept = open_bundle(sys.argv[1]), []
features, model = bundle.manifest.features, bundle.manifest.model
states = np.ones((3, features.segment_frames, model.d_model), np.float32)
grown(3)  # what the first session of a process loads
lazy, size = grown(1100)
zeros, np.zeros = np.zeros, lambda shape, dtype=float: np.full(shape, 0, dtype)
eager, _ = grown(1100)  # the planted fault: caches that are written when they are made
print(size, lazy, eager)
"""


def test_caches_cost_memory_only_where_rows_stand(tiny_folder):
    """In a process of its own: what other tests freed would be handed out again, written."""
    run = subprocess.run([sys.executable, "-c", GROWTH, str(tiny_folder)], capture_output=True, text=True, check=True)
    size, lazy, eager = map(int, run.stdout.split())
    assert size > 190e6
    assert lazy < 30e6
    assert eager > 0.95 * size


def test_bound_buffers_stay_where_they_are(backend, states, wanted):
    """Whatever a step lets go of is freed, overwritten and collected before the next."""
    plain, litter = backend.step, []
    gc.freeze()  # a collection then looks at what this test makes, not at all of torch

    def step(tokens, positions):
        found, log_probs = (array.copy() for array in plain(tokens, positions))
        gc.collect()
        litter.append([np.full(size, np.nan, np.float32) for size in (1, 9, 9 * 2 * 96 * 16, 9 * 2 * 256 * 16)])
        del litter[:-2]
        return found, log_probs

    backend.step = step
    decoded = decode(backend, states)
    gc.unfreeze()
    assert [decoded[key] for key in range(ROWS)] == wanted


LEAK = """
import gc
import sys
import numpy as np
import psutil
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import open_bundle

def use():
    backend = OrtBackend(bundle, slots=100, threads=1)
    backend.admit(0, states)
    backend.step(np.zeros(100, np.int32), np.zeros(100, np.int32))
    if sys.argv[2] == "leak":
        kept.append(backend)

bundle, kept = open_bundle(sys.argv[1]), []
features, model = bundle.manifest.features, bundle.manifest.model
states = np.ones((100, features.segment_frames, model.d_model), np.float32)
for times in (2, 8):  # of 13 MB of cross-attention cache each
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(times):
        use()
gc.collect()
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.parametrize("leak", [False, True], ids=["let go", "planted leak"])
def test_a_backend_that_is_let_go_gives_its_memory_back(tiny_folder, leak):
    arguments = [sys.executable, "-c", LEAK, str(tiny_folder), "leak" if leak else "let go"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert (int(run.stdout) < 40e6) != leak


def test_loading_leaves_the_callers_arithmetic_as_it_was(tiny_folder):
    """ONNX Runtime turns denormal numbers off for good in the thread that makes a process's first session."""
    code = (
        "import sys, numpy, mt3_runtime\n"
        "mt3_runtime.load(sys.argv[1], threads=1).transcribe(numpy.ones(20_000, numpy.float32), 16_000)\n"
        "assert float('1e-310') / 10 == 1e-311 > 0\n"
        "assert numpy.float32(1e-38) * numpy.float32(0.1) > 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tiny_folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
