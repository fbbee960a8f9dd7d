"""Keys and engines that need neither a bundle nor TensorRT."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from mt3_runtime.engine_cache import Built
from mt3_runtime.engine_key import EngineKey

if TYPE_CHECKING:
    from collections.abc import Callable


def key_of(number: int = 0, **parts: object) -> EngineKey:
    """Any key; another one for every number."""
    given = {
        "graph": "decode_step",
        "graph_sha256": f"{number:064x}",
        "weights_sha256": "b" * 64,
        "precision": "fp16",
        "computed": "fp16",
        "profile": "latency",
        "axes": {"rows": (1, 4, 8), "length": (256, 256, 256)},
        "backend": "tensorrt-rtx",
        "backend_version": "1.7.1",
        "targets": ("sm_89",),
        "gpu": "",
        "cuda": "",
        "driver": "",
        "flags": ("one stream",),
        "version": "1.0",
    }
    return EngineKey(**{**given, **parts})


def plan_of(key: EngineKey, size: int = 5000) -> bytes:
    """The bytes that stand for the engine of a key, unlike those of every other."""
    return hashlib.shake_256(key.digest.encode()).digest(size)


def builder_of(key: EngineKey, note: Callable[[], object] = lambda: None, size: int = 5000) -> Callable[[], Built]:
    """Builds that engine, and calls `note` each time."""

    def build() -> Built:
        note()
        return Built(plan_of(key, size), {"warnings": []})

    return build
