"""A YourMT3 network from what a file holds, or from chance: specs, design and tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mt3_export.design import PerceiverDesign
from mt3_export.random_yourmt3 import random_yourmt3_tensors
from mt3_export.state import widen
from mt3_export.yourmt3_layout import published_layout
from mt3_export.yourmt3_models import MODELS, identify
from mt3_export.yourmt3_settings import YourMT3Settings, published_settings, resolve_yourmt3
from mt3_export.yourmt3_state import (
    check_tables,
    drop_shared,
    drop_training_parts,
    feature_bins,
    finish,
    read_layout,
)
from mt3_runtime.errors import BundleError, CheckpointError
from mt3_runtime.specs import FeatureSpec, ModelSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from mt3_export.settings import Setting
    from mt3_export.stored import StoredState
    from mt3_export.yourmt3_layout import Layout


@dataclass(frozen=True, slots=True, eq=False)
class YourMT3Network:
    """The fields of a `Checkpoint` that the network decides."""

    model: ModelSpec
    features: FeatureSpec
    tensors: Mapping[str, Tensor]
    design: PerceiverDesign | None
    warnings: tuple[str, ...]


def read_yourmt3(
    stored: StoredState, model: str, name: str, given: Mapping[str, Setting], *, published: bool
) -> YourMT3Network:
    """The network in a file.

    Args:
        stored: its tensors, and what it says of itself.
        model: a key of `MODELS`, which the tensors must fit.
        name: what the result is called.
        given: settings that were asked for.
        published: whether the file was recognised by its hash.

    Raises:
        CheckpointError: the file holds another model, or contradicts itself.
    """
    _check_model(stored.tensors, model)
    kept, dropped = drop_training_parts(stored.tensors)
    widened, conversions = widen(kept)
    tensors = drop_shared(widened)
    layout = read_layout(tensors)
    settings = resolve_yourmt3(model, layout, given, stored, published=published)
    spec, features = _specs(name, layout, settings)
    tensors = finish(check_tables(tensors, features), layout)
    return YourMT3Network(spec, features, tensors, _design(layout, settings), dropped + conversions + settings.warnings)


def random_yourmt3(model: str, seed: int, given: Mapping[str, Setting]) -> YourMT3Network:
    """A published model of full size with random weights."""
    layout, settings = published_layout(MODELS[model]), published_settings(model, given)
    spec, features = _specs(f"{model}-random-{seed}", layout, settings)
    tensors = random_yourmt3_tensors(layout, seed, settings.num_heads)
    return YourMT3Network(spec, features, tensors, _design(layout, settings), ())


def _check_model(keys: Iterable[str], model: str) -> None:
    found = identify("\n".join(keys).encode(errors="replace"))
    if found and model not in found:
        named = " or ".join(found)
        raise CheckpointError(f"is {named}, not {model}: give --model {named}")


def _design(layout: Layout, settings: YourMT3Settings) -> PerceiverDesign | None:
    sizes = layout.perceiver
    return PerceiverDesign(settings.heads, settings.residual, settings.chosen, sizes.norm) if sizes else None


def _specs(name: str, layout: Layout, settings: YourMT3Settings) -> tuple[ModelSpec, FeatureSpec]:
    sizes = layout.sizes
    try:
        model = ModelSpec(
            family="yourmt3",
            name=name,
            d_model=sizes.d_model,
            num_heads=settings.num_heads,
            d_kv=sizes.inner // settings.num_heads,
            d_ff=sizes.d_ff,
            encoder_layers=sizes.encoder_layers,
            decoder_layers=sizes.decoder_layers,
            vocab_size=sizes.vocab_size,
            position_base=256,
            max_length=settings.max_length,
            start_token=0,
            end_token=1,
            channels=layout.channels,
        )
        features = FeatureSpec(
            "yourmt3_spectrum" if layout.perceiver else "yourmt3_mel",
            mel_norm=False,
            hop_length=settings.hop_length,
            fft_length=settings.fft_length,
            bins=feature_bins(layout),
            segment_samples=settings.segment_samples,
        )
        if not layout.perceiver:
            features = replace(features, f_min=settings.f_min, f_max=settings.f_max)
    except BundleError as error:
        raise CheckpointError(f"does not fit the family: {error}") from error
    return model, features
