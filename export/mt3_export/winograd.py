"""The convolutions of `conv_block` with a third fewer products: Winograd's F(2, 3) along the rows.

Even and odd rows are kept apart from the first convolution to the last, so that every transform is a sum of whole
arrays. Rows d0..d3 give the two outputs between them by four products instead of six, kernel rows being g0..g2:

    m1 = (d0 - d2) g0     m2 = (d1 + d2) (g0 + g1 + g2) / 2     m3 = (d2 - d1) (g0 - g1 + g2) / 2     m4 = (d1 - d3) g2
    y0 = m1 + m2 + m3     y1 = m2 - m3 - m4

Differences are written as depthwise convolutions, because ONNX Runtime keeps its blocked layout through
convolutions and additions only. Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from mt3_export.weights import constant

Rows = tuple[Tensor, ...]  # even and odd ones, each [n, channels, frames / 2, bins]


class RowConv(nn.Module):
    """relu(conv(x) + rest) with a 3x3 kernel, on rows kept apart."""

    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        super().__init__()
        channels = kernel.shape[1]
        self.single = channels == 1
        kernels = _two_channels(kernel) if self.single else _products(kernel)
        self.kernels, self.bias = nn.ParameterList(constant(part) for part in kernels), constant(bias)
        self.above, self.below, self.minus = (
            constant(torch.tensor(taps).reshape(1, 1, -1, 1).repeat(channels, 1, 1, 1))
            for taps in ([1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [-1.0])
        )

    def forward(self, rows: Rows, rest: Rows | None = None) -> Rows:
        if self.single:
            both = torch.cat(rows, 1)
            return tuple(F.conv2d(both, kernel, self.bias, padding=1).relu() for kernel in self.kernels)
        even, odd = rows  # d1 and d2; those around them are odd[i - 1] and even[i + 1]
        m2 = self._product(1, even + odd)
        m3 = self._product(2, odd + _each(even, self.minus))
        total, difference = m2 + m3, m2 + _each(m3, self.minus)
        if rest is not None:
            total, difference = total + rest[0], difference + rest[1]
        y0 = self._product(0, _each(odd, self.above), self.bias) + total
        y1 = self._product(3, _each(even, self.below), self.bias) + difference
        return y0.relu(), y1.relu()

    def _product(self, index: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, self.kernels[index], bias, padding=(0, 1))


def _each(x: Tensor, taps: Tensor) -> Tensor:
    """Every channel by itself, along the rows."""
    return F.conv2d(x, taps, padding=(taps.shape[2] // 2, 0), groups=len(taps))


def _products(kernel: Tensor) -> tuple[Tensor, ...]:
    """What the four sums of rows are convolved with, the last one negative [out, in, 1, 3]."""
    g0, g1, g2 = torch.split(kernel, 1, 2)
    return g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, -g2


def _two_channels(kernel: Tensor) -> tuple[Tensor, ...]:
    """One channel's kernel for even, then for odd outputs, over even and odd rows as two channels [out, 2, 3, 3].

    With so few products there is nothing to save.
    """
    g0, g1, g2 = torch.split(kernel, 1, 2)
    none = torch.zeros_like(g0)
    even = torch.cat((none, g1, none), 2), torch.cat((g0, g2, none), 2)
    odd = torch.cat((none, g0, g2), 2), torch.cat((none, g1, none), 2)
    return torch.cat(even, 1), torch.cat(odd, 1)
