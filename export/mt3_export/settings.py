"""What shapes do not tell of a checkpoint: from the user, the table, the file's metadata, or assumed and said so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.mr_mt3 import VARIANTS
from mt3_export.published import PUBLISHED
from mt3_export.sizes import MT3_SIZES
from mt3_runtime.errors import CheckpointError, OptionError
from mt3_runtime.specs import MT3_FRONTENDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mt3_export.published import PublishedCheckpoint
    from mt3_export.sizes import Sizes

Setting = int | str | bool
FAMILY = ("mt3", *VARIANTS)
NAMES = ("num_heads", "frontend", "mel_norm", "position_base", "max_length")
# The target length of every published MT3; a file that does not say is taken to have it.
MAX_LENGTH = 1024
LONGEST_NAME = 200  # characters, of a model
LARGEST = 999_999  # whole number that can be meant


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings by name, as in `NAMES`, and what the user should know about where they came from."""

    values: Mapping[str, Setting]
    warnings: tuple[str, ...] = ()


def check_name(name: str) -> None:
    """Raise OptionError if a model cannot be called so."""
    if not (name and name.isprintable() and len(name) <= LONGEST_NAME):
        raise OptionError(f"the model would be called {name!r:.100}, which is no name: give another one by --name")


def check_options(options: Mapping[str, Setting | None]) -> dict[str, Setting]:
    """The options that were given.

    Raises:
        OptionError: an unusable value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if not _is_usable(name, value):
            raise OptionError(f"{_option(name)} cannot be {value!r}: use {_allowed(name)}")
    return given


def from_row(row: PublishedCheckpoint) -> dict[str, Setting]:
    """Settings of a published checkpoint."""
    return {name: getattr(row, name) for name in NAMES}


def resolve(
    given: Mapping[str, Setting],
    row: PublishedCheckpoint | None,
    metadata: Mapping[str, str] | None,
    sizes: Sizes,
) -> Settings:
    """All settings: those given, else those of the published row, else those of the file.

    A torch file of unknown hash but full MT3 size is taken for a descendant of mt3, with a warning.

    Raises:
        CheckpointError: a setting is nowhere to be found, or the number of heads is contradicted.
    """
    warnings: list[str] = []
    if row is not None:
        known = from_row(row)
    elif metadata is None and sizes == MT3_SIZES:
        known = _assumed(given, warnings)
    else:
        known = parse_metadata(metadata or {}, "mt3")
        if "max_length" not in known and "max_length" not in given:
            known["max_length"] = MAX_LENGTH
            warnings.append(f"max_length is not in the file: {MAX_LENGTH} is assumed")
    settings = combine(given, known)
    warnings += overrides(given, known) if row or metadata else ()
    return Settings(settings, tuple(warnings))


def combine(given: Mapping[str, Setting], known: Mapping[str, Setting]) -> dict[str, Setting]:
    """Every setting, given or else known.

    Raises:
        CheckpointError: one is neither, or the number of heads is contradicted.
    """
    if missing := [name for name in NAMES if name not in known and name not in given]:
        raise CheckpointError(f"does not say {', '.join(missing)}: give {', '.join(map(_option, missing))}")
    if known.get("num_heads", given.get("num_heads")) != given.get("num_heads", known.get("num_heads")):
        raise CheckpointError(
            f"has {known['num_heads']} heads, not {given['num_heads']}: leave {_option('num_heads')} out"
        )
    return {name: given.get(name, known.get(name, 0)) for name in NAMES}


def _assumed(given: Mapping[str, Setting], warnings: list[str]) -> dict[str, Setting]:
    known = from_row(PUBLISHED["mt3"])
    assumed = [name for name in NAMES[1:4] if name not in given]
    if assumed:
        listed = ", ".join(f"{name} {show(known[name])}" for name in assumed)
        warnings.append(
            f"not a published file: {listed} assumed as for mt3 (weights trained by the PyTorch ports need mel_norm on "
            "and position_base 256): check how it was trained"
        )
    return known


def overrides(
    given: Mapping[str, Setting], known: Mapping[str, Setting], source: str = "the checkpoint says"
) -> list[str]:
    """A warning for every setting that was given against what is known."""
    return [
        f"{name} is {show(value)} as asked, where {source} {show(known[name])}"
        for name, value in given.items()
        if name in known and value != known[name]
    ]


def parse_metadata(metadata: Mapping[str, str], model: str) -> dict[str, Setting]:
    """What the metadata of a safetensors file says.

    Raises:
        CheckpointError: it is of another model, or unreadable.
    """
    architecture = metadata.get("architecture", model)
    if architecture in FAMILY and architecture != model:
        raise CheckpointError(f"is of architecture {architecture!r}, not {model!r}: give --model {architecture}")
    if architecture != model:
        raise CheckpointError(f"is of architecture {architecture[:100]!r}: use one of architecture {model!r}")
    known: dict[str, Setting] = {}
    for name in {*NAMES, "memory_length"} & set(metadata):
        text = metadata[name]
        value: Setting = text
        if name == "mel_norm":
            value = {"true": True, "false": False}.get(text, text)
        elif name == "memory_length" and text == "0":
            value = 0
        elif name != "frontend":
            value = parse_whole(name, text)
        if not _is_usable(name, value):
            raise _unusable(name, text)
        known[name] = value
    return known


def parse_whole(name: str, text: str) -> int:
    """A positive whole number of a file's metadata.

    Raises:
        CheckpointError: it is none.
    """
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise _unusable(name, text)
    return int(text)


def _unusable(name: str, text: str) -> CheckpointError:
    return CheckpointError(f"has {name} {text[:100]!r} in its metadata: write {_allowed(name)}")


def _is_usable(name: str, value: Setting) -> bool:
    if name == "frontend":
        return value in MT3_FRONTENDS
    if name == "mel_norm":
        return isinstance(value, bool)
    return type(value) is int and (name != "memory_length") <= value <= LARGEST


def _allowed(name: str) -> str:
    if name == "frontend":
        return f"one of {', '.join(MT3_FRONTENDS)}"
    if name == "memory_length":
        return f"a whole number of vectors up to {LARGEST}, 0 for no memory"
    return "true or false" if name == "mel_norm" else f"a whole number from 1 to {LARGEST}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def show(value: object) -> str:
    """A setting, as a person would write it."""
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
