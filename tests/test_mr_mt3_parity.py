"""MR-MT3 segment by segment: the graphs on their backend beside the authors' way of decoding, in float64.

The reference keeps nothing from one token to the next, and makes a memory of all 1024 tokens. It is written from the
authors' `generate` (gudgud96/MR-MT3 `models/t5_segmem.py`, `t5_segmem_v2.py`, `t5_segmem_v2_with_prev.py`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from conftest import TINY_FEATURES, TINY_MODEL
from graph_cases import LAYERS, Decoder, engine, one_thread, relative_error
from memory_cases import (
    CONTEXT,
    DESIGNS,
    END,
    GOLDEN,
    GOLDEN_LENGTHS,
    PREFIX_MEMORY,
    SOME_END,
    Song,
    decode_on,
    decode_slowly,
    export_with,
    golden_checkpoint,
    log_mel_song,
    memory_checkpoint,
    sources,
    tell_last,
    told_after,
)
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import open_bundle
from t5_numpy import NumpyT5

if TYPE_CHECKING:
    from mt3_export.checkpoint import Checkpoint
    from mt3_runtime.bundle import Bundle

SEGMENTS = 6
CLEAR_GAP = 1e-4  # between the best two logits, of size 1 and off by a millionth of that
LIMIT = 2e-6
LOG = logging.getLogger("parity")
LOG.setLevel(logging.INFO)  # pytest -rP shows the figures
GRAPHS = ("encoder", "memory", "cross_kv", "prefix", "decode_step")
MEMORIES = {
    "mr-mt3, 0": None,
    "mr-mt3, 32": CONTEXT,
    "mr-mt3, 64": replace(CONTEXT, length=64),
    "mr-mt3-v2, 32": replace(CONTEXT, first_tokens=(END,)),
    "mr-mt3-v1, 32": PREFIX_MEMORY,
}


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A network on both sides, and the encoder states of one song [segments, frames, d_model]."""

    checkpoint: Checkpoint
    network: NumpyT5
    bundle: Bundle
    backend: OrtBackend
    states: np.ndarray

    def slowly(self, limit: int) -> Song:
        return decode_slowly(self.network, self.states, limit)

    def on_the_backend(self, limit: int) -> list[list[int]]:
        return decode_on(self.backend, self.checkpoint.model.memory, self.states, limit)


@pytest.fixture(scope="session")
def folders(tiny_folder, context_folder, prefix_folder, tmp_path_factory):
    """A bundle for each kind of memory, whatever weights and first tokens."""
    longer = memory_checkpoint(TINY_MODEL, MEMORIES["mr-mt3, 64"])
    folder = tmp_path_factory.mktemp("bundles") / "context64"
    longer_folder = export_with(longer, folder, {"encoder": tiny_folder}, ["ort"])
    return {
        None: tiny_folder,
        ("context", 32): context_folder,
        ("context", 64): longer_folder,
        ("prefix", 32): prefix_folder,
    }


@pytest.fixture(scope="session")
def song(tiny_checkpoint):
    """Log-mel-like frames of six segments, and what the encoder makes of them."""
    noise = np.random.default_rng(21).normal(size=(SEGMENTS, TINY_FEATURES.segment_frames, TINY_FEATURES.bins))
    features = (np.cumsum(noise, axis=1) / 4 - 4).astype(np.float32)
    network = NumpyT5(TINY_MODEL, tiny_checkpoint.tensors)
    return features, np.stack([network.encode(segment) for segment in features])


def with_weights_of(checkpoint, folders, parent, traced=()):
    memory = checkpoint.model.memory
    stored = dict.fromkeys(GRAPHS, folders[memory and (memory.injection, memory.length)])
    stored = {name: folder for name, folder in stored.items() if name not in traced}
    return open_bundle(export_with(checkpoint, parent / f"{len(list(parent.iterdir()))}", stored, ["ort"]))


@pytest.fixture
def case(folders, song, tmp_path):
    def build(memory, end_row=1.0, traced=()):
        checkpoint = memory_checkpoint(TINY_MODEL, memory, end_row)
        bundle = with_weights_of(checkpoint, folders, tmp_path, traced)
        backend = OrtBackend(bundle, slots=1, threads=1)
        return Case(checkpoint, NumpyT5(checkpoint.model, checkpoint.tensors), bundle, backend, song[1])

    return build


@pytest.mark.parametrize(
    ("name", "limit", "end_row"),
    [
        ("mr-mt3, 0", 12, 1.0),
        ("mr-mt3, 0", 30, SOME_END),
        ("mr-mt3, 32", 12, 1.0),
        ("mr-mt3, 32", 30, SOME_END),
        ("mr-mt3, 64", 5, 1.0),
        ("mr-mt3, 64", 30, SOME_END),
        ("mr-mt3-v2, 32", 30, SOME_END),
        ("mr-mt3-v1, 32", 12, 1.0),
        ("mr-mt3-v1, 32", 30, SOME_END),
    ],
)
def test_tokens_of_segments_in_a_chain(case, name, limit, end_row):
    both = case(MEMORIES[name], end_row)
    wanted = both.slowly(limit)
    lengths = [len(tokens) for tokens in wanted.tokens]
    LOG.info("parity: %s, at most %d tokens: %s, smallest gap %.1e", name, limit, lengths, wanted.gap)
    assert wanted.gap > CLEAR_GAP
    assert both.on_the_backend(limit) == wanted.tokens
    assert {tokens[-1] == END for tokens in wanted.tokens} == ({True, False} if end_row == SOME_END else {False})


