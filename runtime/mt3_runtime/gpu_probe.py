"""What there is of an NVIDIA GPU and its software: looked up without a context on any GPU.

Functions take what loads libraries and imports modules as arguments, which tests replace. What each package needs is
in `gpu_needs.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mt3_runtime.machine import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

CUDA_PROVIDER = "CUDAExecutionProvider"
DRIVER = "libcuda.so.1"
MAJOR_ATTRIBUTE, MINOR_ATTRIBUTE = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NAME_BYTES = 256
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
NODES = ("dev/nvidiactl", "dev/nvidia0", "dev/dxg")
# Of ONNX Runtime's CUDA provider, by the major version of CUDA: what its `preload_dlls` loads (release 1.31).
LIBRARIES = {
    12: ("libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12", "libcufft.so.11", "libcurand.so.10"),
    13: ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcufft.so.12", "libcurand.so.10"),
}
CUDNN = "libcudnn.so.9"
MARKERS = ("libcudart.so.11.0", "libcudart.so.12", "libcudart.so.13", "libcudnn.so.8")  # one of each version


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; `sm` is its compute capability without the dot, 89 for 8.9."""

    name: str
    sm: int


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver: its version, the highest CUDA version it supports, and its GPUs; or what is wrong with it."""

    version: str = ""
    cuda: tuple[int, int] = (0, 0)
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    hidden: bool = False  # the driver works, and shows no GPU


@dataclass(frozen=True, slots=True)
class Runtime:
    """The onnxruntime package: its version, the CUDA version it was built with, and which of its libraries lack.

    `others`: libraries of other versions of CUDA and cuDNN, looked for where some lack.
    """

    version: str = ""
    cuda: str = ""
    has_provider: bool = False
    missing: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Package:
    """A Python package: the name it can be imported by, and its version; both empty where it is not installed.

    `cuda`: the major version that it is built for, 0 where its name does not say so.
    """

    module: str = ""
    version: str = ""
    cuda: int = 0


def has_gpu(root: Path = ROOT) -> bool:
    """Whether an NVIDIA GPU can be reached; /proc would also show one that a container was not given."""
    return any((root / name).exists() for name in NODES)


def probe_driver(load: Callable[[str], Any] = ctypes.CDLL, root: Path = ROOT) -> Driver:
    """Ask the driver for its GPUs."""
    version = _driver_version(root)
    try:
        library = load(DRIVER)
    except OSError:
        return Driver(version, problem=f"NVIDIA's driver is not installed or not passed on ({DRIVER} is missing)")
    status = library.cuInit(0)
    if status == NO_DEVICE:
        return Driver(version, problem="NVIDIA's driver shows no GPU (CUDA_VISIBLE_DEVICES may hide it)", hidden=True)
    if status:
        return Driver(version, problem=f"NVIDIA's driver does not start (cuInit gives error {status})")
    number = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = (number.value // 1000, number.value % 1000 // 10)
    library.cuDeviceGetCount(ctypes.byref(number))
    gpus = tuple(_gpu(library, index) for index in range(number.value))
    return Driver(version, cuda, gpus, "" if gpus else "NVIDIA's driver knows of no GPU")


def probe_runtime(
    load: Callable[[str], Any] = ctypes.CDLL, import_module: Callable[[str], Any] = importlib.import_module
) -> Runtime:
    """Import onnxruntime, and load what its CUDA provider needs."""
    try:
        ort = import_module("onnxruntime")
        providers = ort.get_available_providers()
    except Exception as error:  # noqa: BLE001 -- whatever a broken package raises is what there is to tell
        return Runtime(problem=" ".join(str(error).split())[:200] or type(error).__name__)
    cuda = str(getattr(ort, "cuda_version", "") or "")
    if CUDA_PROVIDER not in providers:
        return Runtime(ort.__version__, cuda)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, which is said here
        ort.preload_dlls()
    wanted = (*LIBRARIES.get(_major(cuda), ()), CUDNN)
    missing = tuple(_missing(load, wanted))
    versions = [name for name in MARKERS if name not in wanted] if missing else []
    absent = set(_missing(load, versions))
    others = tuple(name for name in versions if name not in absent)
    return Runtime(ort.__version__, cuda, has_provider=True, missing=missing, others=others)


def probe_package(modules: Iterable[str], distributions: Iterable[str]) -> Package:
    """The first of `modules` that is there, which is not imported, with the version of the first of `distributions`."""
    for module in modules:
        with contextlib.suppress(ImportError, ValueError):
            if importlib.util.find_spec(module):
                return next(_versions(module, distributions), Package(module, "of unknown version"))
    return Package()


def _versions(module: str, distributions: Iterable[str]) -> Iterator[Package]:
    from importlib import metadata  # noqa: PLC0415 -- slow to import, and without a GPU there is no need

    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = re.search(r"-cu(\d\d)\b", name)
            yield Package(module, metadata.version(name), int(found[1]) if found else 0)


def _missing(load: Callable[[str], Any], names: Iterable[str]) -> Iterator[str]:
    for name in names:
        try:
            load(name)
        except OSError:
            yield name


def _gpu(library: Any, index: int) -> Gpu:
    device, number, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, NAME_BYTES, device)
    capability = []
    for attribute in (MAJOR_ATTRIBUTE, MINOR_ATTRIBUTE):
        library.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(number.value)
    return Gpu(name.value.decode(errors="replace"), 10 * capability[0] + capability[1])


def _driver_version(root: Path) -> str:
    try:
        text = (root / "proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def _major(version: str) -> int:
    first = version.split(".", maxsplit=1)[0]
    return int(first) if first.isdecimal() else 0
