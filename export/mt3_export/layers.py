"""The blocks of T5 v1.1 that encoders, decoders and memories are stacked from.

Each takes the residual stream and the update that is still to be added to it, because engines fuse that sum with the
norm behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from mt3_export.lowering import Lowering
    from mt3_export.weights import Weights


class FeedForward(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x)."""

    def __init__(self, weights: Weights, ops: Lowering) -> None:
        super().__init__()
        self.ops = ops
        self.norm = weights.vector("layer_norm")
        self.gates = weights.matrix("DenseReluDense.wi_0", "DenseReluDense.wi_1")
        self.output = weights.matrix("DenseReluDense.wo")

    def forward(self, normed: Tensor) -> Tensor:
        gate, value = self.ops.linear(normed, self.gates).chunk(2, -1)
        return self.ops.balanced(self.ops.gelu(gate) * value, self.output)


class EncoderLayer(nn.Module):
    """One encoder block."""

    def __init__(self, weights: Weights, heads: int, ops: Lowering) -> None:
        super().__init__()
        self.ops, self.heads = ops, heads
        attention = weights.below("layer.0")
        self.norm = attention.vector("layer_norm")
        self.qkv = attention.matrix("SelfAttention.q", "SelfAttention.k", "SelfAttention.v")
        self.output = attention.matrix("SelfAttention.o")
        self.feed_forward = FeedForward(weights.below("layer.1"), ops)

    def forward(self, hidden: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        hidden, normed = self.ops.add_norm(hidden, update, self.norm)
        query, key, value = self.ops.project(normed, self.qkv).chunk(3, -1)
        update = self.ops.linear(self.ops.encoder_attention(query, key, value, self.heads), self.output)
        hidden, normed = self.ops.add_norm(hidden, update, self.feed_forward.norm)
        return hidden, self.feed_forward(normed)


class DecoderLayer(nn.Module):
    """One decoder block for one new token a row; keys and values of cross-attention come from `CrossKV`."""

    def __init__(self, weights: Weights, heads: int, ops: Lowering) -> None:
        super().__init__()
        self.ops, self.heads = ops, heads
        attention, cross = weights.below("layer.0"), weights.below("layer.1")
        self.norm = attention.vector("layer_norm")
        self.qkv = attention.matrix("SelfAttention.q", "SelfAttention.k", "SelfAttention.v")
        self.output = attention.matrix("SelfAttention.o")
        self.cross_norm = cross.vector("layer_norm")
        self.cross_query = cross.matrix("EncDecAttention.q")
        self.cross_output = cross.matrix("EncDecAttention.o")
        self.feed_forward = FeedForward(weights.below("layer.2"), ops)

    def forward(
        self, hidden: Tensor, update: Tensor, position: Tensor, cross: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, normed = self.ops.add_norm(hidden, update, self.norm)
        qkv = self.ops.project(normed, self.qkv)
        output, key, value = self.ops.cached_attention(qkv, *own, position, self.heads)
        hidden, update = self.attended(hidden, output, cross)
        return hidden, update, key, value

    def attended(self, hidden: Tensor, output: Tensor, cross: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What follows self-attention, whose heads gave `output` [rows, tokens, heads*d]."""
        hidden, normed = self.ops.add_norm(hidden, self.ops.linear(output, self.output), self.cross_norm)
        output = self.ops.attention(self.ops.project(normed, self.cross_query), *cross, self.heads)
        update = self.ops.linear(output, self.cross_output)
        hidden, normed = self.ops.add_norm(hidden, update, self.feed_forward.norm)
        return hidden, self.feed_forward(normed)
