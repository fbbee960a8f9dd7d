"""How far each graph's outputs are from fp32's, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mt3_export.lab import wording
from mt3_export.lab.report.markup import Markup, element, join

if TYPE_CHECKING:
    from mt3_export.lab.report.series import Report, Series
    from mt3_export.lab.results import GraphError

HEADS = (
    "Precision",
    "Relative error",
    "Largest error",
    "Cosine",
    "PSNR",
    "Largest number",
    "Of the limit",
    "Not finite",
)


def graph_table(report: Report) -> Markup | None:
    """A row for each graph and combination, None if none was measured."""
    graphs = dict.fromkeys(error.graph for series in report.others for error in series.combination.graphs)
    if not graphs:
        return None
    bodies = []
    for graph in graphs:
        rows = [
            _row(series, error)
            for series in report.others
            for error in series.combination.graphs
            if error.graph == graph
        ]
        heading = element("tr", element("th", graph, colspan=len(HEADS), scope="rowgroup", class_="group name"))
        bodies.append(element("tbody", heading, *rows))
    head = element(
        "tr", *(element("th", name, scope="col", class_=None if i else "name") for i, name in enumerate(HEADS))
    )
    table = element("table", element("thead", head), *bodies, class_="graphs")
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label="Error by graph")


def _row(series: Series, error: GraphError) -> Markup:
    used = wording.percent(error.largest / error.limit) if error.limit else wording.NONE
    broken = f"{error.non_finite:,}"
    cells = [
        wording.significant(error.relative, 2),
        wording.significant(error.max, 2),
        _cosine(error.cosine),
        wording.NONE if error.psnr_db is None else f"{error.psnr_db:.0f} dB",
        wording.significant(error.largest),
        used,
        element("b", broken, class_="bad") if error.non_finite else broken,
    ]
    name = element("th", element("i", class_=f"swatch {series.hue}"), series.label, scope="row", class_="name")
    return element("tr", name, *(element("td", cell) for cell in cells))


def _cosine(value: float) -> str:
    """With as many nines as it has."""
    if value >= 1:
        return "1"
    text = f"{value:.4f}"
    return text if text != "1.0000" else join(["1 \u2212 ", wording.significant(1 - value, 2)])
