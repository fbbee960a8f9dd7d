"""The few operations whose best form depends on the engine, in four forms behind one protocol.

`Eager` is plain torch: the reference that the exported graphs are verified against. `OnnxRuntime` uses the
fused operators of the `com.microsoft` domain, `TensorRT` only standard ones of opset 24, and `Cuda` what ONNX Runtime
has kernels for on NVIDIA's devices. The last three exist for tracing: their results have the right shape and no meaning
outside a graph.
Types follow a `PrecisionPlan`. What `narrow` and `project` give is half as wide, all else is float32.
All attention is unscaled (scale 1.0 is written out: ONNX would divide by sqrt(d_kv)), as T5's is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows
from torch.onnx.ops import symbolic, symbolic_multi_out

from mt3_export.experts import dense_experts, expert, grouped_experts, kept
from mt3_export.precision import Products, TracedProducts
from mt3_export.typed_weights import widened

if TYPE_CHECKING:
    from mt3_export.experts import Matrices
    from mt3_export.precision import PrecisionPlan
    from mt3_runtime.manifest import LoweringName

NORM_EPSILON = 1e-6
FLOAT, INT32, BOOL = torch.float32, torch.int32, torch.bool


class Lowering(Protocol):
    """How the engine-dependent operations are written."""

    name: str
    plan: PrecisionPlan
    winograd: bool  # whether fewer products are worth more sums to convolutions: see `mt3_export.winograd`

    def narrow(self, x: Tensor) -> Tensor:
        """To the type of products."""

    def widen(self, x: Tensor) -> Tensor:
        """To float32."""

    def stored(self, weight: Tensor) -> Tensor:
        """A weight, or what was made of some, in the type that it is stored in: narrow."""

    def linear(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Product of x and matrix, both narrow, summed in float32 and rounded, given in float32."""

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Product of x and matrix, both narrow, summed in float32 and given narrow."""

    def balanced(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`linear`, where numbers of x may be too large to be narrow: each row is divided by its largest before."""

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
        """2-D convolution, all narrow, summed in float32."""

    def add_norm(
        self, x: Tensor, update: Tensor, gain: Tensor, bias: Tensor | None = None, epsilon: float = NORM_EPSILON
    ) -> tuple[Tensor, Tensor]:
        """Return x + update, and that normalised along the last axis: as layer norm does if there is a bias.

        Without one it is scaled to unit mean square, times `gain`.
        """

    def gelu(self, x: Tensor) -> Tensor:
        """GELU in its tanh form."""

    def exact_gelu(self, x: Tensor) -> Tensor:
        """GELU by the error function."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Attend without a mask: query [n, q, heads*d]; key, value [n, heads, k, d] -> [n, q, heads*d]."""

    def encoder_attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """Attend without a mask: query [n, q, heads*d]; key, value [n, k, heads*d] -> [n, q, heads*d]."""

    def rotate(self, query: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
        """Turn the first pairs of neighbours of every head: query [n, t, heads*d]; angles' [t, pairs]."""

    def experts(self, tokens: Tensor, probabilities: Tensor, experts: list[Matrices], chosen: int) -> Tensor:
        """Mix each token's `chosen` likeliest experts, see `mt3_export.experts`: tokens [n, d] -> [n, d]."""

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


def rotated(query: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
    """`Lowering.rotate` in plain torch."""
    size = 2 * cosines.shape[1]
    split = query.reshape(*query.shape[:-1], heads, query.shape[-1] // heads)  # [n, t, heads, d]
    x, y = split[..., :size:2], split[..., 1:size:2]
    cos, sin = cosines[:, None], sines[:, None]
    turned = torch.stack((x * cos - y * sin, y * cos + x * sin), -1).flatten(-2)
    return torch.cat((turned, split[..., size:]), -1).reshape(query.shape)


class Eager(Products):
    """Plain torch, in the shortest form that can be checked by eye.

    With a plan of half precision it rounds where a device does, and computes in float32 between.
    """

    name = "eager"
    winograd = False

    def add_norm(
        self, x: Tensor, update: Tensor, gain: Tensor, bias: Tensor | None = None, epsilon: float = NORM_EPSILON
    ) -> tuple[Tensor, Tensor]:
        x = x + update
        if bias is not None:
            return x, F.layer_norm(x, gain.shape, gain, bias, epsilon)
        return x, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
        x, kernel = (self.widen(self.narrow(part)) for part in (x, kernel))
        return self.narrow(
            F.conv2d(x, kernel, None if bias is None else self.widen(self.narrow(bias)), padding=padding)
        )

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        scores = self.widen(split_heads(query, heads)) @ self.widen(key).transpose(-1, -2)
        return merge_heads(self.project(scores.softmax(-1), value))

    def encoder_attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return self.attention(query, split_heads(key, heads), split_heads(value, heads), heads)

    def rotate(self, query: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
        return rotated(query, cosines, sines, heads)

    def experts(self, tokens: Tensor, probabilities: Tensor, experts: list[Matrices], chosen: int) -> Tensor:
        weights = kept(probabilities, chosen)
        if self.plan.half is not None:
            return dense_experts(tokens, weights, experts, self)
        return torch.stack([weights[:, [i]] * expert(tokens, *experts[i]) for i in range(len(experts))]).sum(0)

    def cached_attention(
        self, qkv: Tensor, key: Tensor, value: Tensor, position: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, new_key, new_value = (split_heads(part, heads) for part in qkv.chunk(3, -1))
        places = torch.arange(key.shape[2], device=key.device)
        here = (places == position[:, None])[:, None, :, None]  # [n, 1, length, 1]
        key, value = torch.where(here, new_key, key), torch.where(here, new_value, value)
        unwritten = (places > position[:, None])[:, None, None]  # [n, 1, 1, length]
        scores = (self.widen(query) @ self.widen(key).transpose(-1, -2)).masked_fill(unwritten, -torch.inf)
        visible = value.masked_fill(unwritten.transpose(-1, -2), 0.0)  # 0 * NaN would be NaN
        return merge_heads(self.project(scores.softmax(-1), visible)), key, value


class OnnxRuntime(TracedProducts):
    """Fused operators of ONNX Runtime's `com.microsoft` domain, as its CPU provider has them: in float32."""

    name = "ort"
    winograd = True

    def add_norm(
        self, x: Tensor, update: Tensor, gain: Tensor, bias: Tensor | None = None, epsilon: float = NORM_EPSILON
    ) -> tuple[Tensor, Tensor]:
        if bias is not None:  # its own fused operator, SkipLayerNormalization, is four times slower than two
            x = x + update
            return x, F.layer_norm(x, gain.shape, gain, bias, epsilon)
        statistics = (*x.shape[:-1], 1)  # mean and inverse deviation, for training only
        normed, _, _, total = symbolic_multi_out(
            "com.microsoft::SkipSimplifiedLayerNormalization",
            (x, update, gain),
            {"epsilon": epsilon},
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
            dtype=query.dtype,
            shape=query.shape,
        )

    def encoder_attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return self.attention(query, key, value, heads)

    def rotate(self, query: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
        first = torch.zeros(1, dtype=torch.int64)
        return symbolic(
            "com.microsoft::RotaryEmbedding",
            (query, first, cosines, sines),
            {"interleaved": 1, "num_heads": heads, "rotary_embedding_dim": 2 * cosines.shape[1]},
            dtype=FLOAT,
            shape=query.shape,
        )

    def experts(self, tokens: Tensor, probabilities: Tensor, experts: list[Matrices], chosen: int) -> Tensor:
        return grouped_experts(tokens, probabilities, experts, chosen)

    def cached_attention(
        self, qkv: Tensor, key: Tensor, value: Tensor, position: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return group_query_attention(qkv, key, value, position, position.amax(0) + 1, heads)


def group_query_attention(
    qkv: Tensor, key: Tensor, value: Tensor, position: Tensor, total: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`Lowering.cached_attention` in one operator, which takes the fused projection as it is.

    `total`: no row is longer, itself included.
    """
    shape = (*qkv.shape[:-1], qkv.shape[-1] // 3)
    output, key, value = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (qkv, None, None, key, value, position, total),
        {"num_heads": heads, "kv_num_heads": heads, "scale": 1.0},
        dtypes=(qkv.dtype, key.dtype, value.dtype),
        shapes=(shape, key.shape, value.shape),
    )
    return output, key, value


class Cuda(OnnxRuntime):
    """Operators that ONNX Runtime's CUDA provider has kernels for, none of which waits for the host.

    A captured graph replays kernels alone. What the host computes before it must therefore be the same at every step:
    shapes are, positions are not. Half precision is GroupQueryAttention's only; float32 is written out, in operators
    that opset 18 has (see `onnx_graph.for_cuda`), and writes the whole cache at every step: it is for comparisons.
    """

    name = "cuda"
    winograd = False

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.narrow(x) @ self.stored(matrix)

    def exact_gelu(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))  # the operator came with opset 20

    def experts(self, tokens: Tensor, probabilities: Tensor, experts: list[Matrices], chosen: int) -> Tensor:
        return dense_experts(tokens, kept(probabilities, chosen), experts, self)

    def cached_attention(
        self, qkv: Tensor, key: Tensor, value: Tensor, position: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.plan.half is not None:
            room = symbolic("Shape", (key,), {"start": 2, "end": 3}, dtype=torch.int64, shape=(1,))
            return group_query_attention(qkv, key, value, position, room.to(INT32), heads)
        query, new_key, new_value = (split_heads(part, heads) for part in qkv.chunk(3, -1))
        places = torch.arange(key.shape[2], dtype=INT32)
        here = (places == position[:, None])[:, None, :, None]  # [n, 1, length, 1]
        key, value = torch.where(here, new_key, key), torch.where(here, new_value, value)
        unwritten = (places > position[:, None])[:, None, None]  # [n, 1, 1, length]
        scores = (query @ key.transpose(-1, -2)).masked_fill(unwritten, -torch.inf)
        return merge_heads(scores.softmax(-1) @ value), key, value


class TensorRT(TracedProducts):
    """Standard operators of opset 24, in the forms TensorRT's parser maps to its own layers."""

    name = "tensorrt"
    winograd = False

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        if self.plan.half is None:
            return x @ matrix
        # TensorRT takes this, casts and all, for one product of halves that is summed in float32.
        return self.narrow(self.widen(self.narrow(x)) @ widened(self.stored(matrix)))

    def add_norm(
        self, x: Tensor, update: Tensor, gain: Tensor, bias: Tensor | None = None, epsilon: float = NORM_EPSILON
    ) -> tuple[Tensor, Tensor]:
        x = x + update
        if bias is not None:
            return x, F.layer_norm(x, gain.shape, gain, bias, epsilon)
        return x, symbolic("RMSNormalization", (x, gain), {"epsilon": epsilon, "axis": -1}, dtype=FLOAT, shape=x.shape)

    def gelu(self, x: Tensor) -> Tensor:
        return symbolic("Gelu", (x,), {"approximate": "tanh"}, dtype=FLOAT, shape=x.shape)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return merge_heads(self._attend(split_heads(query, heads), key, value))

    def encoder_attention(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        return merge_heads(self._attend(*(split_heads(part, heads) for part in (query, key, value))))

    def rotate(self, query: Tensor, cosines: Tensor, sines: Tensor, heads: int) -> Tensor:
        return rotated(query, cosines, sines, heads)

    def experts(self, tokens: Tensor, probabilities: Tensor, experts: list[Matrices], chosen: int) -> Tensor:
        return dense_experts(tokens, kept(probabilities, chosen), experts, self)

    def cached_attention(
        self, qkv: Tensor, key: Tensor, value: Tensor, position: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, new_key, new_value = (split_heads(part, heads) for part in qkv.chunk(3, -1))
        where = position.to(torch.int64)
        key, value = (
            symbolic("TensorScatter", (cache, new, where), {"axis": 2}, dtype=cache.dtype, shape=cache.shape)
            for cache, new in ((key, new_key), (value, new_value))
        )
        # The mask is made in the graph from the positions: TensorRT drops `nonpad_kv_seqlen` without a word.
        places = torch.arange(key.shape[2], dtype=INT32)
        visible = (places <= position[:, None])[:, None, None]  # [n, 1, 1, length]
        return merge_heads(self._attend(query, key, value, visible)), key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        inputs = (query, key, value) if mask is None else (query, key, value, mask)
        return symbolic("Attention", inputs, {"scale": 1.0}, dtype=query.dtype, shape=query.shape)


LOWERINGS: dict[LoweringName, Lowering] = {"ort": OnnxRuntime(), "tensorrt": TensorRT()}  # of every bundle
