"""The convolutions of `conv_block` with a quarter of the products: Winograd's F(4x4, 3x3), strip by strip.

Six rows and columns of an image, combined by fixed sums into as many others, give four rows and columns of the result
by 36 products instead of 144. Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015.

An image is held in strips of four rows, channels innermost, [strips, 4, columns, channels]. Columns stand by phase:
0, 4, 8..., then 1, 5, 9... and so on, so that every sum is one small matrix times whole arrays. All of a strip stays
in a core's caches, which is worth more than the products: a whole image between two sums is memory's to move.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mt3_export.weights import constant

if TYPE_CHECKING:
    from collections.abc import Callable

# Where polynomials are evaluated, beside infinity: of what float32 holds exactly, the smallest error that was found.
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
TILE, TAPS = 4, 3
SPAN = TILE + TAPS - 1  # rows or columns that four of the result are made of


def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Matrices of inputs [6, 6], of kernels [6, 3] and of results [4, 6], in float64; the first is exact in float32."""
    others = [[other for other in POINTS if other != point] for point in POINTS]
    inputs = np.zeros((SPAN, SPAN))
    inputs[:-1, :-1] = [np.poly(roots)[::-1] for roots in others]
    inputs[-1] = np.poly(POINTS)[::-1]
    scales = [np.prod(np.subtract(point, roots)) for point, roots in zip(POINTS, others, strict=True)]
    kernels = np.vstack((np.vander(POINTS, TAPS, increasing=True) / np.array(scales)[:, None], np.eye(TAPS)[-1]))
    results = np.vstack((np.vander(POINTS, TILE, increasing=True), np.eye(TILE)[-1])).T
    return torch.from_numpy(inputs), torch.from_numpy(kernels), torch.from_numpy(results.copy())


INPUTS, KERNELS, RESULTS = transforms()


class Operands(NamedTuple):
    """Of the convolution of a strip: kernels [36, in, out], bias [out], matrices of inputs and of results."""

    kernels: Tensor
    bias: Tensor
    inputs: Tensor
    results: Tensor


class StripConv(nn.Module):
    """Holds the operands of one 3x3 convolution."""

    inputs: Tensor
    results: Tensor

    def __init__(self, kernel: Tensor, bias: Tensor) -> None:
        super().__init__()
        products = torch.einsum("ri,cj,nkij->rckn", KERNELS, KERNELS, kernel)
        self.kernels, self.bias = constant(products.flatten(0, 1)), constant(bias)
        self.register_buffer("inputs", INPUTS.float())
        self.register_buffer("results", RESULTS.float())

    def forward(self) -> Operands:
        return Operands(self.kernels, self.bias, self.inputs, self.results)


def strip_conv(rows: Tensor, combine: Tensor, conv: Operands) -> Tensor:
    """Convolve one strip, but for the bias.

    Its rows and one on either side [6, columns, in], and the matrix that combines them -> [4, columns, out].
    """
    _, columns, channels = rows.shape
    tiles = columns // TILE
    x = (combine @ rows.flatten(1)).reshape(rows.shape)
    # The last phase stands left of the first one, a tile before; the first one right of the last, a tile later.
    edge = torch.zeros(SPAN, 1, channels, dtype=rows.dtype)
    x = torch.cat((edge, x[:, columns - tiles : columns - 1], x, x[:, 1:tiles], edge), 1)
    x = conv.inputs @ x.reshape(SPAN, SPAN, tiles * channels)
    y = x.reshape(SPAN * SPAN, tiles, channels) @ conv.kernels
    y = conv.results @ y.reshape(SPAN, -1)
    return (conv.results @ y.reshape(TILE, SPAN, -1)).reshape(TILE, columns, -1)


class Strips(nn.Module):
    """Which rows every strip of an image of `frames` rows reads, and with which matrix.

    Columns of the matrix for rows that the image lacks are zero: those above and below it, and those behind its end
    in the last strip, which hold what nobody reads.
    """

    rows: Tensor
    combine: Tensor

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.count = -(-frames // TILE)
        rows = TILE * torch.arange(self.count)[:, None] + torch.arange(-1, SPAN - 1)
        there = (rows >= 0) & (rows < frames)
        self.register_buffer("rows", torch.where(there, rows, 0))
        self.register_buffer("combine", (INPUTS * there[:, None]).float())

    def forward(self, segments: int) -> tuple[Tensor, Tensor]:
        """Rows [segments * strips, 6], counted through all segments, and matrices [segments * strips, 6, 6]."""
        first = TILE * self.count * torch.arange(segments)
        return (self.rows + first[:, None, None]).flatten(0, 1), self.combine.repeat(segments, 1, 1)


def each_strip(function: Callable[..., Tensor], arrays: tuple[Tensor, ...], *whole: object) -> Tensor:
    """`function` of the first of every array, of the second, and so on: what it returns, stacked. ONNX: one Scan.

    What it gets behind them, tensors or tuples of tensors, is the same for all. It may read nothing else, and call
    no module: tracing knows of none there.
    """
    given, structure = pytree.tree_flatten(whole)

    def step(*flat: Tensor) -> tuple[Tensor]:
        strip, same = flat[: len(arrays)], pytree.tree_unflatten(list(flat[len(arrays) :]), structure)
        return (function(*strip, *same),)

    # Not the public `scan`, which compiles what it is given: that takes seconds. Here, as torch may move it.
    from torch._higher_order_ops.scan import scan_op  # noqa: PLC0415

    results: tuple[Tensor] = scan_op(step, (), arrays, tuple(given))
    return results[0]


def by_phase(x: Tensor) -> Tensor:
    """Columns [..., columns] in the order of strips."""
    return x.reshape(*x.shape[:-1], -1, TILE).transpose(-1, -2).reshape(x.shape)
