"""The folder of a bundle: written whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import secrets
import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from mt3_runtime.errors import BundleError, OutputError
from mt3_runtime.manifest import MANIFEST_LIMIT, MANIFEST_NAME, FileRecord, read_manifest, write_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from mt3_runtime.manifest import Manifest


def finish(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder whose other files are there.

    Raises:
        BundleError: it would be larger than any runtime reads.
    """
    text = write_manifest(manifest)
    if len(text) > MANIFEST_LIMIT:
        raise BundleError(f"the manifest would take {len(text)} bytes, more than {MANIFEST_LIMIT}: shorten the notice")
    read_manifest(text)  # what no runtime would read is not written
    (folder / MANIFEST_NAME).write_bytes(text)


def records(paths: Iterable[Path]) -> dict[str, FileRecord]:
    """What a manifest says of files, by name and in the order of names."""
    return {path.name: _record(path) for path in sorted(paths)}


def _record(path: Path) -> FileRecord:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that takes the name `output` when the block ends well, and vanishes when it does not."""
    temporary = output.parent / f".{output.name}.{secrets.token_hex(6)}.partial"
    try:
        check_output(output)
        remove_leftovers(output)
        temporary.mkdir()
        with _claim(temporary):
            yield temporary
            _sync(*temporary.iterdir(), temporary)
            temporary.rename(output)
            with suppress(OSError):  # some disks refuse, and the bundle is whole either way
                _sync(output.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write {output} ({error.strerror}): free some space or choose another --output"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(output: Path) -> None:
    """Raise OutputError if a bundle cannot be created at `output`."""
    try:
        is_there, has_parent = output.exists() or output.is_symlink(), output.parent.is_dir()
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise OutputError(f"cannot write {str(output)!r:.200} ({error.strerror}): choose another --output") from None
    if is_there:
        raise OutputError(f"{output} exists already: remove it, or choose another --output")
    if not has_parent:
        raise OutputError(f"folder {output.parent} does not exist: create it, or choose another --output")


def remove_leftovers(output: Path) -> None:
    """Remove what killed exports of the same name left behind; what is still being written stays."""
    for path in output.parent.glob(f".{glob.escape(output.name)}.{'[0-9a-f]' * 12}.partial"):
        with suppress(OSError), _claim(path) as claimed:
            if claimed:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _claim(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, which ends with the process; False where the file system has no locks.

    Raises:
        OSError: somebody else holds it, or it is not a folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _sync(*paths: Path) -> None:
    """Have files and folders on the disk before the next name points at them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
