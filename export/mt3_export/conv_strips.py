"""The front of `conv_block` in the strips of `winograd`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from mt3_export.weights import constant
from mt3_export.winograd import SPAN, TAPS, TILE, Operands, StripConv, Strips, by_phase, each_strip, strip_conv

if TYPE_CHECKING:
    from mt3_export.conv_weights import BlockWeights

MARGIN = TAPS // 2  # rows or columns that a convolution reads beyond its own, on either side
WINDOW = TILE + 4 * MARGIN  # rows of features that a strip of the first block is made of


class Pooling(NamedTuple):
    """Mean of every two phases [2, 4], and the order in which columns are taken from what that gives."""

    mean: Tensor
    order: Tensor


class Pool(nn.Module):
    """Holds the operands of pooling: columns come out by phase again, or in their own order."""

    mean: Tensor
    order: Tensor

    def __init__(self, columns: int, *, phases: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.eye(TILE // 2).repeat_interleave(2, 1) / 2)
        own = torch.arange(columns // 2).reshape(-1, TILE // 2).T.flatten()  # the column that stands at each place
        order = own.argsort()
        self.register_buffer("order", by_phase(order) if phases else order)

    def forward(self) -> Pooling:
        return Pooling(self.mean, self.order)


def pooled(x: Tensor, pool: Pooling) -> Tensor:
    """Every two columns of a strip in one: [4, columns, channels] by phase -> [4, columns / 2, channels]."""
    y = pool.mean @ x.reshape(TILE, TILE, -1)
    return y.reshape(TILE, -1, x.shape[2]).index_select(1, pool.order)


def _matrix(kernel: Tensor) -> Tensor:
    """A kernel [out, in, ...] to multiply by, for a buffer: a matrix that was folded is not stored in fewer bits."""
    return kernel.flatten(1).T.contiguous().float()


class FirstBlock(nn.Module):
    """One block on windows of features [strips, 8, 3, columns] -> [strips, 4, columns / 2, channels].

    The third axis: their own column and its neighbours.
    """

    first: Tensor

    def __init__(self, weights: BlockWeights, columns: int) -> None:
        super().__init__()
        self.register_buffer("first", _matrix(weights.first))
        self.first_bias = constant(weights.first_bias)
        self.shortcut = constant(torch.ones(1) if weights.shortcut is None else weights.shortcut.flatten())
        self.second, self.pool = StripConv(weights.second, weights.second_bias), Pool(columns, phases=True)

    def forward(self, windows: Tensor, combine: Tensor) -> Tensor:
        arrays = windows, combine
        return each_strip(_first_block, arrays, self.first, self.first_bias, self.shortcut, self.second(), self.pool())


def _first_block(
    window: Tensor, combine: Tensor, first: Tensor, bias: Tensor, shortcut: Tensor, conv: Operands, pool: Pooling
) -> Tensor:
    """One strip: first [9, channels]; bias, shortcut [channels].

    The first convolution is made anew for the rows that neighbouring strips share: with one channel, that costs less
    than memory does.
    """
    taps = torch.cat([window[i : i + SPAN] for i in range(TAPS)], 1)  # [6, 9, columns]
    x = (taps.transpose(1, 2) @ first + bias).relu()
    rest = window[2 * MARGIN : 2 * MARGIN + TILE, MARGIN, :, None] * shortcut
    return pooled((strip_conv(x, combine, conv) + (rest + conv.bias)).relu(), pool)


class Block(nn.Module):
    """Any other block: [strips, 4, columns, channels] -> half the columns, or channels first at the end."""

    shortcut: Tensor | None

    def __init__(self, weights: BlockWeights, columns: int, *, last: bool) -> None:
        super().__init__()
        self.last = last
        self.first = StripConv(weights.first, weights.first_bias)
        self.second, self.pool = StripConv(weights.second, weights.second_bias), Pool(columns, phases=not last)
        self.register_buffer("shortcut", None if weights.shortcut is None else _matrix(weights.shortcut))

    def forward(self, x: Tensor, rows: Tensor, combine: Tensor) -> Tensor:
        between = each_strip(_first_half, (rows, combine), x.flatten(0, 1), self.first())
        rest = x if self.shortcut is None else x @ self.shortcut
        second = _last_half if self.last else _second_half
        return each_strip(second, (rows, combine, rest), between.flatten(0, 1), self.second(), self.pool())


def _first_half(rows: Tensor, combine: Tensor, image: Tensor, conv: Operands) -> Tensor:
    """One strip of relu(conv(image)), of `rows` of the image [rows, columns, channels]."""
    return (strip_conv(image.index_select(0, rows), combine, conv) + conv.bias).relu()


def _second_half(rows: Tensor, combine: Tensor, rest: Tensor, image: Tensor, conv: Operands, pool: Pooling) -> Tensor:
    """One strip of pool(relu(conv(image) + rest))."""
    y = strip_conv(image.index_select(0, rows), combine, conv) + rest + conv.bias
    return pooled(y.relu(), pool)


def _last_half(rows: Tensor, combine: Tensor, rest: Tensor, image: Tensor, conv: Operands, pool: Pooling) -> Tensor:
    """The same [4, channels, columns / 2]."""
    return _second_half(rows, combine, rest, image, conv, pool).transpose(1, 2)


class StripFront(nn.Module):
    """All blocks, at least two: features [segments, frames, bins] -> [segments, frames, channels, bins / 8]."""

    windows: Tensor

    def __init__(self, blocks: list[BlockWeights], frames: int, bins: int) -> None:
        super().__init__()
        self.frames, self.strips = frames, Strips(frames)
        self.first = FirstBlock(blocks[0], bins)
        self.others = nn.ModuleList(
            Block(block, bins >> i, last=block is blocks[-1]) for i, block in enumerate(blocks[1:], 1)
        )
        first = TILE * torch.arange(self.strips.count)[:, None]
        self.register_buffer("windows", (first + torch.arange(WINDOW)).flatten())

    def forward(self, features: Tensor) -> Tensor:
        rows, combine = self.strips(features.shape[0])
        x: Tensor = self.first(self._windows(features), combine)
        for block in self.others:
            x = block(x, rows, combine)
        return x.reshape(features.shape[0], -1, *x.shape[2:])[:, : self.frames]

    def _windows(self, features: Tensor) -> Tensor:
        """What the first block reads [strips, 8, 3, bins]."""
        columns, behind = features.shape[2], TILE * self.strips.count - self.frames
        padded = F.pad(features, (MARGIN, MARGIN, 2 * MARGIN, 2 * MARGIN + behind))
        shifted = torch.stack([padded[:, :, i : i + columns] for i in range(TAPS)], 2)  # [segments, rows, 3, columns]
        return by_phase(shifted).index_select(1, self.windows).reshape(-1, WINDOW, TAPS, columns)
