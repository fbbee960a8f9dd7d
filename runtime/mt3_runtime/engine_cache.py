"""Engines on this machine: one folder for each, made whole, verified before use, built again when damaged.

An engine is native code, so only files of this user in a folder closed to everybody else are looked at, and none whose
hash is not the one written when it was built. That finds damage; it does not protect a user from itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mt3_runtime.engine_folder import (
    CHOOSE,
    DIGEST,
    check_private,
    default_folder,
    locked,
    make_private,
    partial_path,
    read_private,
    remove,
    sweep,
    sync_folder,
    write_synced,
)
from mt3_runtime.engine_key import EngineKey, read_key
from mt3_runtime.errors import BundleError, OutputError
from mt3_runtime.strict import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

FORMAT = "mt3-runtime-engine"
SIDECAR, PLAN = "engine.json", "engine.plan"
SIDECAR_LIMIT = 1 << 20  # bytes
KINDS = {"format": str, "size": int, "sha256": str, "built": int, "report": dict}
FIX = "build it again with mt3-export engines"


@dataclass(frozen=True, slots=True)
class Built:
    """What a builder returns: the engine, and what there is to say of it as plain data."""

    plan: bytes | memoryview
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One engine of the cache, without its bytes: `size` in bytes, `built` in seconds since 1970."""

    key: EngineKey
    size: int
    sha256: str
    built: int
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Engine:
    """A verified engine. `origin`: found, built, or built in place of one that was damaged."""

    entry: Entry
    plan: bytes
    origin: Literal["cache", "built", "rebuilt"]


