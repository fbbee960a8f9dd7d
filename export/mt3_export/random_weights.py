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

_NORM_SPREAD = 0.05


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
        noise = _unit_noise(stream, math.prod(shape))
        centre = 1.0 if len(shape) == 1 else 0.0
        values = (centre + _spread(key, model) * noise).astype(np.float32)
        tensors[key] = torch.from_numpy(values.reshape(shape))
    return tensors


def _unit_noise(stream: np.random.PCG64, count: int) -> NDArray[np.float64]:
    """Nearly normal noise of mean 0 and variance 1.

    The four 16-bit parts of each raw word are added: integers only, so that no library's logarithm and no version
    of a sampling method can change a bit.
    """
    parts = stream.random_raw(count).view(np.uint16).reshape(count, 4)
    total = parts.sum(axis=1, dtype=np.int64) - 2 * 65535
    noise: NDArray[np.float64] = total / math.sqrt((65536.0**2 - 1.0) / 3.0)
    return noise


def _spread(key: str, model: ModelSpec) -> float:
    """Standard deviation of one tensor (T5 v1.1: attention is unscaled, so the query carries the 1/sqrt(d_kv))."""
    width, inner = model.d_model, model.num_heads * model.d_kv
    name = key.removesuffix(".weight").rpartition(".")[2]
    fan_in = {
        "proj": MEL_BINS,
        "decoder_embed_tokens": 1,
        "q": width * model.d_kv,
        "k": width,
        "v": width,
        "o": inner,
        "wi_0": width,
        "wi_1": width,
        "wo": model.d_ff,
        "lm_head": width,
    }
    return _NORM_SPREAD if name.endswith("layer_norm") else float(fan_in[name]) ** -0.5
