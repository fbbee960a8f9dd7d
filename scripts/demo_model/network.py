"""The MT3 network for training: pure functions of the tensors that `mt3_export` reads, whole sequences at a time.

The same formulas as `mt3_export.network`, which runs one token at a time; a test holds one to the other. Matrices are
applied in the precision of the weights given, sums and norms in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from mt3_export.lowering import NORM_EPSILON, merge_heads, split_heads
from mt3_export.network import sinusoid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mt3_runtime.specs import ModelSpec

GUIDED_ENCODER = "encoder"
GUIDED_SELF = "self"
GUIDED_CROSS = "cross"


@dataclass(slots=True)
class Looks:
    """What is seen of attention: scores of guided heads before softmax, by name [segments, heads, queries, keys].

    `flags` [segments, frames]: how strongly each frame calls itself an event, see `initial.py`.
    """

    scores: dict[str, Tensor] = field(default_factory=dict)
    flags: Tensor = field(default_factory=lambda: torch.empty(0))

    def keep(self, name: str, query: Tensor, key: Tensor, heads: int, guided: int, mask: Tensor | None = None) -> None:
        """Keep the scores of the first `guided` heads of query and key [segments, length, heads * d_kv]."""
        width = query.shape[-1] // heads * guided
        queries, keys = (split_heads(part[..., :width], guided) for part in (query, key))
        scores = (queries @ keys.transpose(-1, -2)).float()
        self.scores[name] = scores if mask is None else scores.masked_fill(mask, -torch.inf)


class Network:
    """One set of weights, in the precision that matrices are to be applied in."""

    def __init__(self, model: ModelSpec, weights: Mapping[str, Tensor]) -> None:
        self.model, self.weights = model, weights
        self.device = weights["proj.weight"].device

    def encode(self, features: Tensor, looks: Looks | None = None) -> Tensor:
        """features [segments, frames, bins] -> states [segments, frames, d_model], normalised."""
        model = self.model
        positions = sinusoid(features.shape[1], model.d_model, model.position_base).to(self.device)
        hidden = self._linear(features, "proj").float() + positions
        for index in range(model.encoder_layers):
            block = f"encoder.block.{index}.layer"
            normed = self._norm(hidden, f"{block}.0.layer_norm")
            query, key, value = self._project(normed, f"{block}.0.SelfAttention", "qkv")
            if looks is not None and index == model.encoder_layers - 1:
                looks.keep(GUIDED_ENCODER, query, key, model.num_heads, 1)
                looks.flags = key[..., model.d_kv - 1].float()
            update = self._attend(query, key, value, None)
            hidden = hidden + self._linear(update, f"{block}.0.SelfAttention.o")
            hidden = hidden + self._feed_forward(hidden, f"{block}.1")
        return self._norm(hidden, "encoder.final_layer_norm")

    def decode(self, states: Tensor, inputs: Tensor, looks: Looks | None = None) -> Tensor:
        """states [segments, frames, d_model], inputs [segments, length] -> normed [segments, length, d_model].

        `inputs` begin with the start token. Logits are `speak` of the result.
        """
        model, length = self.model, inputs.shape[1]
        positions = sinusoid(length, model.d_model, model.position_base).to(self.device)
        hidden = F.embedding(inputs, self.weights["decoder_embed_tokens.weight"]).float() + positions
        future = torch.ones(length, length, dtype=torch.bool, device=self.device).triu(1)
        for index in range(model.decoder_layers):
            block = f"decoder.block.{index}.layer"
            normed = self._norm(hidden, f"{block}.0.layer_norm")
            query, key, value = self._project(normed, f"{block}.0.SelfAttention", "qkv")
            if looks is not None and index == 0:
                looks.keep(GUIDED_SELF, query, key, model.num_heads, 3, future)
            update = self._attend(query, key, value, future)
            hidden = hidden + self._linear(update, f"{block}.0.SelfAttention.o")
            normed = self._norm(hidden, f"{block}.1.layer_norm")
            query = self._linear(normed, f"{block}.1.EncDecAttention.q")
            key, value = self._project(states, f"{block}.1.EncDecAttention", "kv")
            if looks is not None and index == 0:
                looks.keep(GUIDED_CROSS, query, key, model.num_heads, model.num_heads)
            update = self._attend(query, key, value, None)
            hidden = hidden + self._linear(update, f"{block}.1.EncDecAttention.o")
            hidden = hidden + self._feed_forward(hidden, f"{block}.2")
        return self._norm(hidden, "decoder.final_layer_norm")

    def speak(self, normed: Tensor) -> Tensor:
        """Logits [..., vocab] of normalised states [..., d_model]."""
        return self._linear(normed, "lm_head")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _project(self, x: Tensor, name: str, parts: str) -> tuple[Tensor, ...]:
        matrix = torch.cat([self.weights[f"{name}.{part}.weight"] for part in parts])
        return F.linear(x, matrix).chunk(len(parts), -1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        gain = self.weights[f"{name}.weight"]
        return F.rms_norm(x, (x.shape[-1],), gain.float(), NORM_EPSILON).to(gain.dtype)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        heads = self.model.num_heads
        queries, keys, values = (split_heads(part, heads) for part in (query, key, value))
        scores = queries @ keys.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        return merge_heads(scores.softmax(-1) @ values)

    def _feed_forward(self, hidden: Tensor, block: str) -> Tensor:
        normed = self._norm(hidden, f"{block}.layer_norm")
        matrix = torch.cat([self.weights[f"{block}.DenseReluDense.{name}.weight"] for name in ("wi_0", "wi_1")])
        gate, value = F.linear(normed, matrix).chunk(2, -1)
        return self._linear(F.gelu(gate, approximate="tanh") * value, f"{block}.DenseReluDense.wo")
