"""What an engine depends on: if any of it changes, the engine is another one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from mt3_runtime.errors import BundleError
from mt3_runtime.graphs import Precision  # noqa: TC001 -- `strict.build` reads the hints
from mt3_runtime.manifest import SHA256
from mt3_runtime.strict import build
from mt3_runtime.trt import TrtName  # noqa: TC001

# What the builder sets and rewrites, as part of the key: whole fp32 products, as they are compared with the CPU's; one
# stream, because a step is captured in a CUDA graph. The number counts changes of it that no other word tells.
FLAGS = (
    "builder 1",
    "strongly typed",
    "own casts",
    "attention decomposable",
    "no TF32",
    "one stream",
    "detailed names",
)
TARGET = re.compile(r"sm_[1-9][0-9]{1,2}[a-z]?")
Axis = Literal["segments", "rows", "written", "length"]


@dataclass(frozen=True, slots=True)
class EngineKey:
    """One engine, by everything that decides its bytes or whether it may run.

    `graph_sha256` and `weights_sha256` are those of the bundle's files. `precision` is that of the inputs and outputs,
    `computed` that of the graph inside, which a recipe may keep in fp32.
    `axes` are the smallest, the best and the largest size of every axis that is not fixed, and the length of a cache
    thrice. `targets` are compute capabilities, spelt sm_89. `gpu`, `cuda` and `driver` are empty for an engine that was
    built for targets and not for the GPU at hand.
    """

    graph: str
    graph_sha256: str
    weights_sha256: str
    precision: Precision
    computed: Precision
    profile: str
    axes: dict[Axis, tuple[int, ...]]
    backend: TrtName
    backend_version: str
    targets: tuple[str, ...]
    gpu: str
    cuda: str
    driver: str
    flags: tuple[str, ...]
    version: str

    def __post_init__(self) -> None:
        for digest in (self.graph_sha256, self.weights_sha256):
            _require(SHA256.fullmatch(digest) is not None, f"{digest!r:.80} is no sha256")
        for axis, sizes in self.axes.items():
            rising = len(sizes) == 3 and 0 < sizes[0] <= sizes[1] <= sizes[2]
            _require(rising, f"{axis} has sizes {sizes}, not a smallest, a best and a largest")
        wrong = [target for target in self.targets if TARGET.fullmatch(target) is None]
        _require(bool(self.targets) and not wrong, f"targets {', '.join(self.targets)!r:.80} are not like sm_89")
        _require(bool(self.graph and self.profile and self.backend_version), "an engine without a name or version")

    @property
    def length(self) -> int | None:
        """Positions of the cache that it was built for; None if it has none."""
        return self.axes["length"][2] if "length" in self.axes else None

    @property
    def digest(self) -> str:
        """The sha256 of all parts: the engine's name in the cache."""
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def title(self) -> str:
        """A short name for people."""
        length = f" {self.length}" if self.length else ""
        return f"{self.graph}{length} {self.precision} {self.profile} for {','.join(self.targets)}"

    def to_dict(self) -> dict[str, Any]:
        """All parts, as plain data."""
        return dataclasses.asdict(self)


def read_key(data: Any, where: str) -> EngineKey:
    """An `EngineKey` from parsed JSON.

    Raises:
        BundleError: it is none.
    """
    return build(EngineKey, data, where)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise BundleError(f"{problem}: build the engine again with mt3-export engines")
