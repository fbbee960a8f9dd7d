"""The folder of a run of the lab: one run at a time, of one bundle and its clips, and gone on in."""

from __future__ import annotations

import fcntl
import json
import os
import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from mt3_runtime.errors import OptionError, OutputError
from mt3_runtime.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

IDENTITY = "lab.json"  # what the folder's results are of
EXPORTED = "bundle"  # made of a checkpoint by the command itself
LOCK = ".lab.lock"  # of the run that is writing; one that was killed leaves it behind, unlocked
# All that a run can leave that is killed before it writes what the folder is of: also halves of a bundle and of a file.
BEGUN = re.compile(rf"{EXPORTED}|{re.escape(LOCK)}|\.{EXPORTED}\.[0-9a-f]{{12}}\.partial|\.mt3-[0-9a-f]{{16}}\.tmp")


def claim(folder: Path, identity: Mapping[str, object]) -> None:
    """Make the folder, or check that its results are of the same.

    Raises:
        OptionError: they are of something else, or it is no folder of results.
        OutputError: it cannot be made.
    """
    path = folder / IDENTITY
    text = json.dumps(identity, indent=1).encode() + b"\n"
    known = path.read_bytes() if path.is_file() else None
    if known not in (None, text):
        of = "another bundle, audio, setting, machine or version"
        raise OptionError(f"{folder} holds results of {of}: give another --output")
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)  # before anything that `check_folder` would not know
        (folder / "combinations").mkdir(exist_ok=True)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot make {folder} ({error.strerror}): choose another --output") from None


def check_folder(folder: Path) -> None:
    """Refuse what is neither a folder of results nor free to become one.

    Raises:
        OptionError: there is something that the command did not put there itself.
        OutputError: it cannot be looked into.
    """
    try:
        is_ours = (folder / IDENTITY).is_file() or not folder.exists()
        if not is_ours and not (folder.is_dir() and all(BEGUN.fullmatch(path.name) for path in folder.iterdir())):
            raise OptionError(f"{folder} exists and is no folder of results: give another --output")
    except OSError as error:
        raise OutputError(f"cannot write {str(folder)!r:.200} ({error.strerror}): give another --output") from None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it as long as this process lives; if it stays empty, it vanishes.

    Raises:
        OptionError: another run is writing there.
        OutputError: it cannot be made or written to.
    """
    lock = folder / LOCK
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    except OSError as error:
        raise OutputError(f"cannot write to {folder} ({error.strerror}): give another --output") from None
    with file:
        if not _is_locked(file, lock):
            raise OptionError(f"another run is writing to {folder}: wait for it, or give another --output")
        try:
            yield
        finally:
            with suppress(OSError):  # while it is still held, see `_is_locked`
                lock.unlink()
            for path in made:
                with suppress(OSError):  # it holds something
                    path.rmdir()


def _is_locked(file: BinaryIO, path: Path) -> bool:
    """Lock it; False if somebody else has, or has removed it since it was opened: the name is then free for a third."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
