"""Speed against accuracy: a point for each combination, and a strip for those that have no speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.lab import wording
from mt3_export.lab.advice import loss_of, reference_of, scored
from mt3_export.lab.report.charts import Canvas, columns, dot, drawing, figure, for_both, line, rows, text
from mt3_export.lab.report.markup import Markup, element, join
from mt3_export.lab.report.scales import Box, Scale, decimals, linear, logarithmic, place, spread, text_width
from mt3_export.lab.results import Estimate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_export.lab.report.series import Report, Series
    from mt3_export.lab.results import Results

TITLE = "Speed against accuracy"
WIDE_RANGE = 8  # times; a wider range of speeds has a logarithmic axis


@dataclass(frozen=True, slots=True)
class Point:
    """A combination with its score and where that may be, and its speed if it has one."""

    series: Series
    score: Estimate
    speed: float | None


def speed_plot(report: Report) -> Markup | None:
    """The figure, None if nothing was scored."""
    points = [point for series in report.done if (point := _point(report.results, series))]
    timed = [point for point in points if point.speed]
    strip = [point for point in points if not point.speed]
    if len(points) < 2 or not timed:
        return None
    against = "the reference MIDI" if report.results.has_reference else "fp32's own notes"
    caption = (
        f"Up and to the right is better. Onset F1 against {against}; bars are the 95 % interval of the difference from "
        "fp32, clip by clip. The ring marks what is recommended."
    )
    if strip:
        caption += " At the right, what was emulated and has no speed."
    return figure(TITLE, caption, for_both(lambda canvas: _draw(report, timed, strip, canvas)))


def _point(results: Results, series: Series) -> Point | None:
    found = scored(results, series.combination)
    score = found.scores.get("onset") if found else None
    if score is None and series.is_reference and not results.has_reference:
        score = Estimate(1.0, 1.0, 1.0)
    if score is None:
        return None
    loss, speed = loss_of(results, series.combination), series.combination.speed
    if loss:
        score = Estimate(score.mean, score.mean + loss.mean - loss.high, score.mean + loss.mean - loss.low)
    return Point(series, score, speed.times_realtime if speed else None)


def _draw(report: Report, timed: Sequence[Point], strip: Sequence[Point], canvas: Canvas) -> Markup:
    height = max(330.0 if canvas.narrow else 430.0, 80 + 30.0 * len(timed))
    frame = Box(46, 26, canvas.width - 10 - _strip_width(strip, canvas), height - 46)
    speeds = [point.speed or 0.0 for point in timed]
    scale = logarithmic if max(speeds) > WIDE_RANGE * min(speeds) else linear
    x = scale(speeds, frame.left, frame.right, margin=0.16)
    ends = [end for point in (*timed, *strip) for end in (point.score.low, point.score.high, point.score.mean)]
    floor = _floor(report)
    y = linear([*ends, *([] if floor is None else [floor])], frame.bottom, frame.top, least=0.002)
    size = canvas.tick
    digits = decimals(y.ticks())
    marks = [
        columns(x, frame.top, frame.bottom, size, wording.significant, 4 if canvas.narrow else 8),
        rows(y, frame.left, frame.right, size, lambda value: f"{value:.{digits}f}", 6),
        text(frame.right, height - 9, f"seconds of audio a second ({wording.TIMES} real time)", "axis", size, "end"),
        text(4, 10, "onset F1", "axis", size),
    ]
    taken: tuple[Box, ...] = ()
    if floor is not None:
        words = f"allowed: {wording.allowance(report.results.allowed_loss)} points less"
        at, below = y.at(floor), y.at(floor) + 0.9 * size
        marks += [line(frame.left, at, frame.right, at, "allowed")]
        marks += [text(frame.left + 6, below, words, "allowed", size)]
        end = frame.left + 6 + text_width(words, size)
        taken = (Box(frame.left, below - size, end, below + size), Box(frame.left, at - 2, frame.right, at + 2))
    marks += [_bar(x.at(point.speed or 0.0), point, y) for point in timed]
    marks += [_labels(timed, x, y, frame, taken, canvas), _strip(strip, y, frame, canvas)]
    return drawing(canvas.width, height, _spoken(timed, strip), *marks)


def _floor(report: Report) -> float | None:
    """fp32's score less what may be lost."""
    fp32 = reference_of(report.results)
    found = scored(report.results, fp32) if fp32 else None
    score = found.scores.get("onset") if found else None
    if fp32 and score is None and not report.results.has_reference:
        return 1 - report.results.allowed_loss
    return score.mean - report.results.allowed_loss if score else None


