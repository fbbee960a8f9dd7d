"""HTML and SVG elements whose text and attributes are always escaped."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SPACES = "\n\u00a0\u202f"  # also where they count as not printable
VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta"})


class Markup(str):
    """Text that is HTML already: only `element` and `join` make it, and what is written in this package."""

    __slots__ = ()


Child = str | int | None  # a str that is not Markup is text
Attribute = str | float | None


def element(name: str, *children: Child, **attributes: Attribute) -> Markup:
    """An element; in names of attributes `_` stands for `-`, one at the end for nothing. None is left out.

    Raises:
        ValueError: a number is not finite.
    """
    opened = "".join([name, *(_attribute(key, value) for key, value in attributes.items() if value is not None)])
    if name in VOID:
        return Markup(f"<{opened}>")
    return Markup(f"<{opened}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """One after the other, what is not Markup escaped."""
    return Markup("".join(c if isinstance(c, Markup) else escaped(str(c)) for c in children if c is not None))


def escaped(text: str) -> str:
    """Text of data: no markup, no control or direction characters, nothing that cannot be encoded."""
    return html.escape("".join(c if c.isprintable() or c in SPACES else "\ufffd" for c in text))


def number(value: float) -> str:
    """A coordinate, in hundredths."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no coordinate")
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _attribute(key: str, value: str | float) -> str:
    text = value if isinstance(value, str) else number(value)
    return f' {key.rstrip("_").replace("_", "-")}="{escaped(text)}"'
