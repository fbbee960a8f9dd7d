"""What a row decodes never depends on slots, order or neighbours; shown on a real network.

The network is compared with a decoder in float64 that has no cache: it reads the whole prefix again at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from conftest import TINY_FEATURES, TINY_MODEL
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.decoding import DecodingRules, Row, decode_rows

LIMIT = 40
NAN = math.nan


class SlowDecoder:
    """The decoder over all tokens so far, in float64, from the weights as the checkpoint names them."""

    def __init__(self, model, tensors):
        self.model, self.weights = model, {name: tensor.double() for name, tensor in tensors.items()}
        frequencies = 10000.0 ** (-torch.arange(model.d_model // 2).double() / (model.d_model // 2 - 1))
        angles = torch.arange(model.max_length).double()[:, None] * frequencies
        self.positions = torch.cat([torch.sin(angles), torch.cos(angles)], 1)

    def logits(self, tokens, states):
        """tokens [rows, length], states [rows, frames, d_model] -> logits of the next token [rows, vocab]."""
        length = tokens.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        stream = self.weights["decoder_embed_tokens.weight"][tokens] + self.positions[:length]
        for layer in range(self.model.decoder_layers):
            block = f"decoder.block.{layer}.layer"
            normed = self.norm(f"{block}.0", stream)
            stream = stream + self.attend(f"{block}.0.SelfAttention", normed, normed, later)
            normed = self.norm(f"{block}.1", stream)
            stream = stream + self.attend(f"{block}.1.EncDecAttention", normed, states, None)
            stream = stream + self.feed_forward(f"{block}.2", self.norm(f"{block}.2", stream))
        scale = self.weights["decoder.final_layer_norm.weight"]
        return self.linear("lm_head", self.unit(stream[:, -1]) * scale)

    def linear(self, name, x):
        return torch.einsum("...i,oi->...o", x, self.weights[f"{name}.weight"])

    def norm(self, name, x):
        return self.unit(x) * self.weights[f"{name}.layer_norm.weight"]

    @staticmethod
    def unit(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def attend(self, name, x, memory, hidden):
        split = (self.model.num_heads, self.model.d_kv)
        sources = {"q": x, "k": memory, "v": memory}
        q, k, v = (self.linear(f"{name}.{part}", source).unflatten(-1, split) for part, source in sources.items())
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k)
        if hidden is not None:
            scores = torch.where(hidden, -math.inf, scores)
        mixed = torch.einsum("nhqk,nkhd->nqhd", torch.softmax(scores, -1), v)
        return self.linear(f"{name}.o", mixed.flatten(-2))

    def feed_forward(self, name, x):
        gate, value = (self.linear(f"{name}.DenseReluDense.{part}", x) for part in ("wi_0", "wi_1"))
        curve = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        return self.linear(f"{name}.DenseReluDense.wo", curve * value)

    @torch.inference_mode()
    def decode(self, states, length):
        """Greedy tokens and log-probabilities [rows, length], and the narrowest choice that was made."""
        tokens, scores, margin = torch.zeros(len(states), 1, dtype=torch.long), [], math.inf
        for _ in range(length):
            logits = self.logits(tokens, torch.from_numpy(states).double())
            best = logits.topk(2).values
            margin = min(margin, float((best[:, 0] - best[:, 1]).min()))
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
            scores.append(torch.log_softmax(logits, -1).amax(-1))
        return tokens[:, 1:].numpy(), torch.stack(scores, 1).numpy(), margin


@dataclass(frozen=True)
class Network:
    """Encoder states of some rows, and what they decode to by the slow decoder."""

    states: np.ndarray  # [rows, frames, d_model]
    tokens: np.ndarray  # [rows, LIMIT]
    log_probs: np.ndarray  # [rows, LIMIT]
    end: int

    @property
    def rules(self):
        return DecodingRules(start_token=0, end_token=self.end, max_tokens=LIMIT)

    def rows(self, keys):
        return [Row(key, self.states[key]) for key in keys]

    def check(self, row, key=None):
        """Compare one decoded row with the slow decoder's."""
        key = row.key if key is None else key
        tokens = self.tokens[key].tolist()
        length = tokens.index(self.end) if self.end in tokens else LIMIT
        assert row.tokens.tolist() == tokens[:length], row.key
        assert row.status == ("ended" if length < LIMIT else "truncated")
        np.testing.assert_allclose(row.log_probs, self.log_probs[key, :length], atol=1e-4)