class EngineCache:
    """The engines in one folder (default: the user's)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def get(self, key: EngineKey, build: Callable[[], Built], say: Callable[[str], None] = lambda _: None) -> Engine:
        """The engine of a key, from the cache or else built: by one process, while others wait for it.

        Args:
            key: what the engine depends on.
            build: makes it.
            say: is told that an engine was damaged and is built again.

        Raises:
            OutputError: the cache cannot be written.
            DeviceError: the cache is not this user's alone.
        """
        make_private(self.folder)
        engine = self._read_if_whole(key, lambda _: None)
        if engine:
            return engine
        try:
            with locked(self.folder, key.digest) as held:
                sweep(self.folder, key.digest if held else None)
                engine = self._read_if_whole(key, say)  # somebody else may have built it meanwhile
                return engine or self._build(key, build)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            why = f"{self.folder} ({error.strerror})"
            raise OutputError(f"cannot write to the engine cache {why}: free some space, or {CHOOSE}") from error

    def load(self, key: EngineKey) -> Engine:
        """The engine of a key, which must be there.

        Raises:
            BundleError: it is not, or was damaged.
            DeviceError: the cache is not this user's alone.
        """
        check_private(self.folder)
        return self._read(key)

    def entries(self) -> list[Entry]:
        """Every engine whose description is whole, by title; their bytes are not looked at."""
        if not os.path.exists(self.folder):  # noqa: PTH110 -- Path's raises if the name is too long
            return []
        check_private(self.folder)
        found = []
        for path in self._folders():
            try:
                found.append(self._describe(path.name))
            except BundleError:  # `prune` removes it
                continue
        return sorted(found, key=lambda entry: (entry.key.title, entry.key.digest))

    def prune(self, older_than: float | None = None, *, everything: bool = False) -> list[str]:
        """Remove leftovers, engines that are damaged, and those asked for.

        Args:
            older_than: remove engines built longer ago, in days.
            everything: remove all engines.

        Returns:
            Titles of the engines removed; the digest of one whose description is damaged.
        """
        if not os.path.exists(self.folder):  # noqa: PTH110 -- Path's raises if the name is too long
            return []
        check_private(self.folder)
        removed = []
        for path in self._folders():
            with locked(self.folder, path.name, wait=False) as held:
                if held is False:  # somebody builds it again
                    continue
                title = self._reason_to_prune(path.name, older_than, everything=everything)
                if title:
                    self._discard(path)
                    removed.append(title)
        sweep(self.folder)
        return removed

    def extra(self, key: EngineKey, name: str) -> bytes | None:
        """What `keep_extra` kept beside an engine; None if there is nothing, or it was damaged."""
        try:
            data = read_private(self._extra_path(key, name), 1 << 30)
        except OSError:
            return None
        digest, content = data[:32], data[32:]
        return content if hashlib.sha256(content).digest() == digest else None

    def keep_extra(self, key: EngineKey, name: str, content: bytes) -> None:
        """Keep something beside an engine that is worth keeping only with it, such as kernels compiled from it.

        Raises:
            OutputError: it cannot be written.
        """
        temporary = partial_path(self.folder, key.digest)
        try:
            with locked(self.folder, key.digest):
                write_synced(temporary, hashlib.sha256(content).digest() + content)
                temporary.replace(self._extra_path(key, name))
        except OSError as error:
            remove(temporary)
            raise OutputError(f"cannot write to {self.folder} ({error.strerror}): {CHOOSE}") from error

    def _extra_path(self, key: EngineKey, name: str) -> Path:
        suffix = hashlib.sha256(name.encode()).hexdigest()[:16]  # any name will do, a GPU's too
        return self.folder / key.digest / f"extra-{suffix}"

    def _folders(self) -> Iterator[Path]:
        return (path for path in list(self.folder.iterdir()) if DIGEST.fullmatch(path.name))

    def _reason_to_prune(self, digest: str, older_than: float | None, *, everything: bool) -> str | None:
        try:
            entry = self._describe(digest)
            old = older_than is not None and time.time() - entry.built > older_than * 86_400
            if not (everything or old):
                self._read(entry.key)
                return None
        except BundleError:
            return digest
        return entry.key.title

    def _read_if_whole(self, key: EngineKey, say: Callable[[str], None]) -> Engine | None:
        try:
            return self._read(key)
        except BundleError as error:
            if (self.folder / key.digest).exists():
                say(f"{str(error).rsplit(': ', 1)[0]}: building it again")
            return None

    def _read(self, key: EngineKey) -> Engine:
        entry = self._describe(key.digest)
        path = self.folder / key.digest / PLAN
        try:
            plan = read_private(path, entry.size)
        except OSError as error:
            raise BundleError(f"engine {key.title} cannot be read ({error.strerror or error}): {FIX}") from None
        if len(plan) != entry.size or hashlib.sha256(plan).hexdigest() != entry.sha256:
            raise BundleError(f"engine {key.title} was changed or damaged: {FIX}")
        return Engine(entry, plan, "cache")

    def _describe(self, digest: str) -> Entry:
        where = f"engine {digest[:12]}"
        folder = self.folder / digest
        if folder.is_symlink():
            raise BundleError(f"{where} is a link: {FIX}")
        try:
            text = read_private(folder / SIDECAR, SIDECAR_LIMIT)
        except OSError as error:
            raise BundleError(f"{where} cannot be read ({error.strerror or error}): {FIX}") from None
        data = parse_json(text, where)
        names = {"key", "checksum", *KINDS}
        whole = isinstance(data, dict) and set(data) == names and _sealed(data) == text
        if not whole or any(type(data[name]) is not kind for name, kind in KINDS.items()):
            raise BundleError(f"{where} has a damaged description: {FIX}")
        key = read_key(data["key"], where)
        if key.digest != digest:
            raise BundleError(f"{where} is another engine: {FIX}")
        return Entry(key, data["size"], data["sha256"], data["built"], data["report"])

    def _build(self, key: EngineKey, build: Callable[[], Built]) -> Engine:
        final, temporary = self.folder / key.digest, partial_path(self.folder, key.digest)
        damaged = final.exists() or final.is_symlink()
        temporary.mkdir(mode=0o700)  # before the work, which may take minutes
        try:
            built = build()
            plan = bytes(built.plan)
            digest = hashlib.sha256(plan).hexdigest()
            entry = Entry(key, len(plan), digest, int(time.time()), dict(built.report))
            write_synced(temporary / PLAN, plan)
            write_synced(temporary / SIDECAR, _sealed(_content(entry)))
            sync_folder(temporary)
            self._put(temporary, final)
        finally:
            remove(temporary)
        return Engine(entry, plan, "rebuilt" if damaged else "built")

    def _put(self, temporary: Path, final: Path) -> None:
        """Give a finished engine its name; where there are no locks, one of several alike gets it."""
        for _ in range(8):
            try:
                temporary.rename(final)
            except OSError:
                if not (final.exists() or final.is_symlink()):
                    raise
                try:
                    self._read(self._describe(final.name).key)
                except BundleError:
                    self._discard(final)
                else:
                    return
            else:
                sync_folder(self.folder)
                return
        raise OutputError(f"{final} is changed all the time by other processes: {CHOOSE}")

    def _discard(self, path: Path) -> None:
        """Take an engine away at once, then remove it at leisure."""
        away = partial_path(self.folder, path.name)
        try:
            path.rename(away)
        except OSError as error:
            if path.exists() or path.is_symlink():
                raise OutputError(f"cannot remove {path} ({error.strerror}): check its permissions") from error
        remove(away)


def _content(entry: Entry) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "key": entry.key.to_dict(),
        "size": entry.size,
        "sha256": entry.sha256,
        "built": entry.built,
        "report": entry.report,
    }


def _sealed(data: Mapping[str, Any]) -> bytes:
    """The one text of a description; the sha256 of the rest stands last, so that no damaged byte goes unnoticed."""
    content = {name: value for name, value in data.items() if name != "checksum"}
    checksum = hashlib.sha256(_text(content)).hexdigest()
    return _text({**content, "checksum": checksum})


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"
