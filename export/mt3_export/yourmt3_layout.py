"""The sizes of a YourMT3 network, and which tensors it has in which shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from mt3_export.sizes import Sizes
from mt3_export.state import block_shapes
from mt3_export.yourmt3_models import EVENT_TOKENS, TABLE_ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mt3_export.yourmt3_models import Constants

Shapes = dict[str, tuple[int, ...]]
CONV_BLOCKS = 3
HALVINGS = 2**CONV_BLOCKS  # every block of the pre-encoder averages pairs of bins


@dataclass(frozen=True, slots=True)
class PerceiverSizes:
    """A PerceiverTF encoder with its pre-encoder, as far as shapes and keys tell.

    `filters` of the convolutions and `bins` that they leave, which are the width of what the latents attend to.
    `inner` is heads * width of a head. `local` and `temporal` layers of one block. `hidden` width of the feed-forward,
    of one expert where there are any; `experts` is 0 for a plain MLP. `positions` rows of trained position codes, or
    `frequencies` of each rotary code; the other one is 0.
    """

    filters: int
    bins: int
    latents: int
    width: int
    inner: int
    blocks: int
    local: int
    temporal: int
    hidden: int
    experts: int
    positions: int
    frequencies: int
    norm: Literal["layer", "rms"]


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole network. `positions` are the rows of the stored sinusoid; `perceiver` is None where the encoder is T5's.

    `shared`: whether one pre-decoder serves all channels (two or more latents each), or one reads all latents.
    """

    sizes: Sizes
    positions: int
    channels: int = 1
    shared: bool = False
    perceiver: PerceiverSizes | None = None


def stored_shapes(layout: Layout) -> Shapes:
    """Every tensor of the network under the name that checkpoints give it, always in the same order.

    Source: the state dict of the Space mimbres/YourMT3 (`model/ymt3.py`) less its shared copies and fixed tables.
    """
    sizes, perceiver = layout.sizes, layout.perceiver
    table = (layout.positions, sizes.d_model)
    shapes: Shapes
    if perceiver is None:
        shapes = {"encoder.encoder.additive_pe.weight": table}
        shapes |= _t5_shapes("encoder.encoder", sizes.encoder_layers, ("SelfAttention",), sizes)
    else:
        shapes = dict(_conv_shapes(perceiver))
        shapes |= _perceiver_shapes(perceiver)
        name = "linear" if layout.shared else "projection_layer"
        fan_in = perceiver.width * perceiver.latents // layout.channels
        shapes[f"pre_decoder.0.{name}.weight"] = (sizes.d_model, fan_in)
    shapes["decoder.decoder.additive_pe.weight"] = table
    shapes |= _t5_shapes("decoder.decoder", sizes.decoder_layers, ("SelfAttention", "EncDecAttention"), sizes)
    vocabulary = (sizes.vocab_size, sizes.d_model)
    return shapes | {"embed_tokens.weight": vocabulary, "lm_head.lm_head.weight": vocabulary}


def expected_shapes(layout: Layout) -> Shapes:
    """The same under the names of the result."""
    return {result_name(key): shape for key, shape in stored_shapes(layout).items()}


# The first that fits is replaced.
_RENAMED = (
    ("encoder.encoder.additive_pe.weight", "encoder.positions"),
    ("decoder.decoder.additive_pe.weight", "decoder.positions"),
    ("encoder.encoder.", "encoder."),
    ("decoder.decoder.", "decoder."),
    ("embed_tokens.", "decoder_embed_tokens."),
    ("lm_head.lm_head.", "lm_head."),
)


def result_name(key: str) -> str:
    """What a tensor of a checkpoint is called in `Checkpoint.tensors`: T5's parts as in MT3, the others as they are."""
    for stored, wanted in _RENAMED:
        if key.startswith(stored):
            return wanted + key.removeprefix(stored)
    return key


def _t5_shapes(side: str, layers: int, attentions: tuple[str, ...], sizes: Sizes) -> Shapes:
    shapes: Shapes = {}
    for index in range(layers):
        shapes |= block_shapes(f"{side}.block.{index}", attentions, sizes.d_model, sizes.inner, sizes.d_ff)
    return shapes | {f"{side}.final_layer_norm.weight": (sizes.d_model,)}