@pytest.fixture(scope="module")
def network(tiny_checkpoint):
    shape = (12, TINY_FEATURES.segment_frames, TINY_MODEL.d_model)
    states = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    tokens, log_probs, margin = SlowDecoder(TINY_MODEL, tiny_checkpoint.tensors).decode(states, LIMIT)
    assert margin > 1e-4  # the choices are not a matter of rounding
    # As the end serves whatever token ends the rows at the most different places, some of them never.
    firsts = {end: {row.index(end) for row in tokens.tolist() if end in row} for end in np.unique(tokens).tolist()}
    end = max((end for end in firsts if not (tokens == end).any(1).all()), key=lambda end: len(firsts[end]))
    assert len(firsts[end]) >= 4
    return Network(states, tokens, log_probs, end)


@pytest.fixture(scope="module")
def backends(tiny_bundle):
    return {slots: OrtBackend(tiny_bundle, slots=slots, threads=1) for slots in range(1, 10)}


@pytest.mark.parametrize("slots", range(1, 10))
def test_random_schedules_on_the_network(network, backends, slots):
    rng = np.random.default_rng(slots)
    for _ in range(6):
        order = rng.permutation(len(network.states))[: rng.integers(1, 13)].tolist()
        decoded = list(decode_rows(backends[slots], network.rows(order), network.rules))
        assert sorted(row.key for row in decoded) == sorted(order)
        for row in decoded:
            network.check(row)


FILES, SEGMENTS, CHANNELS = 3, 2, 4


@pytest.mark.parametrize("slots", [1, 3, 5, 9])
def test_files_segments_and_channels_share_the_slots(network, backends, slots):
    """What a row decodes is the same whichever files and channels are beside it, and however rows are queued."""
    keys = [
        (file, segment, channel) for file in range(FILES) for segment in range(SEGMENTS) for channel in range(CHANNELS)
    ]
    index = {key: (5 * number) % len(network.states) for number, key in enumerate(keys)}
    rng, alone = np.random.default_rng(slots), {}
    for row in decode_rows(backends[1], network.rows(range(len(network.states))), network.rules):
        alone[row.key] = row
    for order in (keys, keys[::-1], [keys[number] for number in rng.permutation(len(keys))]):
        decoded = list(decode_rows(backends[slots], [Row(k, network.states[index[k]]) for k in order], network.rules))
        assert sorted(row.key for row in decoded) == keys
        for row in decoded:
            network.check(row, index[row.key])
            np.testing.assert_allclose(row.log_probs, alone[index[row.key]].log_probs, atol=1e-5)


def test_an_end_in_the_first_place_on_the_network(network, backends):
    """Each row may start with what serves as the end, and decodes on as the slow decoder does."""
    first = network.tokens[:, 0].tolist()
    rules = DecodingRules(0, first[0], LIMIT, first_may_end=False)
    for row in decode_rows(backends[4], network.rows(range(12)), rules):
        tokens = network.tokens[row.key].tolist()
        length = tokens.index(first[0], 1) if first[0] in tokens[1:] else LIMIT
        assert row.tokens.tolist() == tokens[:length]
    assert any(
        len(row.tokens) == 0 for row in decode_rows(backends[4], network.rows([0]), DecodingRules(0, first[0], LIMIT))
    )


def test_rows_of_one_length_on_the_network(network, backends):
    rules = DecodingRules(0, None, LIMIT)
    for row in decode_rows(backends[5], network.rows(range(12)), rules):
        assert row.tokens.tolist() == network.tokens[row.key].tolist()
        assert row.status == "truncated"


