"""Files of a private folder: opened without following links, locked, and removed when their writer died."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_runtime.errors import DeviceError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

DIGEST = re.compile(r"[0-9a-f]{64}")
PARTIAL = re.compile(r"\.([0-9a-f]{64})\.[0-9a-f]{12}\.partial")
LOCK = re.compile(r"\.([0-9a-f]{64})\.lock")
CHOOSE = "set MT3_ENGINE_CACHE to a folder of your own"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def default_folder() -> Path:
    """$MT3_ENGINE_CACHE, else mt3-runtime/engines in the user's cache."""
    if given := os.environ.get("MT3_ENGINE_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    cache = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return cache / "mt3-runtime" / "engines"


def make_private(folder: Path) -> None:
    """Create the folder, mode 0700, unless it is there.

    Raises:
        OutputError: it cannot be created.
        DeviceError: it is there and others could write to it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    except OSError as error:
        raise OutputError(f"cannot create {folder} ({error.strerror}): {CHOOSE}") from None
    check_private(folder)


def check_private(folder: Path) -> None:
    """Raise DeviceError unless the folder is the user's alone: what is in it is run as native code."""
    try:
        info, parent = os.lstat(folder), folder.absolute().parent.stat()
    except OSError as error:
        raise DeviceError(f"cannot read {folder} ({error.strerror}): {CHOOSE}") from None
    if not stat.S_ISDIR(info.st_mode):
        raise DeviceError(f"{folder} is a link or no folder: {CHOOSE}")
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise DeviceError(f"{folder} belongs to another user or is open to others (chmod 700 closes it): {CHOOSE}")
    if parent.st_mode & stat.S_IWOTH or parent.st_uid not in {0, os.geteuid()}:
        raise DeviceError(f"{folder} stands in a folder that others can write to: {CHOOSE}")


def read_private(path: Path, limit: int) -> bytes:
    """Content of a plain file of this user, at most `limit` bytes.

    Raises:
        OSError: it is a link, a pipe, another user's, writable for others, longer than `limit`, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & OTHERS_WRITE:
            raise PermissionError(f"{path.name} is not a plain file of this user alone")
        if info.st_size > limit:
            raise OSError(f"{path.name} is longer than listed")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Write a new file, mode 0600, and have it on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; some disks refuse, and the files are whole either way."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there and can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def partial_path(folder: Path, digest: str) -> Path:
    """A new name for something that is being made or thrown away."""
    return folder / f".{digest}.{secrets.token_hex(6)}.partial"


@contextmanager
def locked(folder: Path, digest: str, *, wait: bool = True) -> Iterator[bool | None]:
    """Hold the lock of one engine, which ends with the process.

    Yields:
        True, or None where the file system has no locks, or False if somebody else holds it and `wait` is off.
    """
    path = folder / f".{digest}.lock"
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        held = _flock(descriptor, wait=wait)
        if not held or _is_still(path, descriptor):
            break
        os.close(descriptor)  # its holder removed it while we waited
    try:
        yield held
    finally:
        if held is not False:
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _flock(descriptor: int, *, wait: bool) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sweep(folder: Path, own: str | None = None) -> None:
    """Remove what killed builds left behind; what somebody still writes, and so holds the lock of, stays.

    `own`: the engine whose lock the caller holds.
    """
    for path in list(folder.iterdir()):
        if own and path.name.startswith(f".{own}.") and path.name.endswith(".partial"):
            remove(path)
        elif match := PARTIAL.fullmatch(path.name) or LOCK.fullmatch(path.name):
            with suppress(OSError), locked(folder, match[1], wait=False) as held:
                if held and path.name.endswith(".partial"):
                    remove(path)