def _bar(x: float, point: Point, y: Scale) -> Markup:
    """A point with its interval."""
    score, hue = point.score, point.series.hue
    speed = f", {wording.factor(point.speed)} real time" if point.speed else ", emulated"
    tip = f"{point.series.combination.name}: onset F1 {wording.f1(score.mean)} ({wording.f1_range(score)}){speed}"
    parts = [line(x, y.at(score.low), x, y.at(score.high), f"bar {hue}")] if score.high > score.low else []
    if point.series.chosen:
        parts.append(element("circle", cx=x, cy=y.at(score.mean), r=11, class_=f"ring {hue}"))
    parts.append(dot(x, y.at(score.mean), 6, f"{'hollow' if not point.speed else 'dot'} {hue}", tip))
    return join(parts)


def _labels(timed: Sequence[Point], x: Scale, y: Scale, frame: Box, taken: Sequence[Box], canvas: Canvas) -> Markup:
    """The names beside the points, with a line to those that had to go further away; `taken`: a text, and lines."""
    places = [(x.at(point.speed or 0.0), y.at(point.score.mean)) for point in timed]
    dots = [Box(a - 12, b - 12, a + 12, b + 12) for a, b in places]
    bars = [
        Box(a - 2, y.at(point.score.high), a + 2, y.at(point.score.low))
        for (a, _), point in zip(places, timed, strict=True)
    ]
    sizes = [(text_width(point.series.label, canvas.label), 1.35 * canvas.label) for point in timed]
    boxes = place(
        places, sizes, Box(frame.left, 20, frame.right + 8, frame.bottom), taken[:1], [*taken[1:], *dots, *bars]
    )
    marks = []
    for point, (a, b), box in zip(timed, places, boxes, strict=True):
        middle = (box.left + box.right) / 2
        to_x, to_y = min(max(a, box.left), box.right), min(max(b, box.top), box.bottom)
        if (to_x - a) ** 2 + (to_y - b) ** 2 > 24**2:
            marks.append(line(a, b, to_x, to_y, f"leader {point.series.hue}"))
        name = f"name {point.series.hue}"
        marks.append(text(middle, (box.top + box.bottom) / 2, point.series.label, name, canvas.label, "middle"))
    return join(marks)


def _strip_width(strip: Sequence[Point], canvas: Canvas) -> float:
    return 50 + max(text_width(point.series.label, canvas.label) for point in strip) if strip else 0.0


def _strip(strip: Sequence[Point], y: Scale, frame: Box, canvas: Canvas) -> Markup:
    if not strip:
        return join([])
    left = frame.right + 14
    marks = [
        element(
            "rect", x=left, y=frame.top, width=canvas.width - left, height=frame.bottom - frame.top, class_="strip"
        ),
        text((left + canvas.width) / 2, frame.bottom + 1.2 * canvas.tick, "emulated", "tick", canvas.tick, "middle"),
    ]
    wanted = [y.at(point.score.mean) for point in strip]
    heights = spread(wanted, [1.4 * canvas.label] * len(strip), frame.top, frame.bottom)
    for index, (point, height) in enumerate(zip(strip, heights, strict=True)):
        x = left + 9 + (index % 2) * 9
        marks += [
            line(x, wanted[index], left + 28, height, f"leader {point.series.hue}"),
            _bar(x, point, y),
            text(left + 31, height, point.series.label, f"name {point.series.hue}", canvas.label),
        ]
    return join(marks)


def _spoken(timed: Sequence[Point], strip: Sequence[Point]) -> str:
    told = [
        f"{p.series.label} {wording.factor(p.speed or 0.0)} real time, F1 {wording.f1(p.score.mean)}" for p in timed
    ]
    told += [f"{point.series.label} emulated, F1 {wording.f1(point.score.mean)}" for point in strip]
    return f"{TITLE}: {'; '.join(told)}"
