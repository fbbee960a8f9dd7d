"""The backend on ONNX Runtime with models that are told of the segment before: slots, caches and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conftest import TINY_FEATURES, TINY_MODEL
from decoding_cases import follow
from memory_cases import CONTEXT, END, SPAN, TIE
from mt3_runtime.backends.ort import OrtBackend, without_fill
from mt3_runtime.decoding import DecodingRules, Row, decode_rows
from mt3_runtime.errors import OptionError
from mt3_runtime.loading import load, warm_up

ROWS, STEPS, LENGTH = 5, 16, CONTEXT.length
RULES = DecodingRules(start_token=0, end_token=None, max_tokens=STEPS)


@pytest.fixture(scope="module")
def states():
    shape = (ROWS, TINY_FEATURES.segment_frames, TINY_MODEL.d_model)
    return np.random.default_rng(31).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def told():
    """What a first segment is told, 3 tokens, 40, 500, and as many as there is room for: [rows, span]."""
    generator, ids = np.random.default_rng(32), np.zeros((ROWS, SPAN), np.int32)
    for row, count in zip(ids, (0, 3, 40, 500, SPAN), strict=True):
        row[:count] = generator.integers(2, TINY_MODEL.vocab_size, count)
    ids[0, :2] = TIE, END
    return ids


@pytest.fixture(params=["context", "prefix"])
def bundle(request):
    return request.getfixturevalue(f"{request.param}_bundle")


@pytest.fixture
def backend(bundle):
    return OrtBackend(bundle, slots=ROWS, threads=1)


@pytest.fixture
def wanted(bundle, states, told):
    """Tokens and log-probabilities of every row, decoded alone."""
    backend, found = OrtBackend(bundle, slots=1, threads=1), []
    for row in range(ROWS):
        backend.admit(0, states[[row]], told[[row]])
        found.append(follow(backend, STEPS, 1))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("groups", [[5], [1] * 5, [2, 3]])
def test_rows_that_are_told_much_and_little_stand_side_by_side(backend, states, told, wanted, groups):
    assert len({tuple(tokens) for tokens in wanted[0].tolist()}) == ROWS
    first = 0
    for size in groups:
        backend.admit(first, states[first : first + size], told[first : first + size])
        first += size
    tokens, log_probs = follow(backend, STEPS, ROWS)
    assert tokens.tolist() == wanted[0].tolist()
    np.testing.assert_allclose(log_probs, wanted[1], atol=1e-5)


def test_what_a_row_is_told_reaches_no_other(backend, bundle, states, told):
    other = OrtBackend(bundle, slots=ROWS, threads=1)
    changed = told.copy()
    changed[2] = told[4]
    backend.admit(0, states, told)
    other.admit(0, states, changed)
    differs = False
    for cache, same in zip((*backend._cross, *backend._own), (*other._cross, *other._own), strict=True):
        np.testing.assert_array_equal(np.delete(cache, 2, axis=0), np.delete(same, 2, axis=0))
        differs |= bool((cache[2] != same[2]).any())
    assert differs


def test_admitting_a_row_touches_its_slot_only(backend, bundle, states, told):
    for cache in (*backend._cross, *backend._own):
        cache.fill(7)
    backend.admit(2, states[:2], told[:2])
    first = bundle.manifest.model.prefix_length
    for cache in backend._cross:
        assert cache.shape[2] == TINY_FEATURES.segment_frames + bundle.manifest.model.extra_context
        assert (cache[[0, 1, 4]] == 7).all()
        assert (cache[2:4] != 7).all()
    for cache in backend._own:
        assert (cache[[0, 1, 4]] == 7).all()
        assert (cache[2:4, :, :first] != 7).all()
        assert (cache[:, :, first:] == 7).all()


@pytest.mark.parametrize(("source", "target"), [(4, 0), (1, 3)])
def test_a_moved_row_goes_on_where_it_was(backend, states, told, wanted, source, target):
    backend.admit(0, states, told)
    done = follow(backend, 6, ROWS)[0]
    for cache in (*backend._cross, *backend._own):
        cache[target] = np.nan
    backend.move(source, target, 6)
    token, found = done[source, -1], []
    for position in range(6, STEPS):
        tokens, positions = np.zeros((2, target + 1), np.int32)
        tokens[target], positions[target] = token, position
        token = int(backend.step(tokens, positions)[0][target])
        found.append(token)
    assert found == wanted[0][source, 6:].tolist()


def test_rows_in_a_queue(bundle, states, told, wanted):
    """Two slots: rows end at different steps, their places are taken, and the last row is moved."""
    limits = [STEPS, 3, 7, STEPS, 5]
    rows = (Row(key, states[key], limits[key], told[key]) for key in range(ROWS))
    found = {row.key: row for row in decode_rows(OrtBackend(bundle, slots=2, threads=1), rows, RULES)}
    for key, limit in enumerate(limits):
        assert found[key].tokens.tolist() == wanted[0][key, :limit].tolist()


def test_room_is_counted_in_tokens(bundle, states, told, wanted):
    first = bundle.manifest.model.prefix_length
    short = OrtBackend(bundle, slots=ROWS, length=STEPS, threads=1)
    assert {cache.shape[2] for cache in short._own} == {first + STEPS}
    short.admit(0, states, told)
    assert follow(short, STEPS, ROWS)[0].tolist() == wanted[0].tolist()


def test_all_of_the_room_can_be_used(bundle, states, told):
    backend = OrtBackend(bundle, slots=2, threads=1)
    assert backend.length == TINY_MODEL.max_length
    backend.admit(0, states[:2], told[:2])
    log_probs = follow(backend, TINY_MODEL.max_length, 2)[1]
    assert np.isfinite(log_probs).all()
    for cache in backend._own:
        assert cache[:, :, -1].any(axis=(1, 2)).all()


@pytest.mark.parametrize("shape", [None, (1, SPAN), (2, SPAN - 1), (2, SPAN, 1), (3, SPAN)])
def test_a_memory_that_is_not_the_models_is_refused(backend, states, shape):
    memory = None if shape is None else np.zeros(shape, np.int32)
    with pytest.raises(OptionError, match=r"2 rows came with a memory .*: give them one of shape \(2, 1024\)"):
        backend.admit(0, states[:2], memory)


def test_a_model_without_memory_is_told_nothing(tiny_bundle, states, told):
    backend = OrtBackend(tiny_bundle, slots=2, threads=1)
    with pytest.raises(OptionError, match=r"2 rows came with a memory of shape \(2, 1024\): give them none"):
        backend.admit(0, states[:2], told[:2])


@pytest.mark.parametrize(
    ("written", "length", "kept"),
    [
        (0, 32, 32),
        (2, 32, 32),
        (2, 33, 48),
        (32, 32, 32),
        (33, 32, 48),
        (500, 32, 512),
        (1009, 64, 1024),
        (1024, 64, 1024),
    ],
)
def test_fill_at_the_end_is_left_out(written, length, kept):
    """In steps of 16, but for what the graph must be given."""
    ids = np.zeros(SPAN, np.int32)
    ids[:written] = 5
    ids[: max(written - 1, 0) : 3] = 0  # fill among the tokens stays
    np.testing.assert_array_equal(without_fill(ids, replace(CONTEXT, length=length)), ids[:kept])


def test_no_more_than_the_span_is_read():
    ids = np.full(40, 5, np.int32)
    np.testing.assert_array_equal(without_fill(ids, replace(CONTEXT, span=40)), ids)


def test_a_model_is_warmed_up(bundle):
    transcriber = load(bundle.path, slots=1, threads=1)
    warm_up(transcriber)
    for cache in (*transcriber.backend._cross, *transcriber.backend._own):
        assert cache[0].any()
