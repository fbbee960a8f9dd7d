"""The YourMT3 state dict: what a file may hold, the sizes that it tells, and the tensors that an export needs."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np
import torch

from mt3_export.random_yourmt3 import rotary_frequencies
from mt3_export.sizes import Sizes
from mt3_export.state import compare_shapes, some
from mt3_export.yourmt3_layout import HALVINGS, ROTARY, Layout, PerceiverSizes, result_name, stored_shapes
from mt3_runtime.errors import CheckpointError
from mt3_runtime.mel import mel_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Literal

    from torch import Tensor

    from mt3_runtime.specs import FeatureSpec

KIND = "YourMT3"
HEAD = "lm_head.lm_head.weight"
WINDOWS = ("spectrogram.stft.window", "spectrogram.mel_stft.spectrogram.window")
MEL_FILTERS = "spectrogram.mel_stft.mel_scale.fb"
_COUNTER = ".num_batches_tracked"
_BLOCK = "encoder.blocks.0"
_DECODER = "decoder.decoder.block.0.layer"


def drop_training_parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors without those of the pitch shifter and the counters of batch normalisation, and a warning if any.

    Raises:
        CheckpointError: a counter that is none.
    """
    kept = {key: tensor for key, tensor in tensors.items() if "pitchshift" not in key}
    warning = f"{len(tensors) - len(kept)} tensors of the pitch shifter, which only training uses, were left out"
    for key in [key for key in kept if key.endswith(_COUNTER)]:
        counter = kept.pop(key)
        if key.removesuffix(_COUNTER) + ".running_var" not in kept or counter.shape or counter.dtype != torch.int64:
            raise CheckpointError(f"{key} is no counter of batches: this is another model, use one of {KIND}")
    return kept, (warning,) if len(tensors) > len(kept) and any("pitchshift" in key for key in tensors) else ()


def drop_shared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the copies of the rotary codes that every attention layer registers.

    Raises:
        CheckpointError: a copy differs from its original.
    """
    kept = dict(tensors)
    for name, layer in ROTARY.items():
        original = kept.get(f"encoder.{name}.freqs")
        pattern = re.compile(rf"encoder\.blocks\.\d+\.{layer}\.self\.rotary_emb\.freqs")
        for key in filter(pattern.fullmatch, list(kept)):
            copy = kept.pop(key)
            if original is None or not torch.equal(copy, original):
                raise CheckpointError(f"{key} differs from encoder.{name}.freqs: save the state dict again")
    return kept


def read_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Sizes of the network, read from the tensors that define them; `finish` then holds the rest to them.

    Raises:
        CheckpointError: a defining tensor is missing or of another kind, or sizes contradict each other.
    """
    vocabulary, d_model = _shape(tensors, HEAD, 2)
    rows = _shape(tensors, "decoder.decoder.additive_pe.weight", 2)[0]
    sizes = Sizes(
        d_model=d_model,
        inner=_shape(tensors, f"{_DECODER}.0.SelfAttention.q.weight", 2)[0],
        d_ff=_shape(tensors, f"{_DECODER}.2.DenseReluDense.wi_0.weight", 2)[0],
        encoder_layers=_count(r"encoder\.(?:encoder\.block|blocks)\.(\d{1,9})\.", tensors),
        decoder_layers=_count(r"decoder\.decoder\.block\.(\d{1,9})\.", tensors),
        vocab_size=vocabulary,
    )
    if "encoder.latent_array.latents" not in tensors:
        return Layout(sizes, rows)
    perceiver = _read_perceiver(tensors, sizes.encoder_layers)
    shared = "pre_decoder.0.linear.weight" in tensors
    if not shared:
        return Layout(sizes, rows, perceiver=perceiver)
    fan_in = _shape(tensors, "pre_decoder.0.linear.weight", 2)[1]
    channels, rest = divmod(perceiver.latents * perceiver.width, fan_in)
    if rest or fan_in % perceiver.width:
        raise CheckpointError(
            f"has {perceiver.latents} latents of {perceiver.width}, of which a pre-decoder of {fan_in} reads no whole "
            f"number: save the state dict of one {KIND} network"
        )
    return Layout(sizes, rows, channels, shared=True, perceiver=perceiver)


