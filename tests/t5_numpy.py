"""The network of the MT3 family in float64, written from its formulas; all positions at once, nothing cached.

x * rsqrt(mean(x^2) + 1e-6) * g; softmax(q k^T) v without a scale; (gelu(x wi_0) * (x wi_1)) wo with the tanh form of
GELU; sinusoidal positions added to the inputs; the head is not tied. Sources: magenta/mt3 `network.py`, `layers.py`;
for what a segment is told of the one before it, gudgud96/MR-MT3 `models/t5_segmem*.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from mt3_runtime.specs import ModelSpec


def positions(length: int, width: int, base: int) -> np.ndarray:
    """Sines, then cosines, of p * 10000^(-i / divisor): [length, width]."""
    count = width // 2
    divisor = {255: count - 1, 256: count}[base]
    angles = np.outer(np.arange(length), np.exp(-np.log(10000.0) * np.arange(count) / divisor))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class NumpyT5:
    """Reads a state dict as the checkpoints hold it: matrices [out, in]. YMT3+ has no projection of its features."""

    def __init__(self, model: ModelSpec, tensors: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.tensors = {key: value.numpy().astype(np.float64) for key, value in tensors.items()}

    def encode(self, features: np.ndarray) -> np.ndarray:
        """[frames, bins] -> [frames, d_model]."""
        hidden = features.astype(np.float64)
        if "proj.weight" in self.tensors:
            hidden = self._linear(hidden, "proj")
        hidden = hidden + self._positions("encoder", len(features))
        for i in range(self.model.encoder_layers):
            hidden = self._encoder_block(hidden, f"encoder.block.{i}")
        return self._norm(hidden, "encoder.final_layer_norm")

    def remember(self, ids: Sequence[int]) -> np.ndarray:
        """What one bidirectional block makes of as many tokens as there are [ids, d_model]: no mask, fill and all.

        The authors give their `T5Stack` embedded tokens for ids, and it "embeds" them with a linear layer.
        """
        hidden = self._linear(self.tensors["decoder_embed_tokens.weight"][list(ids)], "segmem_proj")
        hidden = hidden + positions(len(ids), self.model.d_model, self.model.position_base)
        return self._norm(self._encoder_block(hidden, "segmem_encoder.block.0"), "segmem_encoder.final_layer_norm")

    def decode(self, tokens: Sequence[int], states: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """Logits after every token [tokens, vocab], the first token being the start.

        `before` [vectors, d_model] stands before the embedded tokens, and takes the first positions.
        """
        hidden = self.tensors["decoder_embed_tokens.weight"][list(tokens)]
        hidden = hidden if before is None else np.concatenate([before, hidden])
        hidden = hidden + self._positions("decoder", len(hidden))
        for i in range(self.model.decoder_layers):
            block = f"decoder.block.{i}.layer"
            normed = self._norm(hidden, f"{block}.0.layer_norm")
            hidden += self._attend(normed, normed, f"{block}.0.SelfAttention", causal=True)
            normed = self._norm(hidden, f"{block}.1.layer_norm")
            hidden += self._attend(normed, states, f"{block}.1.EncDecAttention")
            hidden += self._feed_forward(hidden, f"{block}.2")
        return self._linear(self._norm(hidden[-len(tokens) :], "decoder.final_layer_norm"), "lm_head")

    def cross(self, states: np.ndarray, layer: int, name: str) -> np.ndarray:
        """Keys ("k") or values ("v") of one layer's cross-attention [heads, frames, d_kv]."""
        return self._heads(self._linear(states, f"decoder.block.{layer}.layer.1.EncDecAttention.{name}"))

    def _encoder_block(self, hidden: np.ndarray, block: str) -> np.ndarray:
        normed = self._norm(hidden, f"{block}.layer.0.layer_norm")
        hidden = hidden + self._attend(normed, normed, f"{block}.layer.0.SelfAttention")
        return hidden + self._feed_forward(hidden, f"{block}.layer.1")

    def _positions(self, side: str, length: int) -> np.ndarray:
        """The table of the checkpoint, where it has one."""
        if f"{side}.positions" in self.tensors:
            return self.tensors[f"{side}.positions"][:length]
        return positions(length, self.model.d_model, self.model.position_base)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * self.tensors[f"{name}.weight"]

    def _heads(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), self.model.num_heads, self.model.d_kv).transpose(1, 0, 2)

    def _attend(self, x: np.ndarray, memory: np.ndarray, name: str, *, causal: bool = False) -> np.ndarray:
        query, key, value = (
            self._heads(self._linear(source, f"{name}.{part}"))
            for source, part in ((x, "q"), (memory, "k"), (memory, "v"))
        )
        scores = query @ key.transpose(0, 2, 1)
        if causal:
            scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self._linear((weights @ value).transpose(1, 0, 2).reshape(len(x), -1), f"{name}.o")

    def _feed_forward(self, hidden: np.ndarray, name: str) -> np.ndarray:
        x = self._norm(hidden, f"{name}.layer_norm")
        gate = self._linear(x, f"{name}.DenseReluDense.wi_0")
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return self._linear(gate * self._linear(x, f"{name}.DenseReluDense.wi_1"), f"{name}.DenseReluDense.wo")
