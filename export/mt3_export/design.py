"""What the encoder of a checkpoint is made of, where the shapes of its tensors do not tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class PerceiverDesign:
    """A PerceiverTF encoder behind a convolutional pre-encoder (YourMT3 `model/perceiver_mod.py`).

    `residual`: whether spectral cross-attention adds to its queries. `chosen`: experts that each token goes through,
    0 where the feed-forward is a plain MLP. `norm`: kind of every norm. All sizes, and whether positions are trained
    or rotary, are those of the tensors.
    """

    heads: int
    residual: bool
    chosen: int
    norm: Literal["layer", "rms"]
