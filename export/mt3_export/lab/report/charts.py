"""The pieces that all charts are drawn with, as SVG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.lab.report.markup import Markup, element, join, number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mt3_export.lab.report.markup import Child
    from mt3_export.lab.report.scales import Scale


@dataclass(frozen=True, slots=True)
class Canvas:
    """What a chart is drawn for: its width and sizes of text in units of the drawing."""

    width: float
    label: float
    tick: float
    narrow: bool


WIDE = Canvas(960, 13.5, 12, narrow=False)
NARROW = Canvas(354, 12, 10.5, narrow=True)


def for_both(draw: Callable[[Canvas], Markup]) -> Markup:
    """A chart drawn twice, for wide and for narrow pages: the page shows one of them."""
    return join([element("div", draw(WIDE), class_="wide"), element("div", draw(NARROW), class_="narrow")])


def figure(title: str, caption: Child, body: Markup) -> Markup:
    """A figure with its title and what it shows above it."""
    heading = element("figcaption", element("b", title), " ", element("span", caption))
    return element("figure", heading, body)


def drawing(width: float, height: float, label: str, *marks: Markup) -> Markup:
    """An SVG drawing; `label` says what it shows to those who do not see it."""
    box = f"0 0 {number(width)} {number(height)}"
    return element("svg", *marks, viewBox=box, width=width, height=height, role="img", aria_label=label)


def text(x: float, y: float, content: str, class_: str, size: float, anchor: str = "start") -> Markup:
    """A line of text; y is the middle of its letters."""
    return element("text", content, x=x, y=y + 0.36 * size, class_=class_, font_size=size, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """Lines from point to point."""
    steps = " ".join(f"{'L' if index else 'M'}{number(x)} {number(y)}" for index, (x, y) in enumerate(points))
    return element("path", d=steps, class_=class_)


def dot(x: float, y: float, radius: float, class_: str, tip: str) -> Markup:
    """A point that says what it is."""
    return element("circle", element("title", tip), cx=x, cy=y, r=radius, class_=class_)


def columns(scale: Scale, top: float, bottom: float, size: float, show: Callable[[float], str], most: int) -> Markup:
    """Vertical lines at round numbers of an axis, with the numbers below."""
    marks = []
    for tick in scale.ticks(most):
        x = scale.at(tick)
        marks += [line(x, top, x, bottom, "grid"), text(x, bottom + 1.2 * size, show(tick), "tick", size, "middle")]
    return join(marks)


def rows(scale: Scale, left: float, right: float, size: float, show: Callable[[float], str], most: int) -> Markup:
    """Horizontal lines at round numbers of an axis, with the numbers at the left."""
    marks = []
    for tick in scale.ticks(most):
        y = scale.at(tick)
        marks += [line(left, y, right, y, "grid"), text(left - 8, y, show(tick), "tick", size, "end")]
    return join(marks)
