"""Published checkpoints: where each lies, what its bytes hash to, and the settings that its shapes do not tell."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from mt3_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class PublishedCheckpoint:
    """One file of a Hugging Face repository and how its network is to be run.

    `revision` is a commit where one is known; the content is pinned by `sha256` either way. `size` in bytes.
    `frontend`, `mel_norm` and `position_base` as in `FeatureSpec` and `ModelSpec`.
    """

    name: str
    repository: str
    repository_type: Literal["model", "space"]
    revision: str
    filename: str
    sha256: str
    size: int
    model: str
    num_heads: int
    max_length: int
    frontend: str
    mel_norm: bool
    position_base: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise CheckpointError(f"{self.name}: sha256 {self.sha256!r} is not 64 hex digits: correct the table")
        if self.size <= 0:
            raise CheckpointError(f"{self.name}: size {self.size} is not positive: correct the table")

    @property
    def local_name(self) -> str:
        """File name in a local folder; unlike `filename` it is different for every row."""
        return self.name + PurePosixPath(self.filename).suffix


_ROWS = (
    # Magenta's weights as converted by kunato/mt3-pytorch; the repository of MR-MT3 holds the same file. Other
    # projects pin this commit together with this hash; it was not compared with the hub itself.
    PublishedCheckpoint(
        name="mt3",
        repository="gudgud1014/MR-MT3",
        repository_type="model",
        revision="539c08b0fe551076db6108a5f5b2a57d774881ed",
        filename="mt3.pth",
        sha256="b8a3807ed265059abd25ad7f68142c06c35e8f6144dcaa45bd55946a3745398f",
        size=183_672_643,
        model="mt3",
        num_heads=6,
        max_length=1024,
        frontend="ddsp",
        mel_norm=False,
        position_base=255,
    ),
)

PUBLISHED: Mapping[str, PublishedCheckpoint] = MappingProxyType({row.name: row for row in _ROWS})


def find_published(name: str, table: Mapping[str, PublishedCheckpoint] = PUBLISHED) -> PublishedCheckpoint:
    """The row called `name`.

    Raises:
        CheckpointError: no row has that name.
    """
    if name not in table:
        raise CheckpointError(f"no published checkpoint is called {name!r}: use one of {', '.join(table)}")
    return table[name]


def recognise(sha256: str) -> PublishedCheckpoint | None:
    """The row whose file has this hash, if any."""
    return next((row for row in PUBLISHED.values() if row.sha256 == sha256), None)