def _conv_shapes(sizes: PerceiverSizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    filters = sizes.filters
    for index in range(CONV_BLOCKS):
        block, fan_in = f"pre_encoder.0.blocks.{index}", filters if index else 1
        for norm in ("bn1", "bn2"):
            for name in ("weight", "bias", "running_mean", "running_var"):
                yield f"{block}.{norm}.{name}", (filters,)
        yield f"{block}.conv1.weight", (filters, fan_in, 3, 3)
        yield f"{block}.conv2.weight", (filters, filters, 3, 3)
        if fan_in != filters:
            yield f"{block}.shortcut.weight", (filters, fan_in, 1, 1)
            yield f"{block}.shortcut.bias", (filters,)


def _perceiver_shapes(sizes: PerceiverSizes) -> Shapes:
    shapes: Shapes = {"encoder.latent_array.latents": (sizes.latents, sizes.width)}
    if sizes.positions:
        shapes["encoder.pos_emb._pos_emb"] = (sizes.positions, sizes.latents, sizes.width)
    else:
        shapes |= {f"encoder.{name}.freqs": (sizes.frequencies,) for name in ROTARY}
    for index in range(sizes.blocks):
        block = f"encoder.blocks.{index}"
        shapes |= _attention_shapes(f"{block}.spectral_cross_attention", sizes, keys=sizes.bins)
        for kind, count in (("local_transformer", sizes.local), ("temporal_transformer", sizes.temporal)):
            for number in range(count):
                layer = f"{block}.{kind}.{number}"
                shapes |= _attention_shapes(f"{layer}.attention", sizes, keys=None)
                shapes |= _norm(f"{layer}.layernorm", sizes.width, sizes)
                shapes |= _forward_shapes(f"{layer}.mlp", sizes)
    return shapes


# The rotary code of every kind of layer, and a pattern of the layers that hold a copy of it.
ROTARY: Mapping[str, str] = MappingProxyType(
    {
        "rotary_emb_sca": r"spectral_cross_attention",
        "rotary_emb_latent": r"local_transformer\.\d+\.attention",
        "rotary_emb_temporal": r"temporal_transformer\.\d+\.attention",
    }
)


def _attention_shapes(name: str, sizes: PerceiverSizes, keys: int | None) -> Shapes:
    width, inner = sizes.width, sizes.inner
    shapes = _norm(f"{name}.self.layernorm1", width, sizes)
    if keys is not None:
        shapes |= _norm(f"{name}.self.layernorm2", keys, sizes)
    for part, fan_in in (("query", width), ("key", keys or width), ("value", keys or width)):
        shapes |= _linear(f"{name}.self.{part}", inner, fan_in)
    return shapes | _linear(f"{name}.output.dense", width, inner)


def _forward_shapes(name: str, sizes: PerceiverSizes) -> Shapes:
    width, hidden = sizes.width, sizes.hidden
    if not sizes.experts:
        return _linear(f"{name}.dense1", hidden, width) | _linear(f"{name}.dense2", width, hidden)
    shapes: Shapes = {f"{name}.gate.weight": (sizes.experts, width)}
    for expert in range(sizes.experts):
        parts = {"w1": (hidden, width), "gate": (hidden, width), "w2": (width, hidden)}
        shapes |= {f"{name}.experts.{expert}.{part}.weight": shape for part, shape in parts.items()}
    return shapes


def _linear(name: str, out: int, fan_in: int) -> Shapes:
    return {f"{name}.weight": (out, fan_in), f"{name}.bias": (out,)}


def _norm(name: str, width: int, sizes: PerceiverSizes) -> Shapes:
    parts = ("weight", "bias") if sizes.norm == "layer" else ("weight",)
    return {f"{name}.{part}": (width,) for part in parts}


def published_layout(constants: Constants) -> Layout:
    """The sizes of a published model."""
    sizes = Sizes(d_model=512, inner=384, d_ff=1024, encoder_layers=8, decoder_layers=8, vocab_size=EVENT_TOKENS)
    if constants.frontend == "yourmt3_mel":
        return Layout(sizes, TABLE_ROWS)
    moe = bool(constants.experts)
    perceiver = PerceiverSizes(
        filters=128,
        bins=128,
        latents=constants.latents,
        width=128,
        inner=128,
        blocks=3,
        local=2,
        temporal=2,
        hidden=512 if moe else 128,
        experts=constants.experts,
        positions=0 if moe else 120,
        frequencies=2 if moe else 0,
        norm="layer",
    )
    multi = constants.channels > 1
    return Layout(replace(sizes, encoder_layers=3), TABLE_ROWS, constants.channels, multi, perceiver)
