"""Where a model may run, how many rows side by side, and how many segments are encoded at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from mt3_runtime.errors import DeviceError

if TYPE_CHECKING:
    from mt3_runtime.manifest import LoweringName, Manifest

Kind = Literal["auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx"]
KINDS: tuple[Kind, ...] = ("auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx")
BEST_FIRST: tuple[Kind, ...] = ("tensorrt", "tensorrt-rtx", "cuda")  # GPUs, in the order in which auto tries them
LOWERINGS: dict[Kind, LoweringName] = {
    "cpu": "ort", "cuda": "cuda", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt",
}  # fmt: skip
_DEVICE = re.compile(r"(auto|cpu)|(cuda|tensorrt|tensorrt-rtx)(?::(\d{1,2}))?", re.ASCII)

# Of a single-channel model. CPU: more rows a step gain little and cost up to 31 MB of cache each. On a GPU a step reads
# the weights once for all rows: its time should hardly grow up to 32 rows (an estimate). TensorRT's engines take the
# rows that they were built for: 16 fit those of every profile.
SLOTS: dict[Kind, int] = {"cpu": 8, "cuda": 32, "tensorrt": 16, "tensorrt-rtx": 16}
# Segments whose channels step side by side, of a multi-channel model. Of 13 channels 26 rows take 2.4 ms each, 52 rows
# 2.1 ms (2 cores); a row takes 2.7 MB of cache, and 24 kB more with every token. More places also keep the rows that
# end at once from holding up the long ones: with 10 of 13 channels empty, 8 segments decode in 0.6 s instead of 0.9.
SEGMENTS: dict[Kind, int] = {"cpu": 4, "cuda": 4, "tensorrt": 2, "tensorrt-rtx": 2}
ENCODE_GROUP = 4  # segments; larger groups are no faster on a CPU and hold up the first note
CONVOLVED_GROUP = 1  # through the convolutions of YourMT3 a group is no faster
GPU_ENCODE_GROUP, GPU_CONVOLVED_GROUP = 8, 4  # as many as the engines of every profile take
CONVOLVED_BYTES = 240 * 2**20  # of one segment on its way through them


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device, and which of the machine's GPUs."""

    kind: Kind
    index: int = 0

    @property
    def is_gpu(self) -> bool:
        """Whether it is an NVIDIA GPU."""
        return self.kind in BEST_FIRST

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}" if self.is_gpu else self.kind


def parse_device(name: str) -> Device:
    """The device of a name such as "auto", "cpu", "cuda" or "tensorrt:1".

    Raises:
        DeviceError: there is no device of such a name.
    """
    found = _DEVICE.fullmatch(name)
    if not found:
        raise DeviceError(f"device {name!r:.40} does not exist: use {', '.join(KINDS)}, or cuda:1 for the second GPU")
    return Device(cast("Kind", found[1] or found[2]), int(found[3] or 0))


def default_slots(manifest: Manifest, kind: Kind = "cpu") -> int:
    """Rows decoded side by side when nobody asked for a number."""
    channels = manifest.model.channels
    return SLOTS[kind] if channels == 1 else SEGMENTS[kind] * channels


def encode_group(manifest: Manifest, device: str = "cpu") -> int:
    """Segments encoded in one call on a `device`, such as "cpu" or "cuda:0"."""
    if device.partition(":")[0] in BEST_FIRST:
        return GPU_CONVOLVED_GROUP if _is_convolved(manifest) else GPU_ENCODE_GROUP
    return CONVOLVED_GROUP if _is_convolved(manifest) else ENCODE_GROUP


def encode_bytes(manifest: Manifest) -> int:
    """Memory of one call of the encoder on the CPU, as far as it is beyond that of weights and caches."""
    return CONVOLVED_GROUP * CONVOLVED_BYTES if _is_convolved(manifest) else 0


def _is_convolved(manifest: Manifest) -> bool:
    return manifest.features.frontend == "yourmt3_spectrum"
