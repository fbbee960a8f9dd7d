"""Opens a bundle: manifest first, then hashes, and only then hands bytes to a parser."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_runtime.errors import BundleError
from mt3_runtime.graphs import QUANTIZED
from mt3_runtime.manifest import MANIFEST_LIMIT, MANIFEST_NAME, read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mt3_runtime.manifest import GraphFile, Manifest

DEMO_NAME = "embedded demo"
BLOCK = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked manifest and the folder it stands in. `sha256` is the manifest's, which covers every file."""

    path: Path
    manifest: Manifest
    sha256: str

    def graph(self, name: str, lowering: str, precision: str) -> GraphFile:
        """The entry of one graph.

        Raises:
            BundleError: the bundle does not hold it in that form.
        """
        for entry in self.manifest.graphs:
            if (entry.graph, entry.lowering, entry.precision) == (name, lowering, precision):
                return entry
        held = sorted({f"{entry.lowering}/{entry.precision}" for entry in self.manifest.graphs})
        command = (
            f"quantize --precision {precision}" if precision in QUANTIZED else f"bundle --precision fp32,{precision}"
        )
        raise BundleError(
            f"{self.path} holds no {name} graph as {lowering}/{precision}, only {', '.join(held)}: "
            f"make it with mt3-export {command}"
        )

    def read(self, file: str) -> bytes:
        """The verified bytes of a listed file."""
        data = bytearray()
        self._hash(file, data)
        return bytes(data)

    def verify(self, file: str) -> Path:
        """Path of a listed file whose size and sha256 are right."""
        self._hash(file, None)
        return self.path / file

    def _hash(self, file: str, into: bytearray | None) -> None:
        record = self.manifest.files[file]
        digest, size = hashlib.sha256(), 0
        for block in _blocks(self.path, file):
            digest.update(block)
            size += len(block)
            if into is not None:
                into += block
            if size > record.size:
                break
        if (size, digest.hexdigest()) != (record.size, record.sha256):
            raise BundleError(f"{self.path / file} is not what the manifest lists (changed or cut off): copy it again")


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read and check the manifest of the bundle at `path`.

    Raises:
        BundleError: no folder, no manifest, or one that is broken or of another version.
    """
    folder = Path(path)
    if not os.path.isdir(folder):  # noqa: PTH112 -- pathlib's raises for a name that is too long
        problem = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise BundleError(f"bundle {folder!s:.200} {problem}: name a folder made by mt3-export bundle")
    text = b""
    for block in _blocks(folder, MANIFEST_NAME):
        text += block
        if len(text) > MANIFEST_LIMIT:
            break
    return Bundle(folder, read_manifest(text), hashlib.sha256(text).hexdigest())


def demo_bundle_path() -> Path:
    """Folder of the demo bundle: inside an installed wheel, or in the clone this code runs from."""
    return _shipped("demo")


def demo_clip_path() -> Path:
    """Folder of the demo clip and its reference MIDI."""
    return _shipped("demo_clip")


def _shipped(name: str) -> Path:
    package = Path(__file__).resolve().parent
    for folder in (package / name, package.parent.parent / "engines" / name):
        if folder.is_dir():
            return folder
    raise BundleError(f"this installation lacks {name!r}: reinstall mt3-runtime, or pass --bundle")


def _blocks(folder: Path, name: str) -> Iterator[bytes]:
    """Read a plain file of the folder: no link, no pipe, nothing that could block."""
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BundleError(f"{path} is not a plain file: export the bundle again")
            while block := os.read(descriptor, BLOCK):
                yield block
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BundleError(f"cannot read {path} ({error.strerror}): copy or export the bundle again") from None
