"""TOML files read strictly: whatever is unknown, missing or of another type is an error that names the file."""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path


LIMIT = 1 << 20  # bytes: a plan of thousands of products takes a tenth
LARGEST = 2**63  # of whole numbers, as TOML has it


def read_toml(file: Path, kind: str) -> dict[str, Any]:
    """What a file holds; `kind` says what it is meant to be.

    Raises:
        OptionError: it cannot be read, is no regular file of at most `LIMIT` bytes, or is not TOML.
    """
    try:
        text = _read(file, kind)
    except OSError as error:
        raise OptionError(f"cannot read {kind} {file} ({error.strerror}): name a readable file") from None
    try:
        data = tomllib.loads(text.decode())
        _check_numbers(data)
    except (ValueError, RecursionError) as error:  # what tomllib raises too
        raise OptionError(f"{kind} {file} is not TOML ({' '.join(str(error).split())[:200]}): correct it") from None
    return data


def _read(file: Path, kind: str) -> bytes:
    """All of a small regular file; a pipe or device is refused without waiting for it."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OptionError(f"{kind} {file} is a folder, a pipe or a device: name a file")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            data = stream.read(LIMIT + 1)
    finally:
        os.close(descriptor)
    if len(data) > LIMIT:
        raise OptionError(f"{kind} {file} is larger than {LIMIT} bytes: name another file")
    return data


def _check_numbers(data: Any) -> None:
    """Raise ValueError for a whole number that TOML has not; such a one can be too large to be said."""
    if isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            _check_numbers(value)
    elif isinstance(data, int) and not -LARGEST <= data < LARGEST:
        raise ValueError("a whole number takes more than 64 bits")


@dataclass(frozen=True, slots=True)
class Place:
    """Checks values of one file, and names it in what it raises."""

    file: str

    def expect(self, condition: bool, problem: str, fix: str) -> None:
        """Raise OptionError where the condition does not hold."""
        if not condition:
            raise OptionError(f"{self.file}: {problem}: {fix}")

    def table(
        self, data: Any, *, required: tuple[str, ...] = (), optional: tuple[str, ...] | None = None, named: str = "it"
    ) -> dict[str, Any]:
        """A table with these keys; with any keys if `optional` is None."""
        self.expect(isinstance(data, dict), f"{named} is not a table", f"write [{named}]")
        allowed = None if optional is None else {*required, *optional}
        unknown = [key for key in data if allowed is not None and key not in allowed]
        listed = ", ".join(sorted(allowed or ()))
        self.expect(not unknown, f"{named} has an unknown key {''.join(unknown[:1])!r:.80}", f"use {listed}")
        missing = [key for key in required if key not in data]
        self.expect(not missing, f"{named} has no {''.join(missing[:1])}", "add it")
        return dict(data)

    def listed(self, data: Any, named: str) -> list[Any]:
        """A list."""
        self.expect(isinstance(data, list), f"{named} is not a list", "write [...]")
        return list(data)

    def choice(self, value: Any, choices: tuple[str, ...], named: str) -> str:
        """One of the choices."""
        self.expect(value in choices, f"{named} is {value!r:.80}", f"use {', '.join(choices)}")
        return str(value)

    def text(self, value: Any, named: str) -> str:
        """A text that is not empty."""
        self.expect(isinstance(value, str) and bool(value), f"{named} is {value!r:.80}", "write a text in quotes")
        return str(value)
