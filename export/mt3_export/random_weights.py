"""Random weights of any size: the same bits for the same seed everywhere, and activations of a trained scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from mt3_export.state import MEL_BINS, expected_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from mt3_runtime.specs import ModelSpec

NORM_SPREAD = 0.05


def random_tensors(model: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Weights for every key of `expected_shapes`, drawn in that order as T5 initialises them.

    Args:
        model: any sizes.
        seed: 0 or more.

    Returns:
        float32 tensors.
    """
    stream = np.random.PCG64(seed)
    tensors = {}
    for key, shape in expected_shapes(model).items():
        noise = unit_noise(stream, math.prod(shape))
        centre = 1.0 if len(shape) == 1 else 0.0
        values = (centre + _spread(key, model) * noise).astype(np.float32)
        tensors[key] = torch.from_numpy(values.reshape(shape))
    return tensors


def unit_noise(stream: np.random.PCG64, count: int) -> NDArray[np.float64]:
    """Nearly normal noise of mean 0 and variance 1.

    The four 16-bit parts of each raw word are added: integers only, so that no library's logarithm and no version
    of a sampling method can change a bit.
    """
    parts = stream.random_raw(count).view(np.uint16).reshape(count, 4)
    total = parts.sum(axis=1, dtype=np.int64) - 2 * 65535
    noise: NDArray[np.float64] = total / math.sqrt((65536.0**2 - 1.0) / 3.0)
    return noise


def _spread(key: str, model: ModelSpec) -> float:
    """Standard deviation of one tensor."""
    if key.endswith("layer_norm.weight"):
        return NORM_SPREAD
    if key == "proj.weight":
        return math.pow(MEL_BINS, -0.5)
    return t5_spread(key, model.d_model, model.num_heads, model.d_kv, model.d_ff)


def t5_spread(key: str, width: int, heads: int, d_kv: int, d_ff: int) -> float:
    """The same of a matrix of T5 (v1.1: attention is unscaled, so the query carries the 1/sqrt(d_kv))."""
    fan_in = {
        "decoder_embed_tokens": 1,
        "q": width * d_kv,
        "k": width,
        "v": width,
        "o": heads * d_kv,
        "wi_0": width,
        "wi_1": width,
        "wo": d_ff,
        "lm_head": width,
        "segmem_proj": width,
    }
    return math.pow(fan_in[key.removesuffix(".weight").rpartition(".")[2]], -0.5)
