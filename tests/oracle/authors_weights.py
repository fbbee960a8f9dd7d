"""Puts weights into the authors' T5 networks; runs in the oracle's environment alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# The same matrix under a second name, in every one of these networks.
SECOND_NAMES = {
    "encoder.embed_tokens.weight": "proj.weight",
    "decoder.embed_tokens.weight": "decoder_embed_tokens.weight",
}


def with_weights(
    network: nn.Module, weights: Mapping[str, Tensor], second_names: Mapping[str, str] = SECOND_NAMES
) -> nn.Module:
    """The network with these weights and no others, in eval mode."""
    width, bins = weights["proj.weight"].shape
    if bins != width:  # the authors wrote a square projection, for their 512 bins and width 512
        network.proj = nn.Linear(bins, width, bias=False)
        network.encoder.embed_tokens = network.proj
    constants = {key: value for key, value in network.state_dict().items() if key.endswith("inv_freq")}
    copies = {second: weights[first] for second, first in second_names.items()}
    network.load_state_dict({**constants, **weights, **copies}, strict=True)
    return network.eval()
