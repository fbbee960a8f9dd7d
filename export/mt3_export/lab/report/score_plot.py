"""What each precision loses of each score, with intervals, beside what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.lab import wording
from mt3_export.lab.advice import JUDGED, SCORE_NAMES
from mt3_export.lab.report.charts import columns, dot, drawing, figure, line, text
from mt3_export.lab.report.markup import Markup, element, join
from mt3_export.lab.report.scales import Scale, shortened, text_width

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mt3_export.lab.report.series import Report, Series
    from mt3_export.lab.results import Combination, Estimate, Scored

WIDTH, ROW, TOP, LABEL, TICK = 390.0, 26.0, 12.0, 13.0, 11.0
LIKE = 8  # times; a loss that is further from all others is cut off at the edge


@dataclass(frozen=True, slots=True)
class Panel:
    """One score: its losses, of those that have one, and what is allowed if that is judged."""

    title: str
    losses: tuple[tuple[Series, Estimate], ...]
    allowed: float | None


def score_plots(report: Report) -> list[Markup]:
    """A figure for each side that notes are compared with; none where nothing was scored."""
    sides = [
        ("reference", "Lost against the reference MIDI", lambda c: c.against_reference,
         "fp32's score less each precision's, clip by clip, in points (0.01 of F1); left of zero is better than fp32."),
        ("fp32", "Unlike fp32's own notes", lambda c: c.against_fp32,
         "1 less F1 against the notes of fp32, in points: what changed, for better or worse."),
    ]  # fmt: skip
    judged = "reference" if report.results.has_reference else "fp32"
    found = []
    for side, title, scored, caption in sides:
        panels = _panels(report, scored, judged=side == judged)
        if panels:
            line_words = " The dashed line is the allowed loss." if side == judged else ""
            words = f"{caption} Bars are 95 % intervals over clips.{line_words}"
            found.append(figure(title, words, _grid(panels)))
    return found


def _panels(report: Report, scored: Callable[[Combination], Scored | None], *, judged: bool) -> list[Panel]:
    panels = []
    for name, title in SCORE_NAMES.items():
        losses = []
        for series in report.others:
            found = scored(series.combination)
            loss = found.loss.get(name) if found else None
            if loss:
                losses.append((series, loss))
        allowed = report.results.allowed_loss if judged and name in JUDGED else None
        if losses:
            panels.append(Panel(title[0].upper() + title[1:], tuple(losses), allowed))
    return panels


def _grid(panels: Sequence[Panel]) -> Markup:
    """All panels of a side, on one scale."""
    low, high = _range(panels)
    return element("div", *(_panel(panel, low, high) for panel in panels), class_="grid")


def _range(panels: Sequence[Panel]) -> tuple[float, float]:
    allowed = [panel.allowed for panel in panels if panel.allowed is not None]
    ends = sorted(end for panel in panels for _, loss in panel.losses for end in (abs(loss.low), abs(loss.high)))
    while len(ends) > 2 and ends[-1] > LIKE * max(ends[len(ends) * 3 // 4], *allowed, 1e-4):
        ends.pop()
    shown = [
        max(min(end, ends[-1]), -ends[-1]) for p in panels for _, loss in p.losses for end in (loss.low, loss.high)
    ]
    low, high = min(0.0, *shown), max(0.0, *shown, *allowed)
    room = 0.06 * max(high - low, 1e-4)
    return low - room, high + room


def _panel(panel: Panel, low: float, high: float) -> Markup:
    names = min(150.0, max(text_width(series.label, LABEL) for series, _ in panel.losses))
    numbers = max(text_width(_numbers(loss), TICK) for _, loss in panel.losses)
    bottom = TOP + ROW * len(panel.losses)
    scale = Scale(low, high, names + 16, WIDTH - numbers - 12)
    marks = [columns(scale, TOP, bottom, TICK, lambda value: wording.signed(f"{value * 100:g}"), 5)]
    marks.append(line(scale.at(0), TOP, scale.at(0), bottom, "zero"))
    if panel.allowed is not None:
        x = scale.at(panel.allowed)
        marks.append(join([line(x, TOP - 6, x, bottom, "allowed")]))
    for index, (series, loss) in enumerate(panel.losses):
        marks.append(_loss(series, loss, scale, TOP + ROW * (index + 0.5), names))
    spoken = "; ".join(f"{series.label} {_numbers(loss)}" for series, loss in panel.losses)
    return element("div", element("h4", panel.title), drawing(WIDTH, bottom + 22, f"{panel.title}: {spoken}", *marks))


def _numbers(loss: Estimate) -> str:
    return f"{wording.points(loss.mean)} {wording.points_range(loss)}"


def _loss(series: Series, loss: Estimate, scale: Scale, y: float, names: float) -> Markup:
    hue, tip = series.hue, f"{series.combination.name}: {_numbers(loss)} points"
    marks = [text(names + 6, y, shortened(series.label, LABEL, names), f"name {hue}", LABEL, "end")]
    if loss.low < scale.high:
        marks.append(line(scale.at(loss.low), y, scale.at(loss.high), y, f"bar {hue}"))
    if loss.mean <= scale.high:
        marks.append(dot(scale.at(loss.mean), y, 5, f"{'hollow' if series.combination.emulated else 'dot'} {hue}", tip))
    else:
        edge = scale.end
        points = f"{edge - 7:.1f},{y - 5:.1f} {edge:.1f},{y:.1f} {edge - 7:.1f},{y + 5:.1f}"
        marks.append(element("polygon", element("title", tip), points=points, class_=f"dot {hue}"))
    return join([*marks, text(WIDTH - 2, y, _numbers(loss), "tick", TICK, "end")])
