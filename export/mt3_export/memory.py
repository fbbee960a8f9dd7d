"""What a decoder is told of the segment before: that segment's tokens, summed up in a few vectors.

One bidirectional T5 block over embedded and projected tokens, always `span` of them (MR-MT3 `models/t5_segmem.py`; the
projection stands where `T5Stack` embeds ids, and gets embeddings): a segment of fewer is filled up, and the fill is
attended to like anything else. Its keys and values are the same for every segment, so that they are computed once, when
the graph is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from mt3_export.layers import DecoderLayer, FeedForward
from mt3_export.lowering import NORM_EPSILON, merge_heads, split_heads
from mt3_export.state import MEMORY_ENCODER
from mt3_export.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mt3_export.lowering import Lowering
    from mt3_runtime.specs import MemorySpec, ModelSpec


class Memory(nn.Module):
    """tokens [rows, written] -> vectors [rows, length, d_model]: see `mt3_runtime.graphs.memory_spec`.

    `positions` [span, d_model]. Only the vectors that are kept are asked for: no other position has a query, and
    nothing behind attention is computed for it.
    """

    positions: Tensor
    fill: Tensor
    kept: Tensor

    def __init__(
        self, model: ModelSpec, memory: MemorySpec, tensors: Mapping[str, Tensor], positions: Tensor, ops: Lowering
    ) -> None:
        super().__init__()
        self.ops, self.heads, self.span = ops, model.num_heads, memory.span
        block = Weights(tensors, f"{MEMORY_ENCODER}.block.0.")
        attention = block.below("layer.0")
        self.embedding = Weights(tensors).vector("decoder_embed_tokens")
        self.projection = Weights(tensors).matrix("segmem_proj")
        self.norm = attention.vector("layer_norm")
        self.query = attention.matrix("SelfAttention.q")
        self.key_value = attention.matrix("SelfAttention.k", "SelfAttention.v")
        self.output = attention.matrix("SelfAttention.o")
        self.feed_forward = FeedForward(block.below("layer.1"), ops)
        self.final_norm = Weights(tensors, f"{MEMORY_ENCODER}.").vector("final_layer_norm")
        self.register_buffer("positions", positions)
        self.register_buffer("fill", fill_table(tensors, positions, memory.fill_token))
        self.register_buffer("kept", torch.arange(memory.length))

    def forward(self, tokens: Tensor) -> Tensor:
        rows, written = tokens.shape
        hidden = self.ops.linear(F.embedding(tokens, self.embedding), self.projection)  # [rows, written, d_model]
        update = F.embedding(torch.arange(written), self.positions)
        hidden, normed = self.ops.add_norm(hidden, update, self.norm)
        own = self.ops.project(normed, self.key_value)  # [rows, written, 2*heads*d]
        both = torch.cat((own, self.ops.stored(self.fill).expand(rows, -1, -1)), 1)
        place = torch.arange(self.span)
        source = torch.where(place < written, place, place + written)  # the fill's own place in `both`
        key, value = both.index_select(1, source).chunk(2, -1)  # [rows, span, heads*d]
        query = self.ops.project(normed.index_select(1, self.kept), self.query)
        update = self.ops.linear(self.ops.encoder_attention(query, key, value, self.heads), self.output)
        hidden, normed = self.ops.add_norm(hidden.index_select(1, self.kept), update, self.feed_forward.norm)
        return self.ops.narrow(self.ops.add_norm(hidden, self.feed_forward(normed), self.final_norm)[1])


def fill_table(tensors: Mapping[str, Tensor], positions: Tensor, token: int) -> Tensor:
    """Keys, then values, of `token` at every position [span, 2*heads*d]: computed in float64, rounded once."""
    attention = Weights(tensors, f"{MEMORY_ENCODER}.block.0.layer.0.")
    weights = Weights(tensors)
    embedded = weights.exact("decoder_embed_tokens.weight")[token] @ weights.exact("segmem_proj.weight").T
    hidden = embedded + positions.double()
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + NORM_EPSILON)
    normed = hidden * scale * attention.exact("layer_norm.weight")
    parts = [attention.exact(f"SelfAttention.{name}.weight") for name in ("k", "v")]
    return (normed @ torch.cat(parts).T).float()


class Prefix(nn.Module):
    """Vectors before the first token to what each layer caches of them: see `mt3_runtime.graphs.prefix_spec`.

    The decoder's own layers at positions 0 to length - 1; of the last one only keys and values are wanted.
    `positions` [length, d_model].
    """

    positions: Tensor
    mask: Tensor

    def __init__(self, model: ModelSpec, tensors: Mapping[str, Tensor], positions: Tensor, ops: Lowering) -> None:
        super().__init__()
        self.ops, self.heads = ops, model.num_heads
        *blocks, last = (Weights(tensors, f"decoder.block.{i}.") for i in range(model.decoder_layers))
        self.layers = nn.ModuleList(DecoderLayer(block, model.num_heads, ops) for block in blocks)
        self.last_norm = last.vector("layer.0.layer_norm")
        self.last_key_value = last.below("layer.0").matrix("SelfAttention.k", "SelfAttention.v")
        self.register_buffer("positions", positions)
        self.register_buffer("mask", torch.full((len(positions),) * 2, -torch.inf).triu(1))  # [query, key]

    def forward(self, memory: Tensor, *cross: Tensor) -> tuple[Tensor, ...]:
        cross_keys, cross_values = cross[: len(cross) // 2], cross[len(cross) // 2 :]
        hidden, update = self.ops.widen(memory), self.positions
        cached: list[tuple[Tensor, ...]] = []
        for i, layer in enumerate(cast("Sequence[DecoderLayer]", self.layers)):
            hidden, normed = self.ops.add_norm(hidden, update, layer.norm)
            query, key, value = self._split(self.ops.project(normed, layer.qkv), 3)
            scores = (
                self.ops.widen(query) @ self.ops.widen(key).transpose(-1, -2) + self.mask
            )  # [rows, heads, query, key]
            output = merge_heads(self.ops.project(scores.softmax(-1), value))
            hidden, update = layer.attended(hidden, output, (cross_keys[i], cross_values[i]))
            cached.append((key, value))
        _, normed = self.ops.add_norm(hidden, update, self.last_norm)
        cached.append(self._split(self.ops.project(normed, self.last_key_value), 2))
        keys, values = zip(*cached, strict=True)
        return *keys, *values

    def _split(self, fused: Tensor, parts: int) -> tuple[Tensor, ...]:
        return tuple(split_heads(part, self.heads) for part in fused.chunk(parts, -1))
