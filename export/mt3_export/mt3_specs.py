"""The specs of an MT3 network, from what its tensors show and what they do not."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mt3_runtime.errors import BundleError, CheckpointError
from mt3_runtime.specs import FeatureSpec, ModelSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mt3_export.settings import Settings
    from mt3_export.sizes import Sizes
    from mt3_runtime.specs import MemorySpec


def mt3_specs(
    name: str, sizes: Sizes, settings: Settings, memory: MemorySpec | None = None
) -> tuple[ModelSpec, FeatureSpec]:
    """The two specs.

    Raises:
        CheckpointError: sizes and settings do not fit each other, or no network of the family.
    """
    values: dict[str, Any] = dict(settings.values)
    heads, inner = values.pop("num_heads"), sizes.inner
    features = {key: values.pop(key) for key in ("frontend", "mel_norm")}
    if inner % heads:
        raise CheckpointError(f"has attention of width {inner}, which {heads} heads do not divide: correct num_heads")
    measured = asdict(sizes)
    measured.pop("inner")
    try:
        model = ModelSpec(
            family="mt3",
            name=name,
            num_heads=heads,
            d_kv=inner // heads,
            start_token=0,
            end_token=1,
            memory=memory,
            **measured,
            **values,
        )
        return model, FeatureSpec(**features)
    except BundleError as error:
        raise CheckpointError(f"does not fit the family: {error}") from error


def check_d_kv(model: ModelSpec, metadata: Mapping[str, str]) -> None:
    """Raise CheckpointError where metadata says another width of a head than the network has."""
    said = metadata.get("d_kv", str(model.d_kv))
    if said != str(model.d_kv):
        raise CheckpointError(
            f"says d_kv {said[:100]!r} in its metadata, its shapes and {model.num_heads} heads say {model.d_kv}: "
            "correct the metadata"
        )
