"""The PerceiverTF encoder of YourMT3 in float64, written from its formulas: one segment at a time, nothing folded.

Every token goes through its experts by itself, and every projection keeps its bias. Names are those of the authors'
state dict, matrices [out, in]. Source: YourMT3 `model/conv_block.py`, `perceiver_mod.py`, `ff_layer.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mt3_export.design import PerceiverDesign

EPSILON = 1e-5


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def mixed(token: np.ndarray, tensors: Mapping[str, np.ndarray], name: str, chosen: int) -> tuple[np.ndarray, float]:
    """Experts' output for one token [d], and how much likelier the last that was chosen is than the next.

    Scores are summed one by one, so that experts with equal rows of the router are equal to the bit: of those the
    first wins, and no margin is reported.
    """
    shares = softmax(np.array([(token * row).sum() for row in tensors[f"{name}.gate.weight"]]))
    order = sorted(range(len(shares)), key=lambda i: (-shares[i], i))
    margin = shares[order[chosen - 1]] - shares[order[chosen]]
    total = sum(shares[i] for i in order[:chosen])
    output = 0.0
    for i in order[:chosen]:
        up, gate, down = (tensors[f"{name}.experts.{i}.{part}.weight"] for part in ("w1", "gate", "w2"))
        output = output + shares[i] / total * (down @ (silu(up @ token) * (gate @ token)))
    return output, margin or math.inf


class NumpyPerceiver:
    """Reads tensors as torch or numpy arrays. `closest_call`: how near the last choice of an expert ever was."""

    def __init__(self, tensors: Mapping[str, object], design: PerceiverDesign, channels: int) -> None:
        self.tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
        self.design, self.channels, self.closest_call = design, channels, math.inf

    def encode(self, features: np.ndarray) -> np.ndarray:
        """[frames, bins] -> [channels, frames, d_model]."""
        spectrum = self.spectrum(features).transpose(1, 0, 2)  # [frames, channels, bins]
        frames = len(spectrum)
        latents = self.tensors["encoder.latent_array.latents"]
        hidden = np.repeat(latents[None], frames, 0)  # [frames, latents, d]
        if "encoder.pos_emb._pos_emb" in self.tensors:
            hidden = hidden + self.tensors["encoder.pos_emb._pos_emb"][:frames]
        for i in range(self._count("encoder.blocks")):
            hidden = self._block(hidden, spectrum, f"encoder.blocks.{i}")
        return self._decoder_states(hidden)

    def spectrum(self, features: np.ndarray) -> np.ndarray:
        """[frames, bins] -> [channels, frames, bins / 8]."""
        x = features.astype(np.float64)[None]
        for i in range(3):
            x = self._conv_block(x, f"pre_encoder.0.blocks.{i}")
        return x

    def _count(self, prefix: str) -> int:
        return len({name.split(".")[prefix.count(".") + 1] for name in self.tensors if name.startswith(f"{prefix}.")})

    def _conv_block(self, x: np.ndarray, name: str) -> np.ndarray:
        y = np.maximum(self._batch_norm(self._conv(x, f"{name}.conv1"), f"{name}.bn1"), 0)
        y = self._batch_norm(self._conv(y, f"{name}.conv2"), f"{name}.bn2")
        if f"{name}.shortcut.weight" in self.tensors:
            kernel = self.tensors[f"{name}.shortcut.weight"][:, :, 0, 0]
            x = np.tensordot(kernel, x, 1) + self.tensors[f"{name}.shortcut.bias"][:, None, None]
        y = np.maximum(y + x, 0)
        return (y[:, :, 0::2] + y[:, :, 1::2]) / 2

    def _conv(self, x: np.ndarray, name: str) -> np.ndarray:
        kernel = self.tensors[f"{name}.weight"]  # [out, in, 3, 3]
        _, frames, bins = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        return sum(
            np.tensordot(kernel[:, :, i, j], padded[:, i : i + frames, j : j + bins], 1)
            for i in range(3)
            for j in range(3)
        )

    def _batch_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        gain, bias, mean, variance = (
            self.tensors[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(variance + EPSILON) * gain + bias

    def _block(self, hidden: np.ndarray, spectrum: np.ndarray, name: str) -> np.ndarray:
        """hidden [frames, latents, d]."""
        frames, latents, _ = hidden.shape
        across, along = np.linspace(-1, 1, latents), np.arange(frames)
        cross = f"{name}.spectral_cross_attention"
        for frame in range(frames):
            keys = self._norm(spectrum[frame], f"{cross}.self.layernorm2")
            found = self._attention(hidden[frame], keys, cross, across, "sca")
            hidden[frame] = found + hidden[frame] if self.design.residual else found
        for i in range(self._count(f"{name}.local_transformer")):
            for frame in range(frames):
                hidden[frame] = self._layer(hidden[frame], f"{name}.local_transformer.{i}", across, "latent")
        for i in range(self._count(f"{name}.temporal_transformer")):
            for latent in range(latents):
                layer = f"{name}.temporal_transformer.{i}"
                hidden[:, latent] = self._layer(hidden[:, latent], layer, along, "temporal")
        return hidden

    def _layer(self, x: np.ndarray, name: str, places: np.ndarray, where: str) -> np.ndarray:
        x = x + self._attention(x, None, f"{name}.attention", places, where)
        normed = self._norm(x, f"{name}.layernorm")
        if self.design.chosen:
            return x + np.stack([self._experts(token, f"{name}.mlp") for token in normed])
        return x + self._linear(gelu(self._linear(normed, f"{name}.mlp.dense1")), f"{name}.mlp.dense2")

    def _attention(
        self, x: np.ndarray, keys: np.ndarray | None, name: str, places: np.ndarray, where: str
    ) -> np.ndarray:
        x = self._norm(x, f"{name}.self.layernorm1")
        keys = x if keys is None else keys
        query, key, value = (
            self._linear(source, f"{name}.self.{part}").reshape(len(source), self.design.heads, -1)
            for source, part in ((x, "query"), (keys, "key"), (keys, "value"))
        )
        if f"encoder.rotary_emb_{where}.freqs" in self.tensors:
            query = self._turned(query, places, self.tensors[f"encoder.rotary_emb_{where}.freqs"])
        scores = np.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
        found = np.einsum("hqk,khd->qhd", softmax(scores), value)
        return self._linear(found.reshape(len(x), -1), f"{name}.output.dense")

    @staticmethod
    def _turned(query: np.ndarray, places: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        """Neighbours are the parts of complex numbers [positions, heads, d]."""
        turned = query.copy()
        for pair, frequency in enumerate(frequencies):
            one, two = 2 * pair, 2 * pair + 1
            product = (query[:, :, one] + 1j * query[:, :, two]) * np.exp(1j * frequency * places)[:, None]
            turned[:, :, one], turned[:, :, two] = product.real, product.imag
        return turned

    def _experts(self, token: np.ndarray, name: str) -> np.ndarray:
        output, margin = mixed(token, self.tensors, name, self.design.chosen)
        self.closest_call = min(self.closest_call, margin)
        return output

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        gain = self.tensors[f"{name}.weight"]
        if self.design.norm == "rms":
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * gain
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
        return centred / spread * gain + self.tensors[f"{name}.bias"]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def _decoder_states(self, hidden: np.ndarray) -> np.ndarray:
        """[frames, latents, d] -> [channels, frames, d_model]: each channel reads latents of its own."""
        frames, latents, _ = hidden.shape
        share = latents // self.channels
        parts = [hidden[:, c * share : (c + 1) * share].reshape(frames, -1) for c in range(self.channels)]
        one = "pre_decoder.0.projection_layer.weight"
        matrix = self.tensors["pre_decoder.0.linear.weight" if one not in self.tensors else one]
        return np.stack([part @ matrix.T for part in parts])
