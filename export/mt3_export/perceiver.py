"""The PerceiverTF encoder of YourMT3 (`model/perceiver_mod.py`): convolutions, blocks and projection to the decoder.

Tokens are one matrix [tokens, d] throughout, so that each linear is one product; only attention sees sequences.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mt3_export.conv_block import conv_front
from mt3_export.experts import Experts
from mt3_export.lowering import Eager
from mt3_export.perceiver_attention import CrossAttention, Norm, Rotation, SelfAttention, normalised
from mt3_export.weights import Weights, constant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mt3_export.design import PerceiverDesign
    from mt3_export.lowering import Lowering
    from mt3_runtime.specs import FeatureSpec, ModelSpec


class Mlp(nn.Module):
    """dense2(gelu(dense1 x)) with the exact GELU."""

    def __init__(self, weights: Weights, ops: Lowering) -> None:
        super().__init__()
        self.ops = ops
        self.inner, self.inner_bias = weights.matrix("dense1"), constant(weights.exact("dense1.bias"))
        self.outer, self.outer_bias = weights.matrix("dense2"), constant(weights.exact("dense2.bias"))

    def forward(self, normed: Tensor) -> Tensor:
        active = self.ops.exact_gelu(self.ops.linear(normed, self.inner) + self.inner_bias)
        return self.ops.linear(active, self.outer) + self.outer_bias


class Layer(nn.Module):
    """One transformer layer. Takes the residual stream and the update that is still to be added to it."""

    def __init__(
        self, weights: Weights, length: int, rotation: Rotation | None, design: PerceiverDesign, ops: Lowering
    ) -> None:
        super().__init__()
        attention = weights.below("attention")
        self.norm = Norm(attention, "self.layernorm1", design, ops)
        self.attention = SelfAttention(attention, length, rotation, design.heads, ops)
        self.feed_norm = Norm(weights, "layernorm", design, ops)
        mlp = weights.below("mlp")
        self.feed_forward = Experts(mlp, design.chosen, ops) if design.chosen else Mlp(mlp, ops)

    def forward(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden, normed = self.norm(hidden, update)
        hidden, normed = self.feed_norm(hidden, self.attention(normed))
        return hidden, self.feed_forward(normed)


class Block(nn.Module):
    """Cross-attention to the spectrum, layers over the latents of each frame, layers over the frames of each latent.

    Tokens [segments * frames * latents, d], normalised spectrum [sequences, channels, bins] -> tokens, now in the order
    [segments * latents * frames, d]. Queries [sequences, latents, d] are given where they are constant.
    """

    def __init__(
        self, weights: Weights, sizes: tuple[int, int], turns: Mapping[str, Rotation], design: PerceiverDesign,
        ops: Lowering,
    ) -> None:  # fmt: skip
        super().__init__()
        self.residual, (self.latents, self.frames) = design.residual, sizes
        cross = weights.below("spectral_cross_attention")
        self.norm = Norm(cross, "self.layernorm1", design, ops)
        self.cross = CrossAttention(cross, self.latents, turns.get("sca"), design.heads, ops)

        def layers(name: str, length: int, rotation: Rotation | None) -> nn.ModuleList:
            below = weights.below(name)
            return nn.ModuleList(
                Layer(below.below(str(i)), length, rotation, design, ops) for i in range(weights.count(name))
            )

        self.local = layers("local_transformer", self.latents, turns.get("latent"))
        self.temporal = layers("temporal_transformer", self.frames, turns.get("temporal"))

    def queries(self, hidden: Tensor) -> Tensor:
        """What the latents [tokens, d] ask the spectrum."""
        return self.cross.queries(self.norm(hidden)[1])

    def exact_queries(self, latents: Tensor) -> Tensor:
        """The same in float64, for a constant: [sequences, latents, d] -> [sequences, latents, d]."""
        norm, cross = deepcopy(self.norm).double(), deepcopy(self.cross).double()
        cross.ops = Eager()
        return cross.queries(norm(latents)[1])

    def forward(self, hidden: Tensor, spectrum: Tensor, query: Tensor | None = None) -> Tensor:
        found = self.cross(self.queries(hidden) if query is None else query, spectrum)
        stream: tuple[Tensor, Tensor | None] = (hidden, found) if self.residual else (found, None)
        for layer in self.local:
            stream = layer(*stream)
        stream = swapped(total(*stream), self.frames, self.latents), None
        for layer in self.temporal:
            stream = layer(*stream)
        return total(*stream)


def total(hidden: Tensor, update: Tensor | None) -> Tensor:
    """The residual stream with everything added to it."""
    return hidden if update is None else hidden + update


def swapped(tokens: Tensor, outer: int, inner: int) -> Tensor:
    """[n * outer * inner, d] -> [n * inner * outer, d]."""
    width = tokens.shape[-1]
    return tokens.reshape(-1, outer, inner, width).transpose(1, 2).reshape(-1, width)


class PerceiverEncoder(nn.Module):
    """features [segments, frames, bins] -> states [segments, channels, frames, d_model]."""

    latents: Tensor
    first_query: Tensor

    def __init__(
        self, model: ModelSpec, features: FeatureSpec, tensors: Mapping[str, Tensor], design: PerceiverDesign,
        ops: Lowering,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ops = ops
        every = Weights(tensors)
        front, weights = every.below("pre_encoder.0.blocks"), every.below("encoder")
        self.frames, self.channels, self.kind = features.segment_frames, model.channels, design.norm
        self.front = conv_front(front, self.frames, features.bins, ops)
        latents = weights.exact("latent_array.latents")
        turns = rotations(weights, len(latents), self.frames)
        below, sizes = weights.below("blocks"), (len(latents), self.frames)
        first, *others = (Block(below.below(str(i)), sizes, turns, design, ops) for i in range(weights.count("blocks")))
        self.first, self.others = first, nn.ModuleList(others)
        name = "linear" if "pre_decoder.0.linear.weight" in every else "projection_layer"
        self.projection = every.below("pre_decoder.0").matrix(name)
        # Every frame asks the first spectrum the same, but for trained positions: [frames or 1, latents, d].
        latents = latents[None] if turns else latents + weights.exact("pos_emb._pos_emb")[: self.frames]
        self.register_buffer("latents", latents.float())
        self.register_buffer("first_query", first.exact_queries(latents).float())

    def forward(self, features: Tensor) -> Tensor:
        spectrum = self.front(features)  # [segments, frames, channels, bins]
        spectrum = self.ops.narrow(normalised(self.ops.widen(spectrum), self.kind)).flatten(0, 1)
        count, width = self.latents.shape[1:]
        shape = (features.shape[0], self.frames, count, width)
        latents, query = (tensor.expand(shape) for tensor in (self.latents, self.ops.stored(self.first_query)))
        hidden = self.first(latents.reshape(-1, width), spectrum, query.flatten(0, 1))
        for block in self.others:
            hidden = block(swapped(hidden, count, self.frames), spectrum)
        # channel c of the decoder reads latents c * share to (c + 1) * share - 1, side by side
        states = swapped(hidden, count // self.channels, self.frames).reshape(-1, self.projection.shape[0])
        states = self.ops.project(states, self.projection)
        return states.reshape(-1, self.channels, self.frames, self.projection.shape[1])


def rotations(weights: Weights, latents: int, frames: int) -> dict[str, Rotation]:
    """Rotations by where they are used; none where positions are trained.

    Latents stand at even distances from -1 to 1, frames at 0, 1, 2...
    """
    places = {"sca": torch.linspace(-1, 1, latents, dtype=torch.float64)}
    places |= {"latent": places["sca"], "temporal": torch.arange(frames, dtype=torch.float64)}
    return {
        name: Rotation(weights.exact(f"rotary_emb_{name}.freqs"), positions)
        for name, positions in places.items()
        if f"rotary_emb_{name}.freqs" in weights
    }
