"""From a folder and a device name to a Transcriber."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import DEMO_NAME, demo_bundle_path, open_bundle
from mt3_runtime.devices import DEVICES, default_slots
from mt3_runtime.errors import DeviceError, OptionError
from mt3_runtime.families import check_options
from mt3_runtime.memory import first_memory
from mt3_runtime.transcriber import Transcriber

if TYPE_CHECKING:
    import os


def load(
    bundle: str | os.PathLike[str] | None = None,
    device: str = "auto",
    *,
    slots: int | None = None,
    threads: int | None = None,
    strict_upstream: bool = False,
    fine_programs: bool = False,
) -> Transcriber:
    """Load a bundle, the embedded demo if none is named, ready to transcribe.

    Args:
        bundle: folder made by `mt3-export bundle`.
        device: "auto" or "cpu"; this version has no other, so "auto" is the CPU.
        slots: rows decoded side by side (a segment is one row, or one for each of its channels); by default what
            suits the model and the device (`default_slots`).
        threads: of the CPU; by default one for every core this process may use.
        strict_upstream: see `Transcriber`.
        fine_programs: see `Transcriber`.

    Raises:
        BundleError: the bundle is broken, tampered with or of another version.
        DependencyError: onnxruntime is not installed.
        DeviceError: the device is not one of this version's.
        OptionError: `slots` or `threads` is not a positive whole number, or an option is for another model.
    """
    if device not in DEVICES:
        raise DeviceError(f"device {device!r} is not one of this version's: use one of {', '.join(DEVICES)}")
    for name, value in (("slots", slots), ("threads", threads)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise OptionError(f"{name} is {value!r}: give a whole number of 1 or more")
    opened = open_bundle(demo_bundle_path() if bundle is None else bundle)
    name = DEMO_NAME if bundle is None else str(bundle)
    check_options(opened.manifest.model, strict_upstream=strict_upstream, fine_programs=fine_programs)
    count = default_slots(opened.manifest) if slots is None else slots
    backend = OrtBackend(opened, slots=count, threads=threads)
    return Transcriber(opened, backend, name=name, strict_upstream=strict_upstream, fine_programs=fine_programs)


def warm_up(transcriber: Transcriber) -> None:
    """Run every graph once on one segment of silence."""
    manifest, backend = transcriber.bundle.manifest, transcriber.backend
    model, features = manifest.model, manifest.features
    silence = np.zeros((1, features.segment_samples), np.float32)
    states = backend.encode(transcriber.extractor(silence, [features.segment_frames]))
    backend.admit(0, states[0, :1], first_memory(model, 1))
    start = np.array([transcriber.rules.start_token], np.int32)
    backend.step(start, np.zeros(1, np.int32))
