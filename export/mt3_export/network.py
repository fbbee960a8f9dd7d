"""The networks of the MT3 family as torch modules, one a graph, over weights fused for inference.

T5 v1.1 without biases, without relative positions and without attention scaling; sinusoidal positions are added
to the inputs (magenta/mt3 `network.py`, `layers.py`). Query, key and value projections are one matrix, the two
gates of the feed-forward are one matrix, and every matrix is stored [in, out] so that a graph holds plain MatMuls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from mt3_export.layers import DecoderLayer, EncoderLayer
from mt3_export.lowering import split_heads
from mt3_export.memory import Memory, Prefix
from mt3_export.perceiver import PerceiverEncoder
from mt3_export.state import MEMORY_ENCODER
from mt3_export.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mt3_export.design import PerceiverDesign
    from mt3_export.lowering import Lowering
    from mt3_runtime.specs import FeatureSpec, ModelSpec


MAGENTA_BASE = 255  # of POSITION_BASES


def sinusoid(length: int, width: int, base: int) -> Tensor:
    """Position codes [length, width] in float32: sines of all frequencies, then cosines.

    `base` is `ModelSpec.position_base`. Magenta computes its table in float64 (`layers.py`), the ports in float32.
    """
    count = width // 2
    divisor, dtype = (count - 1, torch.float64) if base == MAGENTA_BASE else (count, torch.float32)
    frequencies = 1.0 / 10000.0 ** (torch.arange(count, dtype=dtype) / divisor)
    angles = torch.arange(length, dtype=dtype)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def position_table(side: str, length: int, model: ModelSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """Position codes [length, d_model]: the checkpoint's own `{side}.positions` where it has them."""
    table = tensors.get(f"{side}.positions")
    return sinusoid(length, model.d_model, model.position_base) if table is None else table[:length].float()


class Encoder(nn.Module):
    """features [segments, frames, bins] -> states [segments, 1, frames, d_model]."""

    positions: Tensor

    def __init__(self, model: ModelSpec, frames: int, tensors: Mapping[str, Tensor], ops: Lowering) -> None:
        super().__init__()
        self.ops = ops
        self.projection = Weights(tensors).matrix("proj") if "proj.weight" in tensors else None
        self.register_buffer("positions", position_table("encoder", frames, model, tensors))
        blocks = Weights(tensors, "encoder.block.")
        self.layers = nn.ModuleList(
            EncoderLayer(blocks.below(str(i)), model.num_heads, ops) for i in range(model.encoder_layers)
        )
        self.final_norm = Weights(tensors, "encoder.").vector("final_layer_norm")

    def forward(self, features: Tensor) -> Tensor:
        hidden = features if self.projection is None else self.ops.linear(features, self.projection)
        update = self.positions
        for layer in self.layers:
            hidden, update = layer(hidden, update)
        _, states = self.ops.add_norm(hidden, update, self.final_norm)
        return self.ops.narrow(states).unsqueeze(1)


class CrossKV(nn.Module):
    """states [rows, frames, d_model] -> keys, then values, of every layer [rows, heads, frames, d_kv].

    What else cross-attention sees, as the vectors of a memory [rows, length, d_model], stands behind the frames.
    """

    def __init__(self, model: ModelSpec, tensors: Mapping[str, Tensor], ops: Lowering) -> None:
        super().__init__()
        self.ops, self.heads = ops, model.num_heads
        layers = [Weights(tensors, f"decoder.block.{i}.layer.1.EncDecAttention.") for i in range(model.decoder_layers)]
        self.projections = nn.ParameterList(layer.matrix(name) for name in ("k", "v") for layer in layers)

    def forward(self, states: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        if more:
            states = torch.cat((states, *more), 1)
        return tuple(split_heads(self.ops.project(states, matrix), self.heads) for matrix in self.projections)


class DecodeStep(nn.Module):
    """One token of every row: see `mt3_runtime.graphs.decode_step_spec`."""

    positions: Tensor

    def __init__(self, model: ModelSpec, tensors: Mapping[str, Tensor], ops: Lowering) -> None:
        super().__init__()
        self.ops = ops
        self.embedding = Weights(tensors).vector("decoder_embed_tokens")
        self.register_buffer("positions", position_table("decoder", model.positions, model, tensors))
        blocks = Weights(tensors, "decoder.block.")
        self.layers = nn.ModuleList(
            DecoderLayer(blocks.below(str(i)), model.num_heads, ops) for i in range(model.decoder_layers)
        )
        self.final_norm = Weights(tensors, "decoder.").vector("final_layer_norm")
        self.head = Weights(tensors).matrix("lm_head")

    def forward(self, token: Tensor, position: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        count = len(self.layers)
        cross_key, cross_value, self_key, self_value = (caches[i * count : (i + 1) * count] for i in range(4))
        hidden = F.embedding(token, self.embedding).unsqueeze(1)  # [rows, 1, d_model]
        update = F.embedding(position, self.positions).unsqueeze(1)
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            cross, own = (cross_key[i], cross_value[i]), (self_key[i], self_value[i])
            hidden, update, key, value = layer(hidden, update, position, cross, own)
            keys.append(key)
            values.append(value)
        _, normed = self.ops.add_norm(hidden, update, self.final_norm)
        logits = (normed @ self.head).squeeze(1)  # [rows, vocab]
        next_token, log_prob = choose(logits)
        return next_token, log_prob, *keys, *values, logits


def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy token of every row and its log-probability, NaN where any logit is not finite."""
    top = logits.amax(-1, keepdim=True)
    log_prob = -(logits - top).exp().sum(-1).log()
    # exp(-inf) is 0 and would hide a negative overflow; 0 * x is NaN for every x that is not finite.
    return logits.argmax(-1).to(torch.int32), log_prob + (logits * 0.0).sum(-1)


def build_modules(
    model: ModelSpec,
    features: FeatureSpec,
    tensors: Mapping[str, Tensor],
    ops: Lowering,
    design: PerceiverDesign | None = None,
) -> dict[str, nn.Module]:
    """The module of every graph, by the graph's name; `design` is that of the encoder where it is not T5's."""
    modules: dict[str, nn.Module] = {}
    if design is None:
        modules["encoder"] = Encoder(model, features.segment_frames, tensors, ops)
    else:
        modules["encoder"] = PerceiverEncoder(model, features, tensors, design, ops)
    if model.memory:
        positions = position_table(MEMORY_ENCODER, model.memory.span, model, tensors)
        modules["memory"] = Memory(model, model.memory, tensors, positions, ops)
    modules["cross_kv"] = CrossKV(model, tensors, ops)
    if model.prefix_length:
        positions = position_table("decoder", model.prefix_length, model, tensors)
        modules["prefix"] = Prefix(model, tensors, positions, ops)
    modules["decode_step"] = DecodeStep(model, tensors, ops)
    return modules
