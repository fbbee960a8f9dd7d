"""Reads the tensors of a checkpoint as the parameters of modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping


class Weights:
    """Reads tensors below one prefix; matrices come out transposed, and fused when several are named."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self.tensors, self.prefix = tensors, prefix

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.tensors

    def below(self, prefix: str) -> Weights:
        """The same tensors, one level down."""
        return Weights(self.tensors, f"{self.prefix}{prefix}.")

    def count(self, prefix: str = "") -> int:
        """How many of `prefix`.0, `prefix`.1, ... there are."""
        start = f"{self.prefix}{prefix}." if prefix else self.prefix
        return len({name.removeprefix(start).split(".")[0] for name in self.tensors if name.startswith(start)})

    def exact(self, name: str) -> Tensor:
        """A tensor in float64, to compute constants from."""
        return self.tensors[f"{self.prefix}{name}"].double()

    def matrix(self, *names: str) -> nn.Parameter:
        """The named [out, in] matrices side by side as one [in, sum of outs]."""
        parts = [self.tensors[f"{self.prefix}{name}.weight"] for name in names]
        return constant(torch.cat(parts).T.contiguous())

    def vector(self, name: str) -> nn.Parameter:
        """A weight as it stands."""
        return constant(self.tensors[f"{self.prefix}{name}.weight"])


def constant(tensor: Tensor) -> nn.Parameter:
    """A parameter in float32 that nobody trains."""
    return nn.Parameter(tensor.float(), requires_grad=False)
