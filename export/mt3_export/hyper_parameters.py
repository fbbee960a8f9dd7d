"""What a YourMT3 file says of its own making, held against what its tensors say and what an export can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mt3_export.state import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mt3_export.yourmt3_layout import Layout, PerceiverSizes

    Claims = Iterator[tuple[str, tuple["Plain", ...]]]

Plain = int | float | str | bool | None
Said = dict[str, Plain]
# What a configuration says before it is resolved.
_OPEN = ("auto", "default", "q", "kv")
ENCODERS = {True: "perceiver-tf", False: "t5"}
DECODERS = {True: "multi-t5", False: "t5"}


def encoder_path(layout: Layout) -> str:
    """Where the settings of its encoder stand."""
    return f"model_cfg.encoder.{ENCODERS[layout.perceiver is not None]}"


def decoder_path(layout: Layout) -> str:
    """Where the settings of its decoder stand."""
    return f"model_cfg.decoder.{DECODERS[layout.shared]}"


def flatten(hyper_parameters: Mapping[str, object], layout: Layout) -> Said:
    """The settings that decide how a network is run, by dotted name.

    What is neither number, text nor truth value is left out, as are the encoders and decoders that the network does
    not have, and settings that were never resolved.
    """
    said: Said = {}
    for path in ("audio_cfg", "model_cfg", encoder_path(layout), decoder_path(layout), "task_manager"):
        place: object = hyper_parameters
        for name in path.split("."):
            place = dict.get(place, name) if isinstance(place, dict) else None
        # The task manager is an object, of which only its attributes were kept.
        attributes = getattr(place, "__dict__", None)
        group = place if isinstance(place, dict) else attributes if isinstance(attributes, dict) else {}
        for name, value in dict.items(group):
            if isinstance(name, str) and _is_plain(value) and value not in _OPEN:
                said[f"{path}.{name}"] = value
    return said


def _is_plain(value: object) -> bool:
    return value is None or type(value) in (int, float, str, bool)


def contradictions(said: Said, layout: Layout, heads: int) -> list[str]:
    """What a file says against its own tensors, or against what an export can do.

    Args:
        said: settings by dotted name.
        layout: from the tensors.
        heads: of a PerceiverTF encoder.
    """
    return [
        f"says {name} {printable(repr(said[name]))} in its hyper-parameters, {judge} {allowed[0]!r}"
        for judge, wanted in (("its tensors say", _told(layout, heads)), ("this version runs", _needed(layout)))
        for name, allowed in wanted
        if name in said and said[name] not in allowed
    ]


def _told(layout: Layout, heads: int) -> Claims:
    """What the tensors say, under the names of the configuration."""
    sizes, perceiver = layout.sizes, layout.perceiver
    decoder = decoder_path(layout)
    yield "model_cfg.encoder_type", (ENCODERS[perceiver is not None],)
    yield "model_cfg.decoder_type", (DECODERS[layout.shared],)
    yield "model_cfg.vocab_size", (sizes.vocab_size,)
    yield "model_cfg.num_max_positions", (layout.positions,)
    yield f"{decoder}.d_model", (sizes.d_model,)
    yield f"{decoder}.num_layers", (sizes.decoder_layers,)
    yield f"{decoder}.ff_widening_factor", (sizes.d_ff / sizes.d_model,)
    yield f"{decoder}.num_channels", (layout.channels,)
    yield "task_manager.num_decoding_channels", (layout.channels,)
    if perceiver:
        yield from _told_perceiver(perceiver, heads, shared=layout.shared)
        return
    encoder = encoder_path(layout)
    yield "model_cfg.pre_encoder_type", (None,)
    yield "model_cfg.pre_decoder_type", (None,)
    yield f"{encoder}.d_model", (sizes.d_model,)
    yield f"{encoder}.num_layers", (sizes.encoder_layers,)
    yield f"{encoder}.ff_widening_factor", (sizes.d_ff / sizes.d_model,)
    yield "audio_cfg.n_mels", (sizes.d_model,)


def _told_perceiver(sizes: PerceiverSizes, heads: int, *, shared: bool) -> Claims:
    encoder = f"model_cfg.encoder.{ENCODERS[True]}"
    yield "model_cfg.pre_encoder_type", ("conv",)
    yield "model_cfg.pre_decoder_type", ("mc_shared_linear" if shared else "linear",)
    yield "model_cfg.conv_out_channels", (sizes.filters,)
    yield "model_cfg.d_feat", (sizes.bins,)
    for name, value in (
        ("num_latents", sizes.latents),
        ("d_latents", sizes.width),
        ("d_model", sizes.width),
        ("kv_dim", sizes.bins),
        ("qk_channels", sizes.inner),
        ("v_channels", sizes.inner),
        ("num_blocks", sizes.blocks),
        ("num_local_transformers_per_block", sizes.local),
        ("num_temporal_transformers_per_block", sizes.temporal),
        ("ff_layer_type", "moe" if sizes.experts else "mlp"),
        ("ff_widening_factor", sizes.hidden / sizes.width),
    ):
        yield f"{encoder}.{name}", (value,)
    if sizes.experts:
        yield f"{encoder}.moe_num_experts", (sizes.experts,)
    positions = ("trainable", "tkd") if sizes.positions else ("rope",)
    yield f"{encoder}.position_encoding_type", positions
    yield f"{encoder}.layer_norm_type", ("layer_norm",) if sizes.norm == "layer" else ("rms_norm",)
    if sizes.frequencies:
        # The code passes the number of heads for their width, so that half of 8 dimensions is rotated and not of 16.
        yield f"{encoder}.rope_partial_pe", (4 * sizes.frequencies == heads,)


def _needed(layout: Layout) -> Claims:
    """What an export takes for granted."""
    decoder, perceiver = decoder_path(layout), layout.perceiver
    yield "audio_cfg.codec", ("spec",) if perceiver else ("melspec",)
    yield "audio_cfg.audio_backend", ("torchaudio",)
    yield "audio_cfg.sample_rate", (16_000,)
    yield "model_cfg.tie_word_embeddings", (True,)
    yield "model_cfg.t5_basename", ("google/t5-v1_1-small",)
    sides = [decoder] if perceiver else [decoder, encoder_path(layout)]
    for side in sides:
        yield f"{side}.position_encoding_type", ("sinusoidal",)
        yield f"{side}.ff_layer_type", ("t5_gmlp",)
    if perceiver is None:
        return
    encoder = encoder_path(layout)
    yield f"{encoder}.attention_to_channel", (True,)
    yield f"{encoder}.use_query_residual", (True,)
    yield f"{encoder}.hidden_act", ("silu",) if perceiver.experts else ("gelu",)
    if perceiver.frequencies:
        yield f"{encoder}.rope_type_sca", ("pixel", "p")
        yield f"{encoder}.rope_type_latent", ("pixel", "p")
        yield f"{encoder}.rope_type_temporal", ("lang", "l")
        yield f"{encoder}.rope_apply_to_keys", (False,)
