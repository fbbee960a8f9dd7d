"""Random weights of any YourMT3 network, drawn as in `random_weights`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from mt3_export.random_weights import NORM_SPREAD, t5_spread, unit_noise
from mt3_export.yourmt3_layout import expected_shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from mt3_export.yourmt3_layout import Layout

_T5 = ("decoder", "lm_head.", "encoder.block.")
_DEVIATIONS = {"running_mean": 0.2, "latents": 1.0, "_pos_emb": 0.5}
# A rectifier and GELU take about half the power. Latents and channels must see and hear unlike things, or they end up
# alike. The first convolution stands behind nothing.
_GAINS = {
    "blocks.0.conv1.weight": 1.0,
    "conv1.weight": 2**0.5,
    "conv2.weight": 2**0.5,
    "dense2.weight": 2**0.5,
    "spectral_cross_attention.self.query.weight": 4.0,
    "EncDecAttention.o.weight": 2.0,
}
# Features are 0 to 1 and hardly differ from their neighbours; what later convolutions see varies by about 1.
_FIRST_VARIANCE = 0.1


def random_yourmt3_tensors(layout: Layout, seed: int, num_heads: int = 6) -> dict[str, Tensor]:
    """Weights for every key of `expected_shapes(layout)`, drawn in that order; the fixed tables are what they must be.

    Args:
        layout: any sizes.
        seed: 0 or more.
        num_heads: of T5.

    Returns:
        float32 tensors.
    """
    sizes = layout.sizes
    widths = sizes.d_model, num_heads, sizes.inner // num_heads, sizes.d_ff
    stream = np.random.PCG64(seed)
    tensors = {}
    for key, shape in expected_shapes(layout).items():
        values = _fixed_table(key, shape)
        if values is None:
            noise = unit_noise(stream, math.prod(shape))
            t5 = len(shape) > 1 and key.startswith(_T5)
            values = t5_spread(key, *widths) * _gain(key) * noise if t5 else _draw(key, noise, shape)
        tensors[key] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return tensors


def _fixed_table(key: str, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    if key.endswith(".positions"):
        return sinusoid_table(*shape)
    if key.endswith(".freqs"):
        return rotary_frequencies(key, shape[0])
    return None


def sinusoid_table(rows: int, width: int) -> NDArray[np.float64]:
    """The position codes that the files store: sines of all frequencies, then cosines [rows, width]."""
    angles = np.arange(rows)[:, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1)


def rotary_frequencies(key: str, count: int) -> NDArray[np.float64]:
    """The frequencies that the files store: multiples of pi over latents, falling powers over frames [count]."""
    if "temporal" in key:
        return 10000.0 ** (-np.arange(count) / count)
    return np.linspace(1.0, 5.0, count) * math.pi


def _draw(key: str, noise: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A tensor of the convolutions or the PerceiverTF encoder, or a gain or bias of any part."""
    name = key.rpartition(".")[2]
    if name == "running_var":
        variance = _FIRST_VARIANCE if key.startswith("pre_encoder.0.blocks.0.bn1.") else 1.0
        return variance * (1 + 0.2 * noise)
    if name in _DEVIATIONS:
        return _DEVIATIONS[name] * noise
    if len(shape) == 1:
        return float(name == "weight") + NORM_SPREAD * noise
    return noise * (_gain(key) * math.pow(math.prod(shape[1:]), -0.5))


def _gain(key: str) -> float:
    return next((gain for suffix, gain in _GAINS.items() if key.endswith(suffix)), 1.0)
