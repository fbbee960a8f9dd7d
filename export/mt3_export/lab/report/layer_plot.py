"""Error by layer: a row for each product in the order of computation, a line down the rows for each precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.lab import wording
from mt3_export.lab.report.charts import Canvas, columns, dot, drawing, figure, for_both, line, path, text
from mt3_export.lab.report.markup import Markup, element, join, number
from mt3_export.lab.report.scales import Scale, logarithmic, shortened, spread, text_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_export.lab.report.series import Report, Series
    from mt3_export.lab.results import LayerError

SLANT = 52  # degrees
NEAR = 1e7  # times; a type's limit that is further from all activations is not drawn
NOTE = (
    "Below, a row for each product in the order of computation: norm of the difference from fp32 over fp32's norm, of "
    "what it gives with all errors before it in its graph. Further right is worse; a cross is a number that is not "
    "finite; where there is no mark, nothing differs. At the right, the largest number that the product reads or gives "
    "in fp32, and as dashed lines the largest that a type can hold, where they are near."
)


@dataclass(frozen=True, slots=True)
class Rows:
    """One graph: its layers in order, errors of each series where there are some, and the largest numbers in fp32."""

    graph: str
    layers: tuple[str, ...]
    errors: tuple[tuple[Series, dict[str, LayerError]], ...]
    equal: tuple[str, ...]  # labels of series that change nothing
    largest: dict[str, float]
    limits: dict[float, str]  # of types, with whose they are


def layer_plots(report: Report) -> list[Markup]:
    """A figure for each graph that some precision changes."""
    graphs = dict.fromkeys(layer.graph for series in report.others for layer in series.combination.layers)
    found = []
    for graph in graphs:
        rows = _rows(report, graph)
        if not rows.errors:
            continue

        def draw(canvas: Canvas, rows: Rows = rows) -> Markup:
            return _draw(rows, canvas)

        found.append(figure(f"Error by layer: {graph}", f"At worst: {_worst(rows)}.", for_both(draw)))
    return [element("p", NOTE, class_="note"), *found] if found else []


def _rows(report: Report, graph: str) -> Rows:
    errors: list[tuple[Series, dict[str, LayerError]]] = []
    equal, largest, limits, layers = list[str](), dict[str, float](), dict[float, str](), dict[str, None]()
    for series in report.others:
        own = {layer.layer: layer for layer in series.combination.layers if layer.graph == graph}
        changed = {name: layer for name, layer in own.items() if layer.relative > 0 or layer.non_finite}
        if changed:
            errors.append((series, changed))
        elif own:
            equal.append(series.label)
        for name, layer in own.items():
            layers[name] = None
            largest[name] = max(largest.get(name, 0.0), layer.largest)
        for found in series.combination.graphs:
            if own and found.graph == graph and found.limit:
                limits.setdefault(found.limit, series.label)
    highest = max(largest.values(), default=0.0)
    near = {limit: name for limit, name in limits.items() if limit < NEAR * max(highest, 1.0)}
    shown = {name: value for name, value in largest.items() if value > 0}
    return Rows(graph, tuple(layers), tuple(errors), tuple(equal), shown, near)


def _draw(rows: Rows, canvas: Canvas) -> Markup:
    step = 19.0 if len(rows.layers) <= 60 else 15.0
    size = canvas.tick
    lines = _lines(rows.layers)
    width = min(132.0 if canvas.narrow else 220.0, max(text_width(words, size) for words, _, _ in lines) + 8)
    right = _room(rows, canvas)
    top = _top(rows, canvas)
    heights = [top + step * (index + 0.5) for index in range(len(lines))]
    bottom = top + step * len(lines)
    x = _scale(rows, width + 10, canvas.width - right - (22 if right else 12))
    marks = [columns(x, top, bottom, size, wording.significant, 3 if canvas.narrow else 7)]
    marks += [_name(words, layer, y, width, canvas) for (words, layer, _), y in zip(lines, heights, strict=True)]
    centres = {layer: y for (_, layer, _), y in zip(lines, heights, strict=True) if layer}
    marks += [_trace(series, own, centres, x) for series, own in rows.errors]
    marks.append(_labels(rows, centres, x, canvas))
    if rows.largest:
        marks.append(_activations(rows, centres, bottom, canvas, right))
    return drawing(
        canvas.width, bottom + 2.2 * size, f"Error by layer of {rows.graph}, at worst: {_worst(rows)}", *marks
    )


def _lines(layers: Sequence[str]) -> list[tuple[str, str, str]]:
    """Lines of the chart as words, layer (none of a heading) and group: "layers.0" stands once above its products."""
    found: list[tuple[str, str, str]] = []
    group = ""
    for layer in layers:
        head, rest = _split(layer)
        if head and head != group:
            found.append((head, "", head))
        group = head
        found.append((rest, layer, head))
    return found


def _split(layer: str) -> tuple[str, str]:
    """A name up to its first number, and the rest: "layers.0" and "feed_forward.gates"."""
    parts = layer.split(".")
    place = next((index for index, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if place is None:
        return "", layer
    return ".".join(parts[: place + 1]), ".".join(parts[place + 1 :])


def _name(words: str, layer: str, y: float, width: float, canvas: Canvas) -> Markup:
    size = canvas.tick
    fitted = shortened(words, size, width)
    if not layer:
        return text(0, y + 2, fitted, "head", size)
    return element("g", element("title", layer), text(width, y, fitted, "layer", size, "end"))


def _scale(rows: Rows, start: float, end: float) -> Scale:
    return logarithmic((error.relative for _, own in rows.errors for error in own.values()), start, end)


def _trace(series: Series, own: dict[str, LayerError], centres: dict[str, float], x: Scale) -> Markup:
    """A line down the rows with a dot at each; what is not finite is a cross at the right edge."""
    kind = "hollow" if series.combination.emulated else "dot"
    lines: list[list[tuple[float, float]]] = [[]]
    dots = []
    for layer, y in centres.items():
        error = own.get(layer)
        if error is None:
            lines.append([])
            continue
        broken = error.non_finite > 0
        at = _place(error, x)
        said = f"{error.non_finite:,} numbers not finite" if broken else f"error {wording.significant(error.relative)}"
        tip = f"{series.label}, {layer}: {said}"
        lines[-1].append((at, y))
        dots.append(_cross(at, y, series.hue, tip) if broken else dot(at, y, 3.6, f"{kind} {series.hue}", tip))
    return join([*(path(points, f"trace {series.hue}") for points in lines if len(points) > 1), *dots])


def _place(error: LayerError, x: Scale) -> float:
    return x.end if error.non_finite else x.at(error.relative)


def _cross(x: float, y: float, hue: str, tip: str) -> Markup:
    d = f"M{x - 4:.2f} {y - 4:.2f}l8 8m0 -8l-8 8"
    return element("path", element("title", tip), d=d, class_=f"cross {hue}")


def _labels(rows: Rows, centres: dict[str, float], x: Scale, canvas: Canvas) -> Markup:
    """The names above the first dots, moved apart, with lines to where they belong; slanted where there is no room."""
    anchors = []
    for series, own in rows.errors:
        layer = next(layer for layer in centres if layer in own)
        anchors.append((series, _place(own[layer], x), centres[layer]))
    slanted, size = _slanted(rows, canvas), canvas.label
    widths = [1.5 * size if slanted else text_width(series.label, size) + 6 for series, _, _ in anchors]
    places = spread([at for _, at, _ in anchors], widths, x.start, x.end + 10)
    foot = _top(rows, canvas) - 14
    marks = []
    for (series, at, y), place in zip(anchors, places, strict=True):
        marks.append(line(place, foot + 2, at, y, f"leader {series.hue}"))
        name = f"name {series.hue}"
        if slanted:
            turn = f"rotate({SLANT} {number(place)} {number(foot)})"
            marks.append(element("g", text(place, foot, series.label, name, size, "end"), transform=turn))
        else:
            marks.append(text(place, foot - size / 2, series.label, name, size, "middle"))
    return join(marks)


def _room(rows: Rows, canvas: Canvas) -> float:
    """Width of what stands right of the errors."""
    return (64.0 if canvas.narrow else 190.0) if rows.largest else 0.0


def _slanted(rows: Rows, canvas: Canvas) -> bool:
    """Whether the names do not fit side by side."""
    needed = sum(text_width(series.label, canvas.label) + 6 for series, _ in rows.errors)
    return needed > canvas.width - _room(rows, canvas) - (170 if canvas.narrow else 260)


def _top(rows: Rows, canvas: Canvas) -> float:
    """Where the rows begin, below the names."""
    if not _slanted(rows, canvas):
        return 16 + 1.4 * canvas.label
    return 22 + 0.85 * max(text_width(series.label, canvas.label) for series, _ in rows.errors)


def _activations(rows: Rows, centres: dict[str, float], bottom: float, canvas: Canvas, width: float) -> Markup:
    """Bars of the largest numbers, on a logarithmic axis from the decade of the smallest to the types' limits."""
    left, right = canvas.width - width, canvas.width - 4
    top, size = _top(rows, canvas), canvas.tick
    values = [*rows.largest.values(), *rows.limits]
    scale = Scale(min(values) / 2, max(values) * 1.6, left, right, log=True)
    marks = [columns(scale, top, bottom, size, _power, 2 if canvas.narrow else 4)]
    for layer, value in rows.largest.items():
        y, tip = centres[layer], element("title", f"{layer}: {wording.significant(value)}")
        marks.append(element("rect", tip, x=left, y=y - 1, width=scale.at(value) - left, height=2, class_="largest"))
        marks.append(element("circle", cx=scale.at(value), cy=y, r=3.2, class_="largest"))
    marks += [line(scale.at(limit), top, scale.at(limit), bottom, "allowed") for limit in rows.limits]
    heading = "largest" if canvas.narrow else _limits(rows)
    fitted = shortened(heading, size, width)
    return join([*marks, text(right, top - 12, fitted, "axis", size, "end")])


def _power(value: float) -> str:
    power = round(math.log10(value))
    whole = abs(value / 10.0**power - 1) < 1e-6 and power >= 3
    return f"10{str(power).translate(wording.SUPERSCRIPTS)}" if whole else wording.significant(value)


def _limits(rows: Rows) -> str:
    if not rows.limits:
        return "largest number"
    limit, name = next(iter(rows.limits.items()))
    return f"{name} ends at {wording.significant(limit, 5)}"


def _worst(rows: Rows) -> str:
    """The largest error of each series in words."""
    told = []
    for series, own in rows.errors:
        error = max(own.values(), key=lambda error: (error.non_finite, error.relative))
        value = f"{error.non_finite:,} not finite" if error.non_finite else wording.significant(error.relative, 2)
        told.append(f"{series.label} {value} in {error.layer}")
    if rows.equal:
        told.append(f"{', '.join(rows.equal)} as in fp32")
    return "; ".join(told)
