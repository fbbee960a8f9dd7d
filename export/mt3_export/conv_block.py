"""The convolutional front of YourMT3's PerceiverTF encoders (YourMT3 `model/conv_block.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from mt3_export.conv_strips import StripFront
from mt3_export.conv_weights import BlockWeights, block_weights
from mt3_export.weights import constant
from mt3_export.winograd import TILE

if TYPE_CHECKING:
    from mt3_export.lowering import Lowering
    from mt3_export.weights import Weights

POOL = 2  # bins that every block makes one of


class ConvBlock(nn.Module):
    """`BlockWeights`: [n, channels, frames, bins] -> half the bins."""

    def __init__(self, weights: BlockWeights, ops: Lowering) -> None:
        super().__init__()
        self.ops = ops
        self.first, self.first_bias = constant(weights.first), constant(weights.first_bias)
        self.second, self.second_bias = constant(weights.second), constant(weights.second_bias)
        self.shortcut = None if weights.shortcut is None else constant(weights.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        rest = x if self.shortcut is None else self.ops.convolve(x, self.shortcut)
        y = self.ops.convolve(x, self.first, self.first_bias, padding=1).relu()
        y = self.ops.convolve(y, self.second, self.second_bias, padding=1) + rest
        return F.avg_pool2d(y.relu(), (1, POOL))


class ImageFront(nn.Module):
    """All blocks on whole images."""

    def __init__(self, blocks: list[BlockWeights], ops: Lowering) -> None:
        super().__init__()
        self.ops = ops
        self.blocks = nn.ModuleList(ConvBlock(block, ops) for block in blocks)

    def forward(self, features: Tensor) -> Tensor:
        x = self.ops.narrow(features.unsqueeze(1))
        for block in self.blocks:
            x = block(x)
        return x.transpose(1, 2)


def conv_front(weights: Weights, frames: int, bins: int, ops: Lowering) -> ImageFront | StripFront:
    """All blocks: features [segments, frames, bins] -> [segments, frames, channels, bins / 8].

    In strips where there are fewer products worth more sums, and every block's columns make whole tiles.
    """
    blocks = [block_weights(weights.below(str(i))) for i in range(weights.count())]
    whole = bins % (TILE * POOL ** (len(blocks) - 1)) == 0
    return StripFront(blocks, frames, bins) if ops.winograd and whole else ImageFront(blocks, ops)
