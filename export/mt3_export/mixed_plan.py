"""Mixed-precision plans: which products of a model stay in float32 where a precision rounds the others.

The precision lab writes them as TOML; `mt3-export bundle`, `quantize` and `engines` obey them. Without torch and onnx.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

from mt3_export.recipes import GRAPHS
from mt3_export.toml_file import Place, read_toml
from mt3_runtime.errors import OptionError
from mt3_runtime.files import atomic_write
from mt3_runtime.graphs import FEATURES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from mt3_runtime.graphs import Precision

ROUNDED: tuple[Precision, ...] = ("fp16", "bf16", "int8", "w8", "w4")
PLANNED = tuple(graph for graph in GRAPHS if graph != FEATURES)  # the features are float32 in every precision
NEAREST, LIKENESS = 3, 0.4  # how many names an error suggests, and how like the wrong one they are
DIGITS = 12  # of a digest, where people read it


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """`keep`: products that stay in float32, by graph, as `mt3_export.products` names them.

    `measured`: numbers and texts for people, which nothing interprets.
    """

    model: str
    precision: Precision
    keep: dict[str, tuple[str, ...]]
    measured: dict[str, float | str] = field(default_factory=dict)

    def of(self, graph: str) -> tuple[str, ...]:
        """The products of one graph that stay in float32."""
        return self.keep.get(graph, ())

    @property
    def digest(self) -> str:
        """The sha256 of all that is obeyed: not of what was measured, nor of the order of names."""
        keep = {graph: sorted(names) for graph, names in self.keep.items() if names}
        text = json.dumps([self.model, self.precision, keep], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def label(self) -> str:
        """A few digits that tell plans apart, for keys and people."""
        return self.digest[:DIGITS]


def read_plan(path: Path) -> MixedPlan:
    """Read and check a plan.

    Raises:
        OptionError: it cannot be read, or holds anything but what a plan holds.
    """
    return _checked(read_toml(path, "plan"), Place(f"plan {path.name}"))


def write_plan(plan: MixedPlan, path: Path, comment: str = "") -> None:
    """Write the canonical text of a plan; each line of `comment` stands before it.

    Raises:
        OptionError: the plan is none that `read_plan` would take.
        OutputError: it cannot be written.
    """
    text = _to_toml(plan)
    try:
        data = f"{_comment(comment)}{text}".encode()
    except UnicodeEncodeError:
        raise OptionError("the plan holds half a character, which no file can: use other names") from None
    _checked(tomllib.loads(text), Place(f"plan {path.name}"))  # what nobody could read is not written
    atomic_write(path, data)


def plans_by_precision(plans: Iterable[MixedPlan], model: str, graphs: Collection[str]) -> dict[Precision, MixedPlan]:
    """The plans for a model with these graphs, by what they are for.

    Raises:
        OptionError: one is for another model or names another graph, or two are for one precision.
    """
    found: dict[Precision, MixedPlan] = {}
    for plan in plans:
        if plan.model != model:
            raise OptionError(
                f"the plan for {plan.precision} is of model {plan.model!r:.80}, not of {model}: give its own"
            )
        if plan.precision in found:
            raise OptionError(f"there are two plans for {plan.precision}: give one")
        for graph in plan.keep:
            _check_name(plan, graph, [name for name in PLANNED if name in graphs], "graph", "the model")
        found[plan.precision] = plan
    return found


def check_products(plan: MixedPlan, graph: str, names: Collection[str]) -> None:
    """Check what a plan keeps of a graph against the products that there are.

    Raises:
        OptionError: one is none of them.
    """
    for name in plan.of(graph):
        _check_name(plan, name, names, "product", graph)


def said(plans: Iterable[MixedPlan]) -> dict[str, str]:
    """What a manifest says of the plans that a bundle was made by, among the tools."""
    return {f"plan {plan.precision}": f"{plan.label} ({sum(map(len, plan.keep.values()))} in fp32)" for plan in plans}


def _check_name(plan: MixedPlan, name: str, names: Collection[str], kind: str, place: str) -> None:
    if name not in names:
        near = get_close_matches(name, names, NEAREST, LIKENESS) if kind == "product" else list(names)
        fix = f"use {', '.join(near or list(names)[:NEAREST])}" if names else "leave it out"
        raise OptionError(f"the plan for {plan.precision} keeps {name!r:.80}, no {kind} of {place}: {fix}")


def _checked(data: Any, where: Place) -> MixedPlan:
    keys = where.table(data, required=("model", "precision", "keep"), optional=("measured",))
    measured = where.table(keys.get("measured", {}), named="measured")
    return MixedPlan(
        where.text(keys["model"], "model"),
        cast("Precision", where.choice(keys["precision"], ROUNDED, "precision")),
        {
            graph: _products(listed, where, f"keep.{graph}")
            for graph, listed in where.table(keys["keep"], optional=PLANNED, named="keep").items()
        },
        {key: _measured(value, where, f"measured.{key}") for key, value in measured.items()},
    )


def _products(data: Any, where: Place, named: str) -> tuple[str, ...]:
    names = tuple(where.text(name, named) for name in where.listed(data, named))
    twice = [name for name, count in Counter(names).items() if count > 1]
    where.expect(not twice, f"{named} names {''.join(twice[:1])!r:.80} twice", "leave one out")
    return names


def _measured(value: Any, where: Place, named: str) -> float | str:
    if isinstance(value, str):
        return value
    number = type(value) in {int, float} and math.isfinite(value)
    where.expect(number, f"{named} is {value!r:.80}", "write a number or a text")
    return float(value)


def _to_toml(plan: MixedPlan) -> str:
    lines = [f"model = {_quoted(plan.model)}", f"precision = {_quoted(plan.precision)}", "", "[keep]"]
    lines += [f"{_quoted(graph, key=True)} = [{', '.join(map(_quoted, names))}]" for graph, names in plan.keep.items()]
    if plan.measured:
        lines += ["", "[measured]"]
    for key, value in plan.measured.items():
        lines.append(f"{_quoted(key, key=True)} = {_quoted(value) if isinstance(value, str) else repr(float(value))}")
    return "\n".join([*lines, ""])


def _quoted(text: str, *, key: bool = False) -> str:
    """A basic string; a key that may stand as it is does."""
    if key and text and all(char in "_-" or (char.isascii() and char.isalnum()) for char in text):
        return text
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # the one that JSON lets stand


def _comment(text: str) -> str:
    lines = ["".join(char if char.isprintable() else "\ufffd" for char in line) for line in text.splitlines()]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
