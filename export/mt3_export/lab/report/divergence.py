"""When decoding leaves fp32's path: the share of rows that are still on it, and where each one left."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from mt3_export.lab import wording
from mt3_export.lab.report.charts import Canvas, columns, drawing, figure, for_both, line, path, rows, text
from mt3_export.lab.report.markup import Markup, element, join
from mt3_export.lab.report.scales import Scale, spread, text_width

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mt3_export.lab.report.series import Report, Series
    from mt3_export.lab.results import FreeRun

TITLE = "Still equal to fp32 after n steps"
STRIP = 24.0  # height of a strip
EARLIEST = 3


def divergence_plot(report: Report) -> Markup | None:
    """The figure with its list of the earliest divergences, None if nothing was decoded."""
    runs = [(s, s.combination.free) for s in report.others if s.combination.free and s.combination.free.first]
    shown = [(series, free) for series, free in runs if free]
    if not shown:
        return None
    caption = (
        "Every row (one segment, or one channel of it) decodes on its own. Above: share of rows whose tokens are all "
        "fp32's so far. Below: a tick for the step at which a row's first other token came; the rows that never left "
        "are not drawn."
    )
    drawn = figure(TITLE, caption, for_both(lambda canvas: _draw(shown, canvas)))
    return join([drawn, _earliest(shown)])


def survival(free: FreeRun, last: int) -> list[tuple[int, float]]:
    """Corners of the curve: from each step on, the share of rows whose tokens up to it are all fp32's."""
    steps = sorted(step for step in free.first if step >= 0)
    corners = [(0, 1.0)]
    corners += [(step, 1 - bisect_right(steps, step) / len(free.first)) for step in dict.fromkeys(steps)]
    return [*corners, (last, corners[-1][1])]


def _left(free: FreeRun) -> list[int]:
    return [step for step in free.first if step >= 0]


def _draw(shown: Sequence[tuple[Series, FreeRun]], canvas: Canvas) -> Markup:
    last = max(1, *(length for _, free in shown for length in (*free.lengths, *_left(free))))
    ends = [survival(free, last)[-1][1] for _, free in shown]
    words = [series.label for series, _ in shown]
    if not canvas.narrow:
        words = [f"{label} {wording.percent(end)}" for label, end in zip(words, ends, strict=True)]
    reach = max(text_width(label, canvas.label) for label in words)
    counts = max(text_width(_count(free), canvas.tick) for _, free in shown)
    top, gap = 12.0, 1.45 * canvas.label
    bottom = top + max(200.0 if canvas.narrow else 250.0, gap * len(shown))
    x = Scale(0, last, 46, canvas.width - max(reach + 24, counts + 10))
    y = Scale(min(ends) - max(0.04 * (1 - min(ends)), 0.002), 1.0, bottom, top)
    under = bottom + 16
    floor = under + STRIP * len(shown)
    marks = [
        columns(x, top, floor, canvas.tick, lambda step: f"{step:,.0f}", 4 if canvas.narrow else 8),
        rows(y, x.start, x.end, canvas.tick, _share(min(ends)), 5),
        *(path(_stairs(survival(free, last), x, y), f"trace curve {series.hue}") for series, free in shown),
    ]
    heights = spread([y.at(end) for end in ends], [gap] * len(ends), top - 6, bottom + 6)
    for (series, _), label, end, height in zip(shown, words, ends, heights, strict=True):
        marks.append(line(x.end + 2, y.at(end), x.end + 18, height, f"leader {series.hue}"))
        marks.append(text(x.end + 22, height, label, f"name {series.hue}", canvas.label))
    marks += [_strip(pair, under + STRIP * index, x, canvas) for index, pair in enumerate(shown)]
    marks.append(text(canvas.width, floor + 1.2 * canvas.tick, "decoding steps", "axis", canvas.tick, "end"))
    told = [f"{s.label} {wording.percent(end)}" for (s, _), end in zip(shown, ends, strict=True)]
    return drawing(canvas.width, floor + 2.2 * canvas.tick, f"{TITLE}: at the end {', '.join(told)}", *marks)


def _count(free: FreeRun) -> str:
    return f"{len(_left(free)):,} of {len(free.first):,} differ"


def _share(lowest: float) -> Callable[[float], str]:
    digits = 0 if lowest < 0.95 else 1
    return lambda value: f"{value * 100:.{digits}f} %"


def _stairs(corners: Sequence[tuple[int, float]], x: Scale, y: Scale) -> list[tuple[float, float]]:
    points = [(x.at(0), y.at(1.0))]
    for step, share in corners:
        points += [(x.at(step), points[-1][1]), (x.at(step), y.at(share))]
    return points


def _strip(pair: tuple[Series, FreeRun], top: float, x: Scale, canvas: Canvas) -> Markup:
    """One path with a tick for every row that left."""
    series, free = pair
    left = _left(free)
    middle, half = top + STRIP / 2, STRIP / 2 - 4
    ticks = "".join(f"M{x.at(step):.1f} {middle - half:.1f}v{2 * half:.1f}" for step in sorted(left))
    tip = element(
        "title", f"{series.label}: {len(left):,} of {wording.counted(len(free.first), 'row')} left fp32's path"
    )
    base = line(x.start, middle, x.end, middle, "grid")
    label = text(x.end + 8, middle, _count(free), f"name {series.hue}", canvas.tick)
    marks = [element("path", d=ticks, class_=f"rug {series.hue}")] if ticks else []
    return element("g", tip, base, *marks, label)


def _earliest(shown: Sequence[tuple[Series, FreeRun]]) -> Markup | None:
    items = []
    for series, free in shown:
        left = sorted((step, name) for step, name in zip(free.first, free.names, strict=True) if step >= 0)
        told = ", ".join(f"{name} at step {step:,}" for step, name in left[:EARLIEST])
        if told:
            items.append(join([element("dt", series.label), element("dd", told)]))
    if not items:
        return None
    return element("details", element("summary", "The rows that left first"), element("dl", *items, class_="facts"))
