"""How the C library keeps memory between steps."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # numbers from glibc's malloc.h
_LARGE = 32 << 20  # bytes; glibc accepts no more


def keep_memory() -> None:
    """Let freed memory stay with this process; does nothing where the C library is not glibc.

    By default, every tensor of a step larger than a megabyte or so is taken from the system anew and given back: the
    system clears each page of it, which costs a tenth of a step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    library.mallopt(_TOP_PAD, 2 * _LARGE)