@pytest.mark.parametrize("place", range(8))
def test_a_poisoned_row_of_eight_harms_no_other(network, backends, place):
    rows = network.rows(range(8))
    bad = rows[place].states.copy()
    bad[place * 30, 3] = NAN
    rows[place] = Row(place, bad)
    decoded = {row.key: row for row in decode_rows(backends[8], rows, network.rules)}
    failed = decoded.pop(place)
    assert (failed.status, failed.tokens.tolist()) == ("failed", [])
    assert len(decoded) == 7
    for row in decoded.values():
        network.check(row)


@pytest.mark.parametrize("slots", [1, 3])
def test_the_slot_of_a_failed_row_serves_the_next(network, backends, slots):
    """A failed row leaves NaN in every cache of its slot."""
    bad = [Row(100 + key, np.full_like(network.states[0], NAN)) for key in range(slots)]
    assert [row.status for row in decode_rows(backends[slots], bad, network.rules)] == ["failed"] * slots
    assert np.isnan(backends[slots]._own[-1]).any(axis=(1, 2, 3)).all()
    assert np.isnan(backends[slots]._cross[0]).any(axis=(1, 2, 3)).all()
    decoded = list(decode_rows(backends[slots], bad + network.rows(range(12)), network.rules))
    assert [row.status for row in decoded[:slots]] == ["failed"] * slots
    assert len(decoded) == slots + 12
    for row in decoded[slots:]:
        network.check(row)


class Slipping:
    """A real backend whose row in slot 1 meets numbers that are not finite, once or ever again."""

    def __init__(self, backend, step, times):
        self.backend, self.at, self.times = backend, step, times
        self.slots, self.length, self.admit, self.move = backend.slots, backend.length, backend.admit, backend.move
        self.device, self.provider, self.precision, self.threads = "cpu", "slipping", "fp32", 1

    def step(self, tokens, positions):
        next_tokens, log_probs = self.backend.step(tokens, positions)
        slot = min(1, len(positions) - 1)  # where all others ended in the same step, it goes on in slot 0
        if self.times and positions[slot] == self.at:
            self.times -= 1
            for cache in self.backend._own:
                cache[slot, :, self.at] = NAN
            log_probs[slot] = NAN
        return next_tokens, log_probs


@pytest.mark.parametrize("step", [0, 1, 17, LIMIT - 1])
@pytest.mark.parametrize("times", [1, 2])
def test_a_row_of_the_network_starts_again_from_the_start(network, backends, step, times):
    rules = DecodingRules(0, None, LIMIT)  # all rows stay in their slots to the last step
    decoded = list(decode_rows(Slipping(backends[4], step, times), network.rows(range(4)), rules))
    for row in decoded:
        length, status = (step, "failed") if row.key == 1 and times == 2 else (LIMIT, "truncated")
        assert row.status == status
        assert row.tokens.tolist() == network.tokens[row.key, :length].tolist()


@pytest.mark.parametrize("value", [NAN, math.inf, 1e30])
def test_what_stands_in_the_caches_before_is_never_read(network, backends, value):
    backend = backends[7]
    for cache in (*backend._own, *backend._cross):
        cache.fill(value)
    for row in decode_rows(backend, network.rows(range(12)), network.rules):
        network.check(row)


def test_a_cache_that_spoils_after_it_was_written_is_noticed(network, tiny_bundle):
    """The planted fault of the tests above: what a row has written is read again, and NaN in it comes out."""
    backend = OrtBackend(tiny_bundle, slots=4, threads=1)

    def spoil(tokens, positions, plain=backend.step):
        if positions.max() == 9:
            backend._own[0][:, :, 4] = NAN
        return plain(tokens, positions)

    backend.step = spoil
    rules = DecodingRules(0, None, LIMIT)
    decoded = list(decode_rows(backend, network.rows(range(4)), rules))
    assert [(row.status, row.tokens.tolist()) for row in sorted(decoded, key=lambda row: row.key)] == [
        ("failed", network.tokens[key, :9].tolist()) for key in range(4)
    ]
