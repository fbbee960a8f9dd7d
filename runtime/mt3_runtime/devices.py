"""Where a model may run, how many rows side by side, and how many segments are encoded at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mt3_runtime.manifest import Manifest

DEVICES = ("auto", "cpu")
SLOTS = {"cpu": 8}  # of a single-channel model: more rows a step gain little and cost up to 31 MB of cache each
# Segments whose channels step side by side, of a multi-channel model. Of 13 channels 26 rows take 2.4 ms each, 52 rows
# 2.1 ms (2 cores); a row takes 2.7 MB of cache, and 24 kB more with every token. More places also keep the rows that
# end at once from holding up the long ones: with 10 of 13 channels empty, 8 segments decode in 0.6 s instead of 0.9.
SEGMENTS = {"cpu": 4}
ENCODE_GROUP = 4  # segments; larger groups are no faster on a CPU and hold up the first note
CONVOLVED_GROUP = 1  # through the convolutions of YourMT3 a group is no faster
CONVOLVED_BYTES = 240 * 2**20  # of one segment on its way through them


def default_slots(manifest: Manifest, device: str = "cpu") -> int:
    """Rows decoded side by side when nobody asked for a number."""
    channels = manifest.model.channels
    return SLOTS[device] if channels == 1 else SEGMENTS[device] * channels


def encode_group(manifest: Manifest) -> int:
    """Segments encoded in one call."""
    return CONVOLVED_GROUP if _is_convolved(manifest) else ENCODE_GROUP


def encode_bytes(manifest: Manifest) -> int:
    """Memory of one call of the encoder, as far as it is beyond that of weights and caches."""
    return CONVOLVED_GROUP * CONVOLVED_BYTES if _is_convolved(manifest) else 0


def _is_convolved(manifest: Manifest) -> bool:
    return manifest.features.frontend == "yourmt3_spectrum"
