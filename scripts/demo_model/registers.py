"""How the residual stream is divided up before training: which dimensions hold positions, times, band levels.

The sinusoid of a position is a set of pairs (sine, cosine), fast ones first. Fast pairs tell frames apart; slow ones
hardly move in a segment, so that their dimensions are free for other things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mt3_export.network import sinusoid

if TYPE_CHECKING:
    from mt3_runtime.specs import ModelSpec

SLOWEST = 0.375  # of all pairs, those below this index turn fast enough to tell frames of a segment apart


@dataclass(frozen=True, slots=True, eq=False)
class Registers:
    """Dimensions by purpose, as indices; `place`, `now` and `then` correspond pair by pair.

    `place`: the position itself, as the sinusoid gives it. `now`: in the decoder, the time of the last shift; free in
    the encoder. `then`: the time of the next event. `free`: everything else. `bands`: two sets of free dimensions
    for the levels of frequency bands.
    """

    place: Tensor  # [d_kv]
    now: Tensor  # [d_kv]
    then: Tensor  # [d_kv]
    free: Tensor  # [d_model - 3 * d_kv]
    bands: tuple[Tensor, Tensor]  # [2/3 d_kv] each
    frequencies: Tensor  # [d_kv / 2] of `place`, in radians per frame


def divide(model: ModelSpec) -> Registers:
    """The division of a network's residual stream."""
    count, half = model.d_kv // 2, model.d_model // 2
    fast = (torch.arange(count) * (SLOWEST * half) / count).long()
    now = torch.arange(half - count, half)
    then = torch.arange(half - 2 * count, half - count)
    taken = set(torch.cat((fast, now, then)).tolist())
    free = torch.tensor([index for index in range(half) if index not in taken])
    slow = free[-(model.d_kv * 2 // 3) :]
    exponents = fast.double() / half
    return Registers(
        place=_dimensions(fast, half),
        now=_dimensions(now, half),
        then=_dimensions(then, half),
        free=_dimensions(free, half),
        bands=(slow, slow + half),
        frequencies=(10000.0**-exponents).float(),
    )


def _dimensions(pairs: Tensor, half: int) -> Tensor:
    """Sines, then cosines, of the pairs."""
    return torch.cat((pairs, pairs + half))


def codes(model: ModelSpec, registers: Registers, frames: Tensor) -> Tensor:
    """The position codes of `frames`, in the order of `Registers.place`: [frames, d_kv]."""
    length = int(frames.max()) + 1
    return sinusoid(length, model.d_model, model.position_base)[frames][:, registers.place]


def turn(angles: Tensor) -> Tensor:
    """The matrix [d_kv, d_kv] that turns every pair of a code by its angle, so that it reads as a later position."""
    cosine, sine = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat((torch.cat((cosine, sine), 1), torch.cat((-sine, cosine), 1)))
