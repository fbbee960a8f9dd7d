"""Copies of bundles to damage, manifests to forge, and what every refusal has to look like."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import BundleError, Mt3Error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

FIX = re.compile(r": [^:]*\b(export|copy|use|name|give)\b[^:]*$")


def check_message(error: Mt3Error) -> str:
    """One line, of a length that a terminal shows, that ends with what to do."""
    text = str(error)
    assert text.isprintable(), ascii(text)
    assert FIX.search(text), text
    return text


def refusal(call: Callable[..., object], *arguments: object) -> str:
    """The message of the BundleError that `call` must raise."""
    with pytest.raises(BundleError) as caught:
        call(*arguments)
    return check_message(caught.value)


def seal(data: dict[str, Any]) -> bytes:
    """The text of a manifest with any content and the right checksum, made without the runtime."""
    rest = {key: value for key, value in data.items() if key != "checksum"}
    plain = json.dumps(rest, indent=1).encode() + b"\n"
    return json.dumps({**rest, "checksum": hashlib.sha256(plain).hexdigest()}, indent=1).encode() + b"\n"


def changed(data: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The same data with another entry at `path`; what is not on the path is shared."""
    result: dict[str, Any] = {**data}
    place: Any = result
    for key in path[:-1]:
        place[key] = place[key].copy()
        place = place[key]
    place[path[-1]] = value
    return result


def leaves(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of everything in parsed JSON, containers included, the root left out."""
    if path:
        yield path
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield from leaves(value, (*path, key))


def copied(folder: Path, target: Path) -> Path:
    """A copy of a bundle that may be damaged."""
    shutil.copytree(folder, target)
    return target


def forge(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Replace files, and list them as they are now: a bundle that somebody made on purpose."""
    data = json.loads((folder / "manifest.json").read_text())
    for name, content in files.items():
        (folder / name).write_bytes(content)
        data["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_bytes(seal(data))
    return folder


def check_all(folder: Path) -> None:
    """Open a bundle and verify every file, as far as that goes without an engine."""
    bundle = open_bundle(folder)
    for name in bundle.manifest.files:
        bundle.verify(name)


@contextmanager
def no_blocking(seconds: float = 5.0) -> Iterator[None]:
    """Fail, instead of hanging, when the block waits for a pipe or reads without end."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def no_open_files_left() -> Iterator[None]:
    """Fail when the block leaves file descriptors behind."""
    before = _descriptors()
    yield
    left = _descriptors() - before
    assert not left, f"descriptors left open: {left}"


def _descriptors() -> set[str]:
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.add(f"{path.name} -> {path.readlink()}")
    return found
