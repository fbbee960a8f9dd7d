"""How weights are changed: Muon for the matrices inside the blocks, AdamW for the rest, one schedule for both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

MATRICES, OTHERS = 0.005, 0.00125  # peak learning rates; at twice as much, learning stops after 500 steps
WARM_UP = 50  # steps
SLOWED = 250  # step after which the rate falls with the root of the number of steps
ANNEALED = 0.4  # last share of all steps, over which the rate falls to nothing


def schedule(step: int, steps: int) -> float:
    """The learning rate of step 0 to `steps` - 1, as a share of its peak."""
    warm = (step + 1) / WARM_UP
    slow = math.sqrt(SLOWED / max(SLOWED, step))
    cool = (steps - step) / max(1.0, ANNEALED * steps)
    return min(warm, slow * min(1.0, cool))


class Optimiser:
    """Both optimisers over all trained tensors."""

    def __init__(self, weights: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> None:
        inside = [key for key, tensor in weights.items() if ".block." in key and tensor.dim() == 2]
        others = [tensor for key, tensor in weights.items() if key not in set(inside)] + list(extra.values())
        # Muon orthogonalises each update (Jordan 2024); scaled to the size of AdamW's, one schedule fits both.
        matrices = [weights[key] for key in inside]
        self.parts: tuple[tuple[torch.optim.Optimizer, float], ...] = (
            (torch.optim.Muon(matrices, MATRICES, 0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw"), MATRICES),
            (torch.optim.AdamW(others, OTHERS, betas=(0.9, 0.98), weight_decay=0.0), OTHERS),
        )

    def step(self, share: float) -> None:
        """Apply and clear the gradients, at `share` of the peak learning rates."""
        for part, peak in self.parts:
            for group in part.param_groups:
                group["lr"] = share * peak
            part.step()
            part.zero_grad()

    def state(self) -> list[dict[str, Any]]:
        """Everything needed to go on."""
        return [part.state_dict() for part, _ in self.parts]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Go on from `state`."""
        for (part, _), stored in zip(self.parts, state, strict=True):
            part.load_state_dict(stored)
