"""Kernels and biases of one block of convolutions, the statistics of its batch norms folded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from mt3_export.weights import Weights

BATCH_NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """pool(relu(second(relu(first(x))) + shortcut(x))), all in float64.

    Kernels [out, in, 3, 3]. The shortcut [out, in, 1, 1] is there where the number of channels changes; its bias is
    added to the second convolution's.
    """

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    shortcut: Tensor | None


def block_weights(weights: Weights) -> BlockWeights:
    """Read one block of a checkpoint."""
    first, first_bias = _folded(weights, "conv1", "bn1")
    second, second_bias = _folded(weights, "conv2", "bn2")
    shortcut = None
    if "shortcut.weight" in weights:
        shortcut = weights.exact("shortcut.weight")
        second_bias = second_bias + weights.exact("shortcut.bias")
    return BlockWeights(first, first_bias, second, second_bias, shortcut)


def _folded(weights: Weights, conv: str, norm: str) -> tuple[Tensor, Tensor]:
    gain, bias, mean, variance = (
        weights.exact(f"{norm}.{part}") for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / (variance + BATCH_NORM_EPSILON).sqrt()
    return weights.exact(f"{conv}.weight") * scale[:, None, None, None], bias - mean * scale
