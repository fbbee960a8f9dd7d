"""The five published YourMT3 models: what each is made of, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

SEGMENT_SAMPLES = 32_767
EVENT_TOKENS = 596  # of both vocabularies
TABLE_ROWS = 1034  # of every sinusoid: 1024 tokens and ten to spare


@dataclass(frozen=True, slots=True)
class Constants:
    """What tells a model from the others, and what the shapes of its tensors do not tell.

    `residual`: whether spectral cross-attention adds to its queries. `experts` in all and `chosen` for each token, 0
    where the feed-forward is an MLP; experts go with rotary positions, an MLP with trained ones. `num_heads` are those
    of T5. Source: the arguments of `model_helper.py` in the Space mimbres/YourMT3, over `config/config.py`.
    """

    frontend: Literal["yourmt3_mel", "yourmt3_spectrum"] = "yourmt3_spectrum"
    hop_length: int = 300
    latents: int = 26
    channels: int = 13
    max_length: int = 256
    residual: bool = False
    experts: int = 0
    chosen: int = 0
    num_heads: int = 6


_MOE = Constants(residual=True, experts=8, chosen=2)
MODELS: Mapping[str, Constants] = MappingProxyType(
    {
        "ymt3plus": Constants("yourmt3_mel", hop_length=128, latents=0, channels=1, max_length=1024),
        "yptf-single": Constants(latents=24, channels=1, max_length=1024),
        "yptf-multi": Constants(),
        "yptf-moe-multi": _MOE,
        "yptf-moe-multi-ps": _MOE,
    }
)


def identify(names: bytes) -> tuple[str, ...]:
    """The models that hold tensors of these names; none if it is no YourMT3 network.

    The last two are one network; only that trained with pitch shifting may still hold what shifted it.

    Args:
        names: keys of a state dict, or the pickle that they stand in.
    """
    if b"encoder.latent_array.latents" not in names:
        return ("ymt3plus",) if b"encoder.encoder.additive_pe.weight" in names else ()
    if b".mlp.experts." in names:
        return ("yptf-moe-multi-ps",) if b"pitchshift" in names else ("yptf-moe-multi", "yptf-moe-multi-ps")
    if b"pre_decoder.0.projection_layer" in names:
        return ("yptf-single",)
    return ("yptf-multi",) if b"pre_decoder.0.linear" in names else ()
