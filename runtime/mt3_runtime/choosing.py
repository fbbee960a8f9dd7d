"""From what was asked to the backend that runs: strict about devices, and never silent about a choice."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.devices import BEST_FIRST, LOWERINGS, Device, default_slots, encode_group
from mt3_runtime.errors import DependencyError, DeviceError, OptionError, OutOfMemoryError
from mt3_runtime.gpu_needs import gather, reachable, require_usable
from mt3_runtime.graphs import FEATURES, QUANTIZED
from mt3_runtime.memory import first_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from mt3_runtime.backends import Backend, DeviceBackend
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.graphs import Precision
    from mt3_runtime.manifest import Manifest

FASTEST_FIRST: tuple[Precision, ...] = ("fp16", "bf16", "fp32")
FALLBACK_SLOTS = 1  # rows that fail are few


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to run, and how."""

    bundle: Bundle
    device: Device
    precision: Precision | Literal["auto"]
    slots: int | None
    threads: int | None


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs. `reason`: why it is this device, where that was left open; `notices`: what the user should know."""

    backend: Backend
    reason: str = ""
    notices: tuple[str, ...] = ()
    fallback: Callable[[], Backend] | None = None


def choose(wish: Wish) -> Choice:
    """The backend for a wish: that device and no other, or, of "auto", the first that can be used.

    Raises:
        DependencyError: a package that the device needs is not installed.
        DeviceError: the device cannot be used, and why.
        OptionError: the precision is not one of the device's.
    """
    if wish.device.kind != "auto":
        return _on(wish)
    if wish.precision in QUANTIZED:
        return _on_cpu(wish, f"{wish.precision} is for the CPU")
    if not reachable():
        return _on_cpu(wish, "no NVIDIA GPU can be reached")
    refused: list[str] = []
    for kind in BEST_FIRST:
        try:
            choice = _on(replace(wish, device=Device(kind)))
        except (DeviceError, DependencyError) as error:
            refused.append(str(error))
        else:
            return replace(choice, reason="; ".join(["the best that can be used", *refused]))
    return _on_cpu(wish, "; ".join(refused))


def _on_cpu(wish: Wish, reason: str) -> Choice:
    if wish.precision in ("fp16", "bf16"):
        raise DeviceError(f"{wish.precision} needs a GPU, and none can be used ({reason}): leave the precision out")
    return replace(_on(replace(wish, device=Device("cpu"))), reason=reason)


def _on(wish: Wish) -> Choice:
    """The backend on the device of the wish, with half as many slots as long as its memory does not suffice."""
    if wish.device.is_gpu:
        require_usable(wish.device, gather())
    precision, notices = choose_precision(wish)
    slots = default_slots(wish.bundle.manifest, wish.device.kind) if wish.slots is None else wish.slots
    backend, halved = with_halving(lambda count: make_backend(wish, precision, count), slots)
    notices = (*notices, *halved)
    return Choice(backend, notices=notices, fallback=_fallback(wish) if precision in ("fp16", "bf16") else None)


def choose_precision(wish: Wish) -> tuple[Precision, tuple[str, ...]]:
    """The precision for a wish, and what the user should know about it.

    Raises:
        DeviceError: the bundle has no graphs of that precision for the device.
        OptionError: the precision is for other devices.
    """
    kind, manifest = wish.device.kind, wish.bundle.manifest
    forms = {(entry.graph, entry.lowering, entry.precision) for entry in manifest.graphs}
    if kind == "cpu":
        return _of_cpu(wish, forms), ()
    if wish.precision in QUANTIZED:
        raise OptionError(f"{wish.precision} is for the CPU: give --device cpu, or leave --precision out")
    held = [
        precision
        for precision in FASTEST_FIRST
        if all((spec.name, LOWERINGS[kind], precision) in forms for spec in manifest.contracts)
    ]
    if wish.precision == "auto" and held:
        slow = f"{kind} runs in fp32, as the bundle has nothing else: mt3-export bundle --precision fp32,fp16 is faster"
        return held[0], (slow,) if held[0] == "fp32" else ()
    if wish.precision not in held:
        wanted, half = ("", "fp16") if wish.precision == "auto" else (f"{wish.precision} ", wish.precision)
        fix = f"export it with mt3-export bundle --precision fp32,{half}"
        raise DeviceError(f"{wish.bundle.path} has no {wanted}graphs for {kind}: {fix}")
    return wish.precision, ()


def _of_cpu(wish: Wish, forms: Collection[tuple[str, str, str]]) -> Precision:
    """That of the wish; fewer bits only where they were asked for."""
    if wish.precision in ("auto", "fp32"):
        return "fp32"
    if wish.precision not in QUANTIZED:
        quantized = ", ".join(QUANTIZED)
        raise OptionError(f"{wish.precision} is for GPUs, the CPU has fp32, {quantized}: leave --precision out")
    needed = {spec.name for spec in wish.bundle.manifest.contracts} - {FEATURES}
    if any((graph, LOWERINGS["cpu"], wish.precision) not in forms for graph in needed):
        raise DeviceError(f"{wish.bundle.path} has no {wish.precision} graphs: mt3-export quantize adds them")
    return wish.precision


def with_halving(make: Callable[[int], Backend], slots: int) -> tuple[Backend, tuple[str, ...]]:
    """The backend with as many slots as the device's memory has room for, and a notice if they are fewer.

    Raises:
        OutOfMemoryError: not even one fits.
    """
    asked = slots
    while True:
        try:
            backend = make(slots)
        except OutOfMemoryError:
            if slots == 1:
                raise
        else:
            short = f"the GPU's memory is enough for {slots} rows side by side, not for {asked}: it is slower"
            return backend, (short,) if slots < asked else ()
        gc.collect()  # what was allocated of the one that failed
        slots //= 2


def make_backend(wish: Wish, precision: Precision, slots: int) -> Backend:
    """The backend of the wish's device, with so many slots."""
    bundle, device = wish.bundle, wish.device
    if device.kind == "cpu":
        return OrtBackend(bundle, slots=slots, threads=wish.threads, precision=precision)
    # Only here: nobody who runs on the CPU needs what a GPU needs.
    if device.kind == "cuda":
        from mt3_runtime.backends.cuda import CudaBackend  # noqa: PLC0415

        cuda = CudaBackend(bundle, device_index=device.index, slots=slots, precision=precision)
        return try_out(cuda, bundle.manifest)
    from mt3_runtime.backends.tensorrt import TensorRTBackend  # noqa: PLC0415

    module: Literal["tensorrt", "tensorrt_rtx"] = "tensorrt" if device.kind == "tensorrt" else "tensorrt_rtx"
    trt = TensorRTBackend(bundle, module=module, device_index=device.index, slots=slots, precision=precision)
    return try_out(trt, bundle.manifest)


def try_out(backend: DeviceBackend, manifest: Manifest) -> DeviceBackend:
    """Encode as many segments and launch as many rows as there ever are: what does not work is said before any work.

    Memory that a library takes when it is first needed is taken here, where half as many slots may still be chosen:
    the last positions need the longest caches.
    """
    model, features = manifest.model, manifest.features
    silence = np.zeros((encode_group(manifest, backend.device), features.segment_frames, features.bins), np.float32)
    states = backend.encode(silence)
    backend.admit(0, [states[0][0]] * backend.slots, first_memory(model, backend.slots))
    backend.seed(0, np.full(backend.slots, model.start_token, np.int32))
    for position in (0, backend.length - 1):
        backend.launch(np.full(backend.slots, position, np.int32), backend.chunk)
        backend.collect()
    return backend


def _fallback(wish: Wish) -> Callable[[], Backend] | None:
    """What makes, when it is first needed, the backend for rows that half precision cannot compute."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    bundle, threads = wish.bundle, wish.threads
    return cache(lambda: OrtBackend(bundle, slots=FALLBACK_SLOTS, threads=threads))
