"""The sizes of a network, as the shapes of its tensors tell them; without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the shapes of a state dict tell; `inner` is num_heads * d_kv."""

    d_model: int
    inner: int
    d_ff: int
    encoder_layers: int
    decoder_layers: int
    vocab_size: int


MT3_SIZES = Sizes(d_model=512, inner=384, d_ff=1024, encoder_layers=8, decoder_layers=8, vocab_size=1536)
