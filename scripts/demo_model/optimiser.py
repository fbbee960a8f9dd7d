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
_KEPT = (("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq"))  # for each tensor, by Muon and by AdamW


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

    def restore(self, state: list[dict[str, Any]], steps: int) -> None:
        """Go on from `state`, after so many steps.

        Raises:
            ValueError: it is not what these steps leave for these tensors.
        """
        for (part, _), names, stored in zip(self.parts, _KEPT, state, strict=True):
            # Only what was learned: the settings are this module's.
            part.load_state_dict({**part.state_dict(), "state": stored["state"]})
            tensors = [tensor for group in part.param_groups for tensor in group["params"]]
            if len(part.state) != (len(tensors) if steps else 0):
                raise ValueError(f"{len(part.state)} of {len(tensors)} tensors after {steps} steps")
            for tensor, kept in part.state.items():
                shapes = {name: value.shape for name, value in kept.items()}
                if shapes != {name: () if name == "step" else tensor.shape for name in names}:
                    raise ValueError(f"{shapes} for a tensor of {tensor.shape}")
