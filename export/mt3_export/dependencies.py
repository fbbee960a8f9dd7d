"""What is not installed, said with the command that installs it."""

from __future__ import annotations

from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mt3_runtime.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = ("mt3_export", "mt3_runtime")
CPU_TORCH = "https://download.pytorch.org/whl/cpu"


@contextmanager
def needing(extras: str, *packages: str) -> Iterator[None]:
    """Name the extras, with commas, and the packages besides, that bring what cannot be imported.

    Raises:
        DependencyError: an optional package is missing or broken.
    """
    try:
        yield
    except DependencyError:
        raise
    except ImportError as error:
        if not error.name or error.name.split(".")[0] in OURS:
            raise
        wanted = " ".join((f"'mt3-runtime[{extras}]'", *packages))
        if isinstance(error, ModuleNotFoundError):
            # The plain name, which the extra asks for, means gigabytes of CUDA on Linux, for nothing.
            needs_torch = "export" in extras.split(",") and find_spec("torch") is None
            small = f"pip install torch --index-url {CPU_TORCH} && " if needs_torch else ""
            raise DependencyError(f"{error.name} cannot be imported: {small}pip install {wanted}") from None
        why, again = " ".join(str(error).split())[:200], f"pip install --force-reinstall {error.name.split('.')[0]}"
        raise DependencyError(f"{error.name} cannot be imported ({why}): {again}") from error
