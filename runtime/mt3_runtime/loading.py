"""From a folder and a device name to a Transcriber."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from mt3_runtime.bundle import DEMO_NAME, demo_bundle_path, open_bundle
from mt3_runtime.choosing import Wish, choose
from mt3_runtime.devices import parse_device
from mt3_runtime.errors import OptionError
from mt3_runtime.families import check_options
from mt3_runtime.graphs import PRECISIONS
from mt3_runtime.machine import asked_to_spin
from mt3_runtime.memory import first_memory
from mt3_runtime.silence import silence_rule

if TYPE_CHECKING:
    import os

    from mt3_runtime.graphs import Precision
    from mt3_runtime.transcriber import Transcriber

MAX_THREADS = 1024
TRANSCRIBER = "mt3_runtime.transcriber"  # and with it everything that reads audio and writes MIDI


def load(
    bundle: str | os.PathLike[str] | None = None,
    device: str = "auto",
    *,
    precision: str = "auto",
    slots: int | None = None,
    threads: int | None = None,
    strict_upstream: bool = False,
    fine_programs: bool = False,
    skip_silence: str | float = "auto",
) -> Transcriber:
    """Load a bundle, the embedded demo if none is named, ready to transcribe.

    Args:
        bundle: folder made by `mt3-export bundle`.
        device: "cpu", "cuda", "tensorrt" or "tensorrt-rtx", of several GPUs with a number as in "cuda:1": there or
            nowhere. "auto": the best of them that can be used; `Transcriber.device_reason` says why.
        precision: "fp32", "fp16" or "bf16" on a GPU, "fp32", "int8", "w8", "w4" or "qdq" on the CPU; "auto" is half
            precision on a GPU if the bundle has it, and fp32 on the CPU.
        slots: rows decoded side by side (a segment is one row, or one for each of its channels); by default what
            suits the model and the device (`default_slots`). On a GPU without memory for them half as many, and so on.
        threads: of the CPU; by default one for every core this process may use.
        strict_upstream: see `Transcriber`.
        fine_programs: see `Transcriber`.
        skip_silence: segments that are not decoded: "digital", those of zeros alone; a number, those whose peak is at
            most so many dBFS, such as -80; "off", none. "auto" is "digital", or "off" with `strict_upstream`.

    Raises:
        BundleError: the bundle is broken, tampered with or of another version.
        DependencyError: a package that the device needs is not installed.
        DeviceError: there is no such device, or it cannot be used here; everything that is missing is named.
        OptionError: `slots` or `threads` is no sensible number, or an option is for another model or device.
        OutOfMemoryError: the device has no memory for a single slot.
    """
    asked = parse_device(device)
    known = ("auto", *PRECISIONS)
    if precision not in known:
        raise OptionError(f"precision {precision!r:.40} does not exist: use one of {', '.join(known)}")
    for name, value in (("slots", slots), ("threads", threads)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise OptionError(f"{name} is {value!r}: give a whole number of 1 or more")
    if threads is not None and threads > MAX_THREADS:
        raise OptionError(f"threads is {threads}: give at most {MAX_THREADS}, better one for each core")
    asked_to_spin()  # that its variable can be read is found out before any work
    silence = silence_rule(skip_silence, strict_upstream=strict_upstream)
    opened = open_bundle(demo_bundle_path() if bundle is None else bundle)
    check_options(opened.manifest.model, strict_upstream=strict_upstream, fine_programs=fine_programs)
    wish = Wish(opened, asked, cast("Precision | Literal['auto']", precision), slots, threads)
    # Hashes and sessions leave Python to itself: what comes after them is imported meanwhile.
    with ThreadPoolExecutor(max_workers=1) as beside:
        imported = beside.submit(import_module, TRANSCRIBER)
        choice = choose(wish)
    transcriber: Transcriber = imported.result().Transcriber(
        opened,
        choice.backend,
        name=DEMO_NAME if bundle is None else str(bundle),
        strict_upstream=strict_upstream,
        fine_programs=fine_programs,
        silence=silence,
        fallback=choice.fallback,
        device_reason=choice.reason,
        notices=choice.notices,
    )
    return transcriber


def warm_up(transcriber: Transcriber) -> None:
    """Run every graph once on one segment of silence."""
    manifest, backend = transcriber.bundle.manifest, transcriber.backend
    model, features = manifest.model, manifest.features
    silence = np.zeros((1, features.segment_samples), np.float32)
    states = backend.encode(transcriber.extractor(silence, [features.segment_frames]))
    backend.admit(0, [states[0][0]], first_memory(model, 1))
    start = np.array([transcriber.rules.start_token], np.int32)
    backend.step(start, np.zeros(1, np.int32))