def test_a_segment_that_never_ends_is_cropped(case):
    """Start token and 96 tokens are one more than the 96 that the next segment is told of."""
    memory = replace(PREFIX_MEMORY, span=TINY_MODEL.max_length)
    both = case(memory, traced=["memory"])
    both = replace(both, states=both.states[4:])
    wanted = both.slowly(memory.span)
    assert wanted.gap > CLEAR_GAP
    assert [len(tokens) for tokens in wanted.tokens] == [memory.span] * 2
    assert len(told_after(memory, wanted.tokens[0])) == memory.span
    assert both.on_the_backend(memory.span) == wanted.tokens


FAULTS = {
    "without the start token": lambda memory, song: told_after(memory, song[-1] if song else None)[bool(song) :],
    "without the end token": lambda memory, song: np.where(tell_last(memory, song) == END, 0, tell_last(memory, song)),
    "of the segment before": lambda memory, song: told_after(memory, song[-2] if len(song) > 1 else None),
    "of nothing": lambda memory, song: np.zeros(memory.span, np.int32),
    "as with T5SegMemV2WithPrev": lambda memory, song: tell_last(CONTEXT, song),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_segment_that_is_told_something_else_is_noticed(case, fault):
    both = case(PREFIX_MEMORY, SOME_END)  # tokens of the others hang less on their memory

    def tell(memory, song):
        told = FAULTS[fault](memory, song)
        return np.pad(told, (0, memory.span - len(told))).astype(np.int32)

    wanted = both.on_the_backend(30)
    assert decode_on(both.backend, PREFIX_MEMORY, both.states, 30) == wanted
    assert decode_on(both.backend, PREFIX_MEMORY, both.states, 30, tell) != wanted


@pytest.mark.parametrize("name", DESIGNS)
def test_the_authors_network_says_the_same(folders, tmp_path, name):
    """What their own code made of these weights and frames, recorded by `oracle/make_mr_mt3_goldens.py`."""
    with np.load(GOLDEN, allow_pickle=False) as file:
        golden = {key.removeprefix(f"{name}."): file[key] for key in file.files if key.startswith(f"{name}.")}
    checkpoint = golden_checkpoint(TINY_MODEL, name, golden["row"])
    bundle, memory = with_weights_of(checkpoint, folders, tmp_path), DESIGNS[name]
    backend = OrtBackend(bundle, slots=1, threads=1)
    found = decode_on(backend, memory, backend.encode(log_mel_song(len(GOLDEN_LENGTHS)))[:, 0], TINY_MODEL.max_length)
    assert tuple(len(tokens) for tokens in found) == GOLDEN_LENGTHS
    told = np.stack([tell_last(memory, found[:segment]) for segment in range(len(found) + 1)])
    assert told[1:, : golden["tokens"].shape[1]].tolist() == golden["tokens"].tolist()
    vectors = engine(bundle, "memory", "ort")(told[:-1, :48])[0]
    for array, exact in zip(vectors[:, ::8], golden["memory"], strict=True):
        assert relative_error(array, exact) < LIMIT


@pytest.mark.parametrize("name", MEMORIES)
def test_numbers(case, song, name):
    """Every graph beside the reference, for two segments that are told different things."""
    both = case(MEMORIES[name])
    memory, network, bundle = both.checkpoint.model.memory, both.network, both.bundle
    graphs = {spec.name: engine(bundle, spec.name, "ort") for spec in bundle.manifest.contracts}
    tokens = np.random.default_rng(22).integers(2, TINY_MODEL.vocab_size, (2, 10))
    told = np.stack([told_after(memory, None), told_after(memory, tokens[0])]) if memory else [None, None]
    parts = [sources(network, state, ids) for state, ids in zip(both.states[:2], told, strict=True)]
    figures = {}
    states = graphs["encoder"](song[0][:2])[0][:, 0]
    figures["states"] = relative_error(states, both.states[:2])
    given, first = [states], both.checkpoint.model.prefix_length
    if memory:
        vectors = graphs["memory"](told[:, :48] if memory.length < 48 else told[:, :80])[0]
        exact = np.stack([network.remember(ids.tolist())[: memory.length] for ids in told])
        figures["memory"] = relative_error(vectors, exact)
        given += [] if first else [vectors]
    cross = graphs["cross_kv"](*given)
    exact = [np.stack([network.cross(part[0], i, n) for part in parts]) for n in "kv" for i in range(LAYERS)]
    figures["cross-attention"] = max(relative_error(*pair) for pair in zip(cross, exact, strict=True))
    decoder = Decoder(graphs["decode_step"], cross, length=first + 10, fill=1e4)
    for cache, array in zip(decoder.cache, graphs["prefix"](vectors, *cross) if first else [], strict=False):
        cache[:, :, :first] = array
    logits = np.stack([decoder.step(tokens[:, i], [first + i] * 2)[2] for i in range(10)], axis=1)
    exact = np.stack([network.decode(row, *part) for row, part in zip(tokens, parts, strict=True)])
    figures["logits"] = relative_error(logits, exact)
    LOG.info("parity: %s: %s", name, ", ".join(f"{what} {error:.1e}" for what, error in figures.items()))
    assert max(figures.values()) < LIMIT
