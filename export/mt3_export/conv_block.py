"""The convolutional front of YourMT3's PerceiverTF encoders (YourMT3 `model/conv_block.py`)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from mt3_export.weights import constant
from mt3_export.winograd import RowConv

if TYPE_CHECKING:
    from collections.abc import Callable

    from mt3_export.lowering import Lowering
    from mt3_export.weights import Weights

BATCH_NORM_EPSILON = 1e-5


Parts = tuple[Tensor, ...]  # an image as one array, or its even and odd rows in two


class Conv(nn.Module):
    """relu(conv(x) + rest) with a 3x3 kernel, on a whole image."""

    def __init__(self, kernel: Tensor, bias: Tensor, ops: Lowering) -> None:
        super().__init__()
        self.ops, self.kernel, self.bias = ops, constant(kernel), constant(bias)

    def forward(self, parts: Parts, rest: Parts | None = None) -> Parts:
        y = self.ops.convolve(parts[0], self.kernel, self.bias, padding=1)
        return ((y if rest is None else y + rest[0]).relu(),)


class ConvBlock(nn.Module):
    """pool(relu(conv(relu(conv(x))) + shortcut(x))): [n, channels, frames, bins] -> half the bins.

    The statistics of both batch norms are part of the convolutions. The shortcut is a 1x1 convolution where the
    number of channels changes; its bias is added to the second convolution's.
    """

    def __init__(self, weights: Weights, conv: Callable[[Tensor, Tensor], Conv | RowConv], ops: Lowering) -> None:
        super().__init__()
        self.ops = ops
        self.first = conv(*folded(weights, "conv1", "bn1"))
        kernel, bias = folded(weights, "conv2", "bn2")
        self.shortcut = None
        if "shortcut.weight" in weights:
            self.shortcut = constant(weights.exact("shortcut.weight"))
            bias = bias + weights.exact("shortcut.bias")
        self.second = conv(kernel, bias)

    def forward(self, parts: Parts) -> Parts:
        rest = parts if self.shortcut is None else tuple(self.ops.convolve(x, self.shortcut) for x in parts)
        return tuple(F.avg_pool2d(x, (1, 2)) for x in self.second(self.first(parts), rest))


class Front(nn.Module):
    """All blocks: features [segments, frames, bins] -> [segments, channels, frames, bins / 8]."""

    def __init__(self, weights: Weights, frames: int, ops: Lowering) -> None:
        super().__init__()
        self.ops = ops
        self.apart = ops.winograd and frames % 2 == 0
        conv = RowConv if self.apart else functools.partial(Conv, ops=ops)
        self.blocks = nn.ModuleList(ConvBlock(weights.below(str(i)), conv, ops) for i in range(weights.count()))

    def forward(self, features: Tensor) -> Tensor:
        image = self.ops.narrow(features.unsqueeze(1))
        parts = (image[:, :, 0::2], image[:, :, 1::2]) if self.apart else (image,)
        for block in self.blocks:
            parts = block(parts)
        return torch.stack(parts, 3).flatten(2, 3)


def folded(weights: Weights, conv: str, norm: str) -> tuple[Tensor, Tensor]:
    """Kernel and bias, in float64, of a convolution and the batch norm behind it."""
    gain, bias, mean, variance = (
        weights.exact(f"{norm}.{part}") for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / (variance + BATCH_NORM_EPSILON).sqrt()
    return weights.exact(f"{conv}.weight") * scale[:, None, None, None], bias - mean * scale