def _read_perceiver(tensors: Mapping[str, Tensor], blocks: int) -> PerceiverSizes:
    latents, width = _shape(tensors, "encoder.latent_array.latents", 2)
    cross, layer = f"{_BLOCK}.spectral_cross_attention.self", f"{_BLOCK}.local_transformer.0"
    inner, bins = _shape(tensors, f"{cross}.key.weight", 2)
    experts = _count(rf"{re.escape(layer)}\.mlp\.experts\.(\d{{1,9}})\.", tensors)
    hidden = f"{layer}.mlp.experts.0.w1.weight" if experts else f"{layer}.mlp.dense1.weight"
    trained = "encoder.pos_emb._pos_emb"
    rotary = "encoder.rotary_emb_sca.freqs"
    return PerceiverSizes(
        filters=_shape(tensors, "pre_encoder.0.blocks.0.conv1.weight", 4)[0],
        bins=bins,
        latents=latents,
        width=width,
        inner=inner,
        blocks=blocks,
        local=_count(rf"{re.escape(_BLOCK)}\.local_transformer\.(\d{{1,9}})\.", tensors),
        temporal=_count(rf"{re.escape(_BLOCK)}\.temporal_transformer\.(\d{{1,9}})\.", tensors),
        hidden=_shape(tensors, hidden, 2)[0],
        experts=experts,
        positions=_shape(tensors, trained, 3)[0] if trained in tensors else 0,
        frequencies=0 if trained in tensors else _shape(tensors, rotary, 1)[0],
        norm=_norm_kind(tensors),
    )


def _norm_kind(tensors: Mapping[str, Tensor]) -> Literal["layer", "rms"]:
    """LayerNorm has biases, RMSNorm has none."""
    norm = re.compile(r"(encoder\.blocks\..*\.layernorm[12]?)\.weight")
    names = [match[1] for match in map(norm.fullmatch, tensors) if match]
    plain = [name for name in names if f"{name}.bias" not in tensors]
    if plain and len(plain) < len(names):
        raise CheckpointError(
            f"mixes norms with and without bias ({some(plain)} {'has' if len(plain) == 1 else 'have'} none): save the "
            "whole state dict"
        )
    return "rms" if plain else "layer"


def _shape(tensors: Mapping[str, Tensor], key: str, rank: int) -> tuple[int, ...]:
    if key not in tensors:
        raise CheckpointError(
            f"has no {key} among its {len(tensors)} tensors ({some(tensors)}): save the state dict of a {KIND} network"
        )
    shape = tuple(tensors[key].shape)
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(
            f"{key} has shape {shape}, not {rank} dimensions: save the state dict of a {KIND} network"
        )
    return shape


def _count(pattern: str, tensors: Mapping[str, Tensor]) -> int:
    # Counted, not the highest index: a gap then shows as missing tensors and a huge index costs nothing.
    return len({match[1] for match in map(re.compile(pattern).match, tensors) if match})


def check_tables(tensors: Mapping[str, Tensor], features: FeatureSpec) -> dict[str, Tensor]:
    """The tensors without the window and the mel filters, which must be those of `features`, and rotary codes checked.

    Raises:
        CheckpointError: a table is another one, so that the network was trained with other features or positions.
    """
    kept = dict(tensors)
    mel = features.frontend == "yourmt3_mel"
    turns = 2 * math.pi * np.arange(features.fft_length) / features.fft_length
    _drop_table(kept, WINDOWS[mel], (features.fft_length,), lambda: 0.5 - 0.5 * np.cos(turns))
    if mel:
        shape = features.fft_length // 2 + 1, features.bins
        _drop_table(kept, MEL_FILTERS, shape, lambda: mel_matrix(features))
    for name in ROTARY:
        key = f"encoder.{name}.freqs"
        if key in kept:
            count = kept[key].shape[0] if kept[key].ndim else 0
            _check_table(key, kept[key], rotary_frequencies(key, count))
    return kept


def _drop_table(tensors: dict[str, Tensor], key: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> None:
    stored = tensors.pop(key, None)
    if stored is not None:
        # A file may say any length: what it does not hold is not computed.
        _check_table(key, stored, make() if stored.shape == shape else np.empty(0))


def _check_table(key: str, stored: Tensor, wanted: np.ndarray) -> None:
    # Loose enough for a file stored in bfloat16.
    close = stored.shape == wanted.shape and np.allclose(stored.double().numpy(), wanted, rtol=1e-2, atol=2e-3)
    if not close:
        raise CheckpointError(f"{key} is not that of {KIND}: this is another model, use one of {KIND}")


def finish(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The tensors of an export: `expected_shapes(layout)`, nothing missing, nothing extra.

    The head takes over the factor 1/d_model that training divides its logits by (`LMHead` and `YourMT3.forward` one
    root each), so that probabilities are those of the trained network; greedy choices are the same either way.

    Raises:
        CheckpointError: names the first few tensors that are missing, unknown or of another shape.
    """
    shapes = stored_shapes(layout)
    compare_shapes(shapes, tensors, KIND)
    renamed = {result_name(key): tensors[key] for key in shapes}
    renamed[result_name(HEAD)] = renamed[result_name(HEAD)] / layout.sizes.d_model
    return renamed


def feature_bins(layout: Layout) -> int:
    """Bins of the features that the network reads."""
    return layout.perceiver.bins * HALVINGS if layout.perceiver else layout.sizes.d_model
