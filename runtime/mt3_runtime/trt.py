"""Finds TensorRT or TensorRT-RTX, which have one API under several module names."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from mt3_runtime.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping

TrtName = Literal["tensorrt", "tensorrt-rtx"]
# The wheels of TensorRT-RTX without its meta package have the second name only.
MODULES: Mapping[TrtName, tuple[str, ...]] = MappingProxyType(
    {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
)
NEEDED = ("ATTENTION_INPUT", "KV_CACHE_UPDATE")  # layers that came with TensorRT 10.14 and 10.15


def import_tensorrt(name: TrtName) -> Any:
    """The module of TensorRT or TensorRT-RTX.

    Raises:
        DependencyError: it is not installed, cannot be loaded, or is too old.
    """
    problem = "is not installed"
    for module in MODULES[name]:
        try:
            trt = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                problem = f"cannot be loaded ({_one_line(error)})"
        except (ImportError, OSError, RuntimeError) as error:
            problem = f"cannot be loaded ({_one_line(error)})"
        else:
            return _checked(trt, name)
    raise DependencyError(f"{name} {problem}: {install(name)}")


def install(name: TrtName) -> str:
    """The command that installs it."""
    return f"pip install 'mt3-runtime[{name}]'"


def _checked(trt: Any, name: TrtName) -> Any:
    layers = getattr(trt, "LayerType", None)
    if any(not hasattr(layers, layer) for layer in NEEDED):
        version = getattr(trt, "__version__", "of unknown version")
        raise DependencyError(f"{name} {version} has no key-value cache, as TensorRT 10.15 has: {install(name)}")
    return trt


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
