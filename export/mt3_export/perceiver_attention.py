"""Norms and attention of YourMT3's PerceiverTF (YourMT3 `model/perceiver_mod.py`), over weights fused for inference.

What can be folded exactly, but for rounding, is: the scale of the scores into the projection of the queries; biases
of keys into nothing, for a softmax does not see them; biases of values into that of the output, for attention
weights sum to one; the affine part of the norm over frequency into keys and values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from mt3_export.weights import constant

if TYPE_CHECKING:
    from mt3_export.design import PerceiverDesign
    from mt3_export.lowering import Lowering
    from mt3_export.weights import Weights

EPSILON = 1e-5  # of both kinds of norm


def normalised(x: Tensor, kind: str) -> Tensor:
    """Layer norm or root mean square norm along the last axis, without gain and bias."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=EPSILON)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


class Norm(nn.Module):
    """Layer norm, or root mean square norm, which has no bias."""

    def __init__(self, weights: Weights, name: str, design: PerceiverDesign, ops: Lowering) -> None:
        super().__init__()
        self.ops = ops
        self.gain = weights.vector(name)
        self.bias = constant(weights.exact(f"{name}.bias")) if design.norm == "layer" else None

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x + update, and that normalised."""
        if update is not None:
            return self.ops.add_norm(x, update, self.gain, self.bias, EPSILON)
        if self.bias is None:
            return x, normalised(x, "rms") * self.gain
        return x, F.layer_norm(x, self.gain.shape, self.gain, self.bias, EPSILON)


class Rotation(nn.Module):
    """Cosines and sines [positions, pairs] of the angles by which queries turn."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, frequencies: Tensor, positions: Tensor) -> None:
        super().__init__()
        angles = positions[:, None] * frequencies
        self.register_buffer("cosines", angles.cos().float())
        self.register_buffer("sines", angles.sin().float())


class Attention(nn.Module):
    """Queries of `length` positions, turned if there is a rotation, and the projection of what they found."""

    def __init__(self, weights: Weights, length: int, rotation: Rotation | None, heads: int, ops: Lowering) -> None:
        super().__init__()
        self.ops, self.heads, self.length, self.rotation = ops, heads, length, rotation
        own = weights.below("self")
        scale = math.sqrt(own.exact("query.weight").shape[0] // heads)
        self.query = constant(own.exact("query.weight").T.contiguous() / scale)
        self.query_bias = constant(own.exact("query.bias") / scale)
        self.output = weights.matrix("output.dense")
        values = own.exact("value.bias")
        if "layernorm2.bias" in own:
            values = values + own.exact("value.weight") @ own.exact("layernorm2.bias")
        output = weights.exact("output.dense.weight") @ values
        self.output_bias = constant(weights.exact("output.dense.bias") + output)

    def queries(self, normed: Tensor) -> Tensor:
        """[tokens, d] -> [sequences, length, d]."""
        query = self.ops.linear(normed, self.query) + self.query_bias
        query = query.reshape(-1, self.length, self.query.shape[1])
        if self.rotation is not None:
            query = self.ops.rotate(query, self.rotation.cosines, self.rotation.sines, self.heads)
        return self.ops.narrow(query)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend and project: query [sequences, length, d]; key, value [sequences, k, d] -> [tokens, d]."""
        found = self.ops.encoder_attention(query, key, value, self.heads)
        return self.ops.linear(found.reshape(-1, query.shape[-1]), self.output) + self.output_bias


class SelfAttention(Attention):
    """Positions of one sequence attend to each other: [tokens, d] -> [tokens, d]."""

    def __init__(self, weights: Weights, length: int, rotation: Rotation | None, heads: int, ops: Lowering) -> None:
        super().__init__(weights, length, rotation, heads, ops)
        self.key, self.value = weights.matrix("self.key"), weights.matrix("self.value")

    def forward(self, normed: Tensor) -> Tensor:
        normed = self.ops.narrow(normed)
        query = self.queries(normed)
        key, value = (self.ops.project(normed, matrix).reshape(query.shape) for matrix in (self.key, self.value))
        return self.attend(query, key, value)


class CrossAttention(Attention):
    """Latents attend to the channels of their frame's spectrum.

    Query [sequences, latents, d], normalised spectrum [sequences, channels, bins] -> [tokens, d].
    """

    key: Tensor
    value: Tensor

    def __init__(self, weights: Weights, length: int, rotation: Rotation | None, heads: int, ops: Lowering) -> None:
        super().__init__(weights, length, rotation, heads, ops)
        own = weights.below("self")
        for name in ("key", "value"):  # buffers: what was folded is not what a file of rounded weights holds
            folded = own.exact(f"{name}.weight") * own.exact("layernorm2.weight")
            self.register_buffer(name, folded.T.contiguous().float())

    def forward(self, query: Tensor, spectrum: Tensor) -> Tensor:
        shape = (-1, spectrum.shape[1], self.key.shape[1])
        flat = spectrum.flatten(0, 1)
        key, value = (self.ops.project(flat, matrix).reshape(shape) for matrix in (self.key, self.value))
        return self.attend(query, key, value)
