"""A network of whole numbers for fake GPUs: every token depends on all that its row has read, and on where it stands.

Its graphs work on arrays as a device holds them, in any precision; `expected` computes the same from the definition,
row by row, without caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from memory_cases import END
from mt3_runtime.graphs import graph_specs
from mt3_runtime.specs import FeatureSpec, MemorySpec, ModelSpec, VocabularySpec

HEADS, WIDTH, LAYERS, D_MODEL, VOCAB, LENGTH = 2, 16, 2, 32, 596, 40
# odd sizes: rows of states, of a memory and of caches do not end where TensorRT lets another tensor begin
FRAMES, CHANNELS, REMEMBERED, SPAN = 17, 3, 3, 64
CONTEXT = MemorySpec("context", REMEMBERED, SPAN, 0, (END,))
PREFIX = MemorySpec("prefix", REMEMBERED, SPAN, 0, (END,))


def small_manifest(manifest, memory=None):
    """Of a network with three channels, or with one and a memory."""
    channels = 1 if memory else CHANNELS
    model = ModelSpec("yourmt3", "numbers", D_MODEL, HEADS, WIDTH, 48, 1, LAYERS, VOCAB, 256, LENGTH, 0, 1)
    model = replace(model, channels=channels, memory=memory)
    features = FeatureSpec("yourmt3_spectrum", mel_norm=False, hop_length=2000, bins=1024, segment_samples=32_767)
    contracts = tuple(graph_specs(model, features).values())
    vocabulary = VocabularySpec(max_shift_steps=205)
    return replace(manifest, model=model, features=features, vocabulary=vocabulary, contracts=contracts)


# ---- the definition -------------------------------------------------------------------------------------------------


def audio_features(samples, frames):
    """Of the first samples of a segment [frames, bins], 0 after the real frames."""
    features = np.zeros((FRAMES, 1024), np.float32)
    features[:frames] = np.mod(samples[: FRAMES * 1024].reshape(FRAMES, 1024), 50)[:frames]
    return features


def row_states(features, channel):
    """Whole numbers below 64 [frames, d_model]."""
    return np.mod(features[:, :D_MODEL] + 5 * channel, 61)


def remembered(told):
    """Vectors of a memory, by what the row was told: whole numbers below 64 [length, d_model]."""
    written = [token for token in told if token]
    start = sum((i + 1) * token for i, token in enumerate(written)) % 61
    return np.mod(start + np.arange(REMEMBERED)[:, None] + np.arange(D_MODEL), 61).astype(float)


def seen(source):
    """What cross-attention adds: source [positions, d_model]."""
    weights = np.arange(1, len(source) + 1)[:, None] * np.arange(1, D_MODEL + 1)
    return sum((layer + 1) * float((np.mod(source + layer, 64) * weights).sum()) for layer in range(2 * LAYERS))


def entry(token, place, layer, head):
    """What a layer caches of a token at a place."""
    return (token * (layer + 1) + place + 3 * head) % 101


def expected(source, steps, before=None):
    """Tokens of a row that attends to `source`, after the vectors of a prefix."""
    start = 0 if before is None else len(before)
    total = seen(source)
    for layer in range(2 * LAYERS):
        for place in range(start):
            total += (place + 1) * (layer + 1) * float(np.mod(before[place] + layer, 64).sum())
    tokens = [0]
    for place in range(start, start + steps):
        cached = sum(
            (layer + 1) * WIDTH * entry(tokens[-1], place, layer, head)
            for layer in range(2 * LAYERS)
            for head in range(HEADS)
        )
        total += (place + 1) * cached
        tokens.append(int((total + 13 * place) % VOCAB))
    return tokens[1:]


# ---- the same as graphs ---------------------------------------------------------------------------------------------


@dataclass
class Numbers:
    """The graphs, in float64 over arrays of any type; bfloat16 stands in the arrays as its bits."""

    precision: str
    cross: list[str] = field(default_factory=lambda: names("cross"))
    own: list[str] = field(default_factory=lambda: names("self"))
    prefix: list[str] = field(default_factory=lambda: names("prefix"))

    def functions(self):
        return {
            "features": self.features,
            "encoder": self.encoder,
            "memory": self.memory,
            "cross_kv": self.cross_kv,
            "prefix": self.prefix_graph,
            "decode_step": self.decode_step,
        }

    def read(self, array):
        if array.dtype == np.uint16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float64)

    def write(self, array, values):
        if array.dtype == np.uint16:
            values = np.asarray(values, np.float32).view(np.uint32) >> 16  # exact: the numbers have few bits
        array[...] = values

    def features(self, arrays):
        for segment, (samples, frames) in enumerate(zip(arrays["samples"], arrays["frames"], strict=True)):
            arrays["features"][segment] = audio_features(samples, frames)

    def encoder(self, arrays):
        for channel in range(arrays["states"].shape[1]):
            states = [row_states(one, channel) for one in arrays["features"]]
            self.write(arrays["states"][:, channel], np.stack(states))

    def memory(self, arrays):
        self.write(arrays["memory"], np.stack([remembered(told) for told in arrays["tokens"].tolist()]))

    def cross_kv(self, arrays):
        source = self.read(arrays["states"])
        if "memory" in arrays:
            source = np.concatenate([source, self.read(arrays["memory"])], axis=1)
        self._spread(arrays, self.cross, source)

    def prefix_graph(self, arrays):
        assert all(name in arrays for name in self.cross)
        self._spread(arrays, self.prefix, self.read(arrays["memory"]))

    def _spread(self, arrays, listed, source):
        for layer, name in enumerate(listed):
            values = np.mod(source + layer, 64).reshape(*source.shape[:2], HEADS, WIDTH).transpose(0, 2, 1, 3)
            self.write(arrays[name], values)

    def decode_step(self, arrays):
        rows, positions = np.arange(len(arrays["token"])), arrays["position"].astype(np.int64)
        total = np.zeros(len(rows))
        for layer, name in enumerate(self.cross):
            cross = self.read(arrays[name]).transpose(0, 2, 1, 3).reshape(len(rows), -1, D_MODEL)
            weights = np.arange(1, cross.shape[1] + 1)[:, None] * np.arange(1, D_MODEL + 1)
            total += (layer + 1) * (cross * weights).sum((1, 2))
        lost = np.where(np.isnan(total), np.nan, 0.0)  # a row that fails writes NaN
        for layer, name in enumerate(self.own):
            cache = arrays[name]
            assert positions.max() < cache.shape[2]
            for head in range(HEADS):
                values = entry(arrays["token"].astype(np.int64), positions, layer, head) + lost
                column = np.broadcast_to(values[:, None], (len(rows), WIDTH)).copy()
                if cache.dtype == np.uint16:
                    column = (column.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
                cache[rows, head, positions] = column
            assert cache.ctypes.data == arrays[name.replace("self", "present")].ctypes.data
            places = np.arange(cache.shape[2])
            visible = (places <= positions[:, None]) * (places + 1.0)  # [rows, length]; zero times NaN is NaN
            total += (layer + 1) * (self.read(cache).sum((1, 3)) * visible).sum(1)
        failed = np.isnan(total)
        arrays["next_token"][...] = np.where(failed, 0, np.mod(np.nan_to_num(total) + 13 * positions, VOCAB))
        arrays["log_prob"][...] = np.where(failed, np.nan, -arrays["next_token"] / 1024)


def names(kind):
    return [f"{kind}_{half}.{layer}" for half in ("key", "value") for layer in range(LAYERS)]
