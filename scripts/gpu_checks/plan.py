"""What is checked, in which sizes, and on which backends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mt3_runtime.backends.device_rows import DeviceOptions
from mt3_runtime.backends.fake_gpu import fake_backend
from mt3_runtime.bundle import Bundle, open_bundle

if TYPE_CHECKING:
    from mt3_runtime.backends.device_rows import DeviceRows
    from mt3_runtime.graphs import Precision

CHUNK = 16  # steps a launch, where nothing else is said
TARGETS = tuple(
    f"{backend}/{precision}"
    for backend in ("cuda", "tensorrt", "tensorrt-rtx")
    for precision in ("fp32", "fp16", "bf16")
)
QUICK_TARGETS = ("cuda/fp32", "cuda/fp16", "tensorrt/fp16")
FAKE_TARGETS = ("fake/fp32",)


@dataclass(frozen=True, slots=True)
class Target:
    """A backend and a precision."""

    backend: str
    precision: Precision

    @staticmethod
    def parse(name: str) -> Target:
        backend, _, precision = name.partition("/")
        return Target(backend, cast("Precision", precision))

    def make(self, plan: Plan, slots: int, *, chunk: int = CHUNK, capture: bool = True) -> DeviceRows:
        """The backend, as a transcription has it; without capture every command is given by hand."""
        bundle = plan.open()
        if self.backend == "fake":
            options = DeviceOptions(slots, precision=self.precision, chunk=chunk, capture=capture)
            return fake_backend(bundle, options, lengths=plan.fake_lengths)
        common: dict[str, Any] = {"slots": slots, "precision": self.precision, "chunk": chunk, "capture": capture}
        if self.backend == "cuda":
            from mt3_runtime.backends.cuda import CudaBackend

            return CudaBackend(bundle, device_index=plan.device, **common)
        from mt3_runtime.backends.tensorrt import TensorRTBackend

        module: Any = self.backend.replace("-", "_")
        return TensorRTBackend(bundle, module=module, device_index=plan.device, **common)


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of everything; `fake_lengths`: cache lengths of the fake backend."""

    bundle: str
    device: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    steps: int
    repeat: int
    parity_segments: int
    parity_tokens: int
    segments: int
    tokens: tuple[int, int]
    clip_seconds: float
    peer_rows: tuple[int, ...]
    peer_steps: int
    fake_lengths: tuple[int, ...] = (32, 64, 1024)

    def open(self) -> Bundle:
        return open_bundle(Path(self.bundle))


SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "rows": (1, 2, 4, 8, 16, 32, 64, 128),
        "lengths": (256, 512, 1024),
        "steps": 64,
        "repeat": 7,
        "parity_segments": 8,
        "parity_tokens": 256,
        "segments": 512,
        "tokens": (32, 320),
        "clip_seconds": 16.0,
        "peer_rows": (1, 8, 32, 128),
        "peer_steps": 64,
    },
    "quick": {
        "rows": (1, 8, 32),
        "lengths": (256, 1024),
        "steps": 32,
        "repeat": 3,
        "parity_segments": 4,
        "parity_tokens": 64,
        "segments": 64,
        "tokens": (16, 96),
        "clip_seconds": 16.0,
        "peer_rows": (1, 8),
        "peer_steps": 32,
    },
    "fake": {
        "rows": (1, 2),
        "lengths": (32, 64),
        "steps": 4,
        "repeat": 1,
        "parity_segments": 2,
        "parity_tokens": 6,
        "segments": 3,
        "tokens": (2, 5),
        "clip_seconds": 2.0,
        "peer_rows": (2,),
        "peer_steps": 3,
    },
}
