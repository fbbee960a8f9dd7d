"""What a device needs of a machine, and what of that is missing: from facts to sentences, each with its fix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from mt3_runtime.errors import DeviceError
from mt3_runtime.gpu_probe import (
    CUDNN,
    Driver,
    Package,
    Runtime,
    has_gpu,
    probe_driver,
    probe_package,
    probe_runtime,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mt3_runtime.devices import Device

OLDEST_DRIVER = {12: "525.60", 13: "580.65"}  # NVIDIA's table of CUDA's minor-version compatibility
OLDEST_SM = {12: 50, 13: 75}
FIRST_CUDA = 12
INSTALL_DRIVER = "install NVIDIA's driver, or start the container with --gpus all"
SHOW_GPU = "unset CUDA_VISIBLE_DEVICES, or start the container with --gpus all"
INSTALL_CUDA = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'mt3-runtime[cuda]'"
TRT_PACKAGES = {
    "tensorrt": (("tensorrt",), ("tensorrt-cu13", "tensorrt-cu12", "tensorrt")),
    "tensorrt-rtx": (
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings", "tensorrt-rtx"),
    ),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is missing or does not fit, and the fix."""

    text: str
    fix: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found; nothing of it means that a GPU computes. `bindings`: of CUDA, the package cuda-bindings."""

    driver: Driver
    runtime: Runtime
    tensorrt: Package
    tensorrt_rtx: Package
    bindings: Package

    def package(self, device: Device) -> Package:
        """What computes on a GPU in this way."""
        if device.kind == "cuda":
            module = "onnxruntime" if self.runtime.has_provider else ""
            return Package(module, self.runtime.version, _major(self.runtime.cuda))
        return self.tensorrt if device.kind == "tensorrt" else self.tensorrt_rtx


@cache
def gather() -> Facts:
    """Look everything up, once in a process."""
    return Facts(
        probe_driver(),
        probe_runtime(),
        tensorrt=probe_package(*TRT_PACKAGES["tensorrt"]),
        tensorrt_rtx=probe_package(*TRT_PACKAGES["tensorrt-rtx"]),
        bindings=probe_package(("cuda.bindings",), ("cuda-bindings",)),
    )


def problems(device: Device, facts: Facts) -> list[Problem]:
    """What keeps a GPU from being used in this way, all of it."""
    found = list(_of_driver(device, facts.driver))
    if device.kind == "cuda":
        found += _of_runtime(device, facts.driver, facts.runtime)
        return [*found, *_of_bindings(facts, alone=not found)]
    package = facts.package(device)
    if package.module:
        found += _of_cuda(
            device, facts.driver, package.cuda, f"{device.kind} {package.version} for CUDA {package.cuda}"
        )
    else:
        found.append(Problem(f"{device.kind} is not installed", f"pip install 'mt3-runtime[{device.kind}]'"))
    return [*found, *_of_bindings(facts, alone=not found)]


def require_usable(device: Device, facts: Facts) -> None:
    """Raise DeviceError with everything that is missing, and the fixes."""
    if found := problems(device, facts):
        texts, fixes = (
            "; ".join(dict.fromkeys(parts)) for parts in zip(*((p.text, p.fix) for p in found), strict=True)
        )
        raise DeviceError(f"device {device} cannot be used: {texts}: {fixes}")


def reachable() -> bool:
    """Whether a GPU is there at all: a look at a few files."""
    return has_gpu()


def _of_driver(device: Device, driver: Driver) -> Iterator[Problem]:
    if driver.problem:
        yield Problem(driver.problem, SHOW_GPU if driver.hidden else INSTALL_DRIVER)
    elif device.index >= len(driver.gpus):
        there = ", ".join(f"{device.kind}:{index} ({gpu.name})" for index, gpu in enumerate(driver.gpus))
        yield Problem(f"there is no GPU {device.index}, only {there}", f"use {device.kind}:0, or another one of these")


def _of_runtime(device: Device, driver: Driver, runtime: Runtime) -> Iterator[Problem]:
    if runtime.problem:
        yield Problem(f"onnxruntime cannot be imported ({runtime.problem})", INSTALL_CUDA)
        return
    if not runtime.has_provider:
        yield Problem(f"onnxruntime {runtime.version} is a build for the CPU, without the CUDA provider", INSTALL_CUDA)
        return
    major = _major(runtime.cuda)
    built = f"onnxruntime {runtime.version}, which is built for CUDA {runtime.cuda or major}"
    yield from _of_cuda(device, driver, major, built)
    if runtime.missing:
        kind = "cuDNN 9" if set(runtime.missing) == {CUDNN} else "libraries of CUDA"
        fix = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        found = f"; there is {', '.join(runtime.others)}" if runtime.others else ""
        yield Problem(f"{kind} missing ({', '.join(runtime.missing)}{found}) for {built}", fix)


def _of_cuda(device: Device, driver: Driver, major: int, built: str) -> Iterator[Problem]:
    """Whether the driver and the GPU are new enough for what is built for a major version of CUDA."""
    if not driver.problem and driver.cuda[0] < major:
        have = (
            f"driver {driver.version or 'of unknown version'} supports CUDA {driver.cuda[0]}.{driver.cuda[1]} at most"
        )
        oldest = OLDEST_DRIVER.get(major, "one for that CUDA")
        yield Problem(f"{have}, too old for {built}", f"update NVIDIA's driver to {oldest} or newer")
    for gpu in driver.gpus[device.index : device.index + 1]:
        if gpu.sm < OLDEST_SM.get(major, 0):
            yield Problem(f"{gpu.name} (sm_{gpu.sm}) is too old for {built}", "use a newer GPU, or --device cpu")


def _major(cuda: str) -> int:
    return int(cuda.split(".", maxsplit=1)[0]) if cuda else FIRST_CUDA


def _of_bindings(facts: Facts, *, alone: bool) -> Iterator[Problem]:
    """The package brings a CUDA runtime of its own, of its major version; a problem only if there is no other one."""
    bindings, driver = facts.bindings, facts.driver
    major = bindings.version.split(".", maxsplit=1)[0]
    if not bindings.module:
        yield Problem("cuda-bindings is not installed", "pip install 'cuda-bindings>=12.8'")
    elif alone and major.isdecimal() and driver.cuda[0] < int(major):
        have = f"cuda-bindings {bindings.version} is for CUDA {major}, the driver supports {driver.cuda[0]} at most"
        yield Problem(have, f"pip install 'cuda-bindings<{driver.cuda[0] + 1}', or update NVIDIA's driver")
