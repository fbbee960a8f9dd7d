"""Files that are either written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_runtime.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FIXES = {
    errno.ENOENT: "its folder does not exist: create the folder first",
    errno.ENOTDIR: "its folder is a file: choose another path",
    errno.EACCES: "the folder or file is write-protected: change its permissions or choose another folder",
    errno.EPERM: "the folder or file is write-protected: change its permissions or choose another folder",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.ENOSPC: "the disk is full: free some space or choose another disk",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another disk",
    errno.EFBIG: "the file would exceed the size limit: raise the limit or choose another disk",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.ELOOP: "the path is a loop of links: choose another path",
}


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that nobody ever sees half of it, also after a crash or a power cut.

    The bytes go to a temporary file in the same folder, which takes the target's place only when it is on
    the disk. A link is followed; an existing file keeps its permissions. After an error the old file is
    intact and the temporary one removed.

    Raises:
        OutputError: the target cannot be written; the message says what to do.
    """
    with _explained(path):
        target = Path(os.path.realpath(path))
        mode = _target_mode(target)
        temporary = target.parent / f".mt3-{secrets.token_hex(8)}.tmp"
        try:
            _write_new(temporary, data, mode)
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)


def check_target(path: str | os.PathLike[str]) -> None:
    """Find out, before the work, that `atomic_write` would refuse what is there.

    Raises:
        OutputError: it is no file, or write-protected.
    """
    with _explained(path):
        _target_mode(Path(os.path.realpath(path)))


@contextlib.contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    name = repr(os.fspath(path))
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        why = _FIXES.get(error.errno or 0, f"{error.strerror}: choose another path")
        raise OutputError(f"cannot write {name}: {why}") from error
    except ValueError as error:
        raise OutputError(f"cannot write {name}: {error}: choose another name") from error


def _target_mode(target: Path) -> int | None:
    """Permissions of the file that is to be replaced, None if there is none."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise OutputError(f"cannot write {str(target)!r}: it is a folder: add a file name")
    if not stat.S_ISREG(mode):  # replacing a device or a pipe would take it away from everybody else
        raise OutputError(f"cannot write {str(target)!r}: it is a device or a pipe: choose an ordinary file")
    if not os.access(
        target, os.W_OK, effective_ids=True
    ):  # a folder's owner could replace it, but it was protected for a reason
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return stat.S_IMODE(mode)


def _write_new(path: Path, data: bytes, mode: int | None) -> None:
    with path.open("xb") as file:
        if mode is not None:
            path.chmod(mode)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk too; some disks and folders refuse, and the file is whole either way."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
