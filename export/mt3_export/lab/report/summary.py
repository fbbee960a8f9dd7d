"""The table of all combinations: what each costs and brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.lab import wording
from mt3_export.lab.advice import SCORE_NAMES
from mt3_export.lab.report.markup import Markup, element, join

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mt3_export.lab.report.series import Report, Series
    from mt3_export.lab.results import Combination, Scored, Speed

HEADS = {
    "onset": "Onset F1",
    "onset_offset": "Onset + offset",
    "onset_offset_program": "+ program",
    "drums": "Drums",
    "leakage": "Leakage",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its number for each combination, how it is written, and which number is best (`sign` times largest)."""

    group: str
    title: str
    value: Callable[[Combination], float | None]
    show: Callable[[float], str]
    sign: int
    detail: Callable[[Combination], tuple[str, ...]]


def summary_table(report: Report) -> Markup:
    """One row for each combination; of what did not run, the reason."""
    done = report.done
    columns = [column for column in _columns(report) if any(column.value(s.combination) is not None for s in done)]
    best = [_best(column, done) for column in columns]
    body = [_row(series, columns, best) for series in report.series]
    table = element("table", _header(columns), element("tbody", *body), class_="summary")
    notes = [element("span", "Bold and underlined", class_="best"), " is the best of its column. "]
    if any(series.combination.emulated for series in report.series):
        notes += [
            _pill("emulated"),
            " precisions are rounded on the CPU where a device would: no speed, size or memory.",
        ]
    scroll = element("div", table, class_="scroll", tabindex="0", role="region", aria_label="All combinations")
    return join([scroll, element("p", *notes, class_="note")])


def _columns(report: Report) -> list[Column]:
    run = [
        _column("To run", "Size", lambda c: c.size_bytes, wording.size, -1),
        _of_speed("Load", lambda speed: speed.load_s, wording.duration, -1),
        _of_speed("Segment", lambda speed: speed.latency_ms / 1e3, wording.duration, -1),
        _of_speed("Step", lambda speed: speed.step_ms / 1e3, wording.duration, -1),
        _of_speed("Throughput", lambda speed: speed.times_realtime, wording.factor, 1),
        _of_speed("Memory", lambda speed: speed.peak_mb * 1e6, wording.size, -1),
    ]
    tokens = [
        Column("Next token", "Equal", _agreement, wording.percent, 1, _agreement_range),
        _column("Next token", "KL, nats", lambda c: c.forced.kl_mean if c.forced else None, wording.significant, -1),
    ]
    against_reference = _score_columns("Notes against the reference MIDI", lambda c: c.against_reference)
    against_fp32 = _score_columns("Notes against fp32's own", lambda c: c.against_fp32)
    ours = {series.combination.name for series in report.series if series.is_reference}
    others = [_hidden(column, ours) for column in [*tokens, *against_fp32]]
    return [*run, *against_reference, *others[len(tokens) :], *others[: len(tokens)]]


def _column(
    group: str, title: str, value: Callable[[Combination], float | None], show: Callable[[float], str], sign: int
) -> Column:
    return Column(group, title, value, show, sign, lambda _: ())


def _of_speed(title: str, value: Callable[[Speed], float], show: Callable[[float], str], sign: int) -> Column:
    return _column("To run", title, lambda c: value(c.speed) if c.speed else None, show, sign)


def _hidden(column: Column, names: set[str]) -> Column:
    """The column without what compares something with itself."""
    return Column(
        column.group,
        column.title,
        lambda c: None if c.name in names else column.value(c),
        column.show,
        column.sign,
        lambda c: () if c.name in names else column.detail(c),
    )


def _agreement(combination: Combination) -> float | None:
    return combination.forced.agreement.mean if combination.forced else None


def _agreement_range(combination: Combination) -> tuple[str, ...]:
    if combination.forced is None:
        return ()
    agreement = combination.forced.agreement
    return (f"{wording.percent(agreement.low)} {wording.DASH} {wording.percent(agreement.high)}",)


def _score_columns(group: str, scored: Callable[[Combination], Scored | None]) -> list[Column]:
    return [_score_column(group, name, scored) for name in SCORE_NAMES]


def _score_column(group: str, name: str, scored: Callable[[Combination], Scored | None]) -> Column:
    def value(combination: Combination) -> float | None:
        found = scored(combination)
        estimate = found.scores.get(name) if found else None
        return estimate.mean if estimate else None

    def detail(combination: Combination) -> tuple[str, ...]:
        found = scored(combination)
        if found is None:
            return ()
        score, loss = found.scores.get(name), found.loss.get(name)
        lines = [wording.f1_range(score)] if score else []
        if loss:
            lines.append(f"loss {wording.points(loss.mean)} {wording.points_range(loss)}")
        return tuple(lines)

    return Column(group, HEADS[name], value, wording.f1, -1 if name == "leakage" else 1, detail)


def _best(column: Column, done: Sequence[Series]) -> str | None:
    """The best number as it is written; None where all are alike or there is but one."""
    values = [value for series in done if (value := column.value(series.combination)) is not None]
    if len({column.show(value) for value in values}) < 2:
        return None
    return column.show(max(values, key=lambda value: column.sign * value))


def _header(columns: Sequence[Column]) -> Markup:
    groups: dict[str, int] = {}
    for column in columns:
        groups[column.group] = groups.get(column.group, 0) + 1
    above = [element("th", name, colspan=count, scope="colgroup", class_="group") for name, count in groups.items()]
    starts = _starts(columns)
    below = [
        element("th", column.title, scope="col", class_="start" if start else None)
        for column, start in zip(columns, starts, strict=True)
    ]
    first = element("th", "Combination", scope="col", class_="name", rowspan=2)
    return element("thead", element("tr", first, *above), element("tr", *below))


def _starts(columns: Sequence[Column]) -> list[bool]:
    """Which columns are the first of their group."""
    return [not index or columns[index - 1].group != column.group for index, column in enumerate(columns)]


def _row(series: Series, columns: Sequence[Column], best: Sequence[str | None]) -> Markup:
    combination = series.combination
    if not series.done:
        why = combination.problem or "no reason was given"
        reason = element("b", "Failed: " if combination.outcome == "failed" else "Cannot run here: ")
        cell = element("td", element("div", reason, why, class_="why"), colspan=max(1, len(columns)), class_="problem")
        return element("tr", _name(series), cell, class_="undone")
    cells = [
        _cell(column, combination, highlight, start=start)
        for column, highlight, start in zip(columns, best, _starts(columns), strict=True)
    ]
    return element("tr", _name(series), *cells, class_="chosen" if series.chosen else None)


def _name(series: Series) -> Markup:
    combination = series.combination
    pills = [_pill("recommended", "pick")] if series.chosen else []
    pills += [_pill("emulated")] if combination.emulated else []
    swatch = element("i", class_=f"swatch {series.hue}")
    device = element("small", combination.device)
    again = combination.fallback_rows
    if again:
        pills.append(_pill(f"{wording.counted(again, 'row')} again in fp32", "again"))
    return element("th", swatch, combination.precision, " ", device, *pills, scope="row", class_="name")


def _cell(column: Column, combination: Combination, best: str | None, *, start: bool) -> Markup:
    value = column.value(combination)
    edge = "start" if start else None
    if value is None:
        return element("td", element("span", wording.NONE, class_="none"), class_=edge)
    shown = column.show(value)
    strong = element("span", shown, class_="best" if shown == best else "number")
    return element("td", strong, *(element("small", line) for line in column.detail(combination)), class_=edge)


def _pill(label: str, kind: str = "") -> Markup:
    return element("span", label, class_=f"pill {kind}".strip())
