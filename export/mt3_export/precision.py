"""Which numbers of a network are half as wide, and which are not: see `docs/precision_plan.md`.

A plan is obeyed where a network is traced, through its lowering; nothing converts a finished graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from mt3_export.typed_weights import stored
from mt3_runtime.errors import OptionError
from mt3_runtime.graphs import QUANTIZED, UNCALIBRATED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from mt3_runtime.graphs import Precision

SMALLEST_NORMAL = float(torch.finfo(torch.float32).tiny)  # rows of zeros are divided by it


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """Types of one precision.

    `half` is that of matrices and kernels, of what they are multiplied with, and of what stays on the device between
    graphs (states, vectors of memory, keys and values); None in fp32. All else is float32: sums of products, the
    residual stream, norms, activations, softmax, the router of experts, the head and what is made of its logits.
    `balanced`: whether rows that may grow beyond `half` are divided by their largest number before they are multiplied.
    """

    precision: Precision
    half: torch.dtype | None = None
    balanced: bool = False


class Products:
    """Products in the types of a plan, rounded where a device rounds them and summed in float32."""

    def __init__(self, plan: PrecisionPlan | None = None) -> None:
        self.plan = plan or FP32

    def narrow(self, x: Tensor) -> Tensor:
        """To the type of products."""
        return x if self.plan.half is None or x.dtype == self.plan.half else x.to(self.plan.half)

    def widen(self, x: Tensor) -> Tensor:
        """To float32."""
        return x if x.dtype != self.plan.half else x.to(torch.float32)

    def stored(self, weight: Tensor) -> Tensor:
        """A weight, or what was made of some, in the type that it is stored in."""
        return self.narrow(weight)

    def linear(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Product of x and matrix, both narrow, summed in float32 and rounded, given in float32."""
        return self.widen(self.project(x, matrix))

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Product of x and matrix, both narrow, summed in float32 and given narrow."""
        return self.narrow(self.widen(self.narrow(x)) @ self.widen(self.stored(matrix)))

    def exact_gelu(self, x: Tensor) -> Tensor:
        """GELU by the error function."""
        return F.gelu(x)

    def balanced(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`linear`, where numbers of x may be too large to be narrow: each row is divided by its largest before."""
        if not self.plan.balanced:
            return self.linear(x, matrix)
        largest = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_NORMAL)
        return self.linear(x / largest, matrix) * largest


class TracedProducts(Products):
    """For graphs: weights are stored in half."""

    def stored(self, weight: Tensor) -> Tensor:
        """A weight, or what was made of some, in the type that it is stored in."""
        if self.plan.half is None or weight.dtype == self.plan.half:
            return weight
        return stored(weight, self.plan.half)

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
        """2-D convolution, all narrow."""
        bias = None if bias is None else self.stored(bias)
        return F.conv2d(self.narrow(x), self.stored(kernel), bias, padding=padding)


FP32 = PrecisionPlan("fp32")
PLANS: dict[Precision, PrecisionPlan] = {
    "fp32": FP32,
    "fp16": PrecisionPlan("fp16", torch.float16, balanced=True),
    "bf16": PrecisionPlan("bf16", torch.bfloat16),
}


def checked_precisions(listed: Iterable[str]) -> tuple[Precision, ...]:
    """Every precision once, fp32 first: it decodes what another could not.

    Raises:
        OptionError: one is unknown.
    """
    given = set(listed)
    calibrated = given & set(QUANTIZED) - set(UNCALIBRATED)
    if calibrated:
        raise OptionError(f"{min(calibrated)} is made of a bundle and audio: use mt3-export quantize --calibration")
    known = (*PLANS, *UNCALIBRATED)
    unknown = given - set(known)
    if unknown:
        raise OptionError(f"unknown precision {min(unknown)!r}: use {', '.join(known)}, or some of them with commas")
    return tuple(precision for precision in known if precision in given | {"fp32"})
