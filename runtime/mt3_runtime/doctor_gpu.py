"""The doctor's look at GPUs: what is there, what is missing for each way to use one, and whether that really starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mt3_runtime.devices import BEST_FIRST, Device, Kind
from mt3_runtime.findings import Finding
from mt3_runtime.gpu_needs import Facts, gather, problems
from mt3_runtime.gpu_probe import has_gpu
from mt3_runtime.machine import ROOT
from mt3_runtime.trt import TrtName, import_tensorrt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

REPAIRS: dict[Kind, str] = {
    "cuda": "pip install --force-reinstall 'onnxruntime-gpu[cuda,cudnn]'",
    "tensorrt": "pip install --force-reinstall tensorrt",
    "tensorrt-rtx": "pip install --force-reinstall tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
}


@dataclass(frozen=True, slots=True)
class Gpus:
    """What is there. `started`: of the ways in which a GPU could be used, why each did not start; "" if it did."""

    is_reachable: bool
    facts: Facts
    started: Mapping[Kind, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """The GPUs and their driver, in a line."""
        driver = self.facts.driver
        if not driver.gpus:
            return "none" if not self.is_reachable else driver.problem
        names = ", ".join(f"{gpu.name} (sm_{gpu.sm})" for gpu in driver.gpus)
        return f"{names}; driver {driver.version or 'unknown'} for CUDA {driver.cuda[0]}.{driver.cuda[1]}"


def probe_gpus(root: Path = ROOT, *, cuda_started: bool) -> Gpus:
    """Look at GPUs and their software, and start TensorRT where nothing is missing for it.

    `cuda_started`: whether a graph ran on ONNX Runtime's CUDA provider.
    """
    facts = gather()
    if not has_gpu(root):
        return Gpus(is_reachable=False, facts=facts)
    started: dict[Kind, str] = {"cuda": "" if cuda_started else "a graph of one node did not run on the GPU"}
    for name in ("tensorrt", "tensorrt-rtx"):
        if not problems(Device(name), facts):
            started[name] = _start(name)
    return Gpus(is_reachable=True, facts=facts, started=started)


def check_gpus(gpus: Gpus) -> list[Finding]:
    """Report on every way in which a GPU could be used; one that is not is no error, as the CPU does the same."""
    if not gpus.is_reachable:
        waiting = [
            f"{kind} {package.version}" for kind in BEST_FIRST if (package := gpus.facts.package(Device(kind))).module
        ]
        ready = f" ({', '.join(waiting)} would need one)" if waiting else ""
        return [Finding("ok", f"no NVIDIA GPU can be reached{ready}: transcription runs on the CPU")]
    return [finding for kind in BEST_FIRST for finding in _check(Device(kind), gpus)]


def _check(device: Device, gpus: Gpus) -> Iterator[Finding]:
    kind, package = device.kind, gpus.facts.package(device)
    found = problems(device, gpus.facts)
    what = f"{package.module} {package.version}" + (f" for CUDA {package.cuda}" if package.cuda else "")
    if not package.module and kind != "cuda":
        yield Finding("ok", f"{kind} is not installed", f"pip install 'mt3-runtime[{kind}]'")
    elif found:
        yield from (Finding("warning", f"{kind} cannot be used: {problem.text}", problem.fix) for problem in found)
    elif why := gpus.started.get(kind, "it was not tried"):
        yield Finding("warning", f"{kind} does not start ({what}): {why}", REPAIRS[kind])
    else:
        yield Finding("ok", f"{kind} starts on the GPU ({what})")


def _start(name: TrtName) -> str:
    """Make what TensorRT needs to run an engine; why that failed, or nothing."""
    try:
        trt = import_tensorrt(name)
        made = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    except Exception as error:  # noqa: BLE001 -- whatever a broken package raises is the finding
        return " ".join(str(error).split())[:200] or type(error).__name__
    return "" if made else "its runtime cannot be made"
