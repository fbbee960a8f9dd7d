"""The few operations whose best form depends on the engine, in three forms behind one protocol.

`Eager` is plain torch: the reference that the exported graphs are verified against. `OnnxRuntime` uses the
fused operators of the `com.microsoft` domain, `TensorRT` only standard ones of opset 24. The last two exist for
tracing: their results have the right shape and no meaning outside a graph.
All attention is unscaled (scale 1.0 is written out: ONNX would divide by sqrt(d_kv)), as T5's is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows
from torch.onnx.ops import symbolic, symbolic_multi_out

if TYPE_CHECKING:
    from mt3_runtime.manifest import LoweringName

NORM_EPSILON = 1e-6
FLOAT, INT32, BOOL = torch.float32, torch.int32, torch.bool


class Lowering(Protocol):
    """How the engine-dependent operations are written."""

    name: str

    def add_rms_norm(self, x: Tensor, update: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + update, and that scaled to unit mean square along the last axis, times `gain`."""

    def gelu(self, x: Tensor) -> Tensor:
        """GELU in its tanh form."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Attend without a mask: query [n, q, heads*d]; key, value [n, heads, k, d] -> [n, q, heads*d]."""

    def encoder_attention(self, qkv: Tensor, heads: int) -> Tensor:
        """Self-attend without a mask: qkv [n, t, 3*heads*d] -> [n, t, heads*d]."""

    def cached_attention(
        self, qkv: Tensor, key: Tensor, value: Tensor, position: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write one position of the cache, then attend to all up to it.

        qkv [n, 1, 3*heads*d]; key, value [n, heads, length, d]; position [n] int32
        -> output [n, 1, heads*d], key, value.
        """


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[n, t, heads*d] -> [n, heads, t, d]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[n, heads, t, d] -> [n, t, heads*d]."""
    return x.transpose(1, 2).flatten(2)


class Eager:
    """Plain torch, in the shortest form that can be checked by eye."""

    name = "eager"

    def add_rms_norm(self, x: Tensor, update: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        x = x + update
        return x, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON) * gain

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        scores = split_heads(query, heads) @ key.transpose(-1, -2)
        return merge_heads(scores.softmax(-1) @ value)

    def encoder_attention(self, qkv: Tensor, heads: int) -> Tensor:
        query, key, value = qkv.chunk(3, -1)
        return self.attention(query, split_heads(key, heads), split_heads(value, heads), heads)

    def cached_attention(
        self, qkv: Tensor, key: Tensor, value: Tensor, position: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, new_key, new_value = (split_heads(part, heads) for part in qkv.chunk(3, -1))
        places = torch.arange(key.shape[2], device=key.device)
        here = (places == position[:, None])[:, None, :, None]  # [n, 1, length, 1]
        key, value = torch.where(here, new_key, key), torch.where(here, new_value, value)
        unwritten = (places > position[:, None])[:, None, None]  # [n, 1, 1, length]
        scores = (query @ key.transpose(-1, -2)).masked_fill(unwritten, -torch.inf)
        visible = value.masked_fill(unwritten.transpose(-1, -2), 0.0)  # 0 * NaN would be NaN
        return merge_heads(scores.softmax(-1) @ visible), key, value


class OnnxRuntime:
    """Fused operators of ONNX Runtime's `com.microsoft` domain."""

    name = "ort"

    def add_rms_norm(self, x: Tensor, update: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        statistics = (*x.shape[:-1], 1)  # mean and inverse deviation, for training only
        normed, _, _, total = symbolic_multi_out(
            "com.microsoft::SkipSimplifiedLayerNormalization",
            (x, update, gain),
            {"epsilon": NORM_EPSILON},
            dtypes=(FLOAT, FLOAT, FLOAT, FLOAT),
            shapes=(x.shape, statistics, statistics, x.shape),
        )
        return total, normed

    def gelu(self, x: Tensor) -> Tensor:
        return symbolic("com.microsoft::FastGelu", (x,), dtype=FLOAT, shape=x.shape)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return symbolic(
            "com.microsoft::MultiHeadAttention",
            (query, key, value),
            {"num_heads": heads, "scale": 1.0},
            dtype=FLOAT,
            shape=query.shape,
        )

    def encoder_attention(self, qkv: Tensor, heads: int) -> Tensor:
        query, key, value = qkv.chunk(3, -1)
        return self.attention(query, key, value, heads)

    def cached_attention(
        self, qkv: Tensor, key: Tensor, value: Tensor, position: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = position.amax(0) + 1
        shape = (*qkv.shape[:-1], qkv.shape[-1] // 3)
        output, key, value = symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (
                qkv,
                None,
                None,
                key,
                value,
                position,
                total,
            ),  # the operator takes the fused projection as it is
            {"num_heads": heads, "kv_num_heads": heads, "scale": 1.0},
            dtypes=(FLOAT, FLOAT, FLOAT),
            shapes=(shape, key.shape, value.shape),
        )
        return output, key, value


class TensorRT:
    """Standard operators of opset 24, in the forms TensorRT's parser maps to its own layers."""

    name = "tensorrt"

    def add_rms_norm(self, x: Tensor, update: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        x = x + update
        return x, symbolic(
            "RMSNormalization",
            (x, gain),
            {"epsilon": NORM_EPSILON, "axis": -1},
            dtype=FLOAT,
            shape=x.shape,
        )

    def gelu(self, x: Tensor) -> Tensor:
        return symbolic("Gelu", (x,), {"approximate": "tanh"}, dtype=FLOAT, shape=x.shape)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return merge_heads(self._attend(split_heads(query, heads), key, value))

    def encoder_attention(self, qkv: Tensor, heads: int) -> Tensor:
        query, key, value = (split_heads(part, heads) for part in qkv.chunk(3, -1))
        return merge_heads(self._attend(query, key, value))

    def cached_attention(
        self, qkv: Tensor, key: Tensor, value: Tensor, position: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, new_key, new_value = (split_heads(part, heads) for part in qkv.chunk(3, -1))
        where = position.to(torch.int64)
        key, value = (
            symbolic("TensorScatter", (cache, new, where), {"axis": 2}, dtype=FLOAT, shape=cache.shape)
            for cache, new in ((key, new_key), (value, new_value))
        )
        # The mask is made in the graph from the positions: TensorRT drops `nonpad_kv_seqlen` without a word.
        places = torch.arange(key.shape[2], dtype=INT32)
        visible = (places <= position[:, None])[:, None, None]  # [n, 1, 1, length]
        return merge_heads(self._attend(query, key, value, visible)), key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        inputs = (query, key, value) if mask is None else (query, key, value, mask)
        return symbolic("Attention", inputs, {"scale": 1.0}, dtype=FLOAT, shape=query.shape)


LOWERINGS: dict[LoweringName, Lowering] = {"ort": OnnxRuntime(), "tensorrt": TensorRT()}
