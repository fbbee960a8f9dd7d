"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mt3_export.lab.advice import recommend
from mt3_export.lab.report.bisections import bisection_parts
from mt3_export.lab.report.divergence import divergence_plot
from mt3_export.lab.report.glossary import glossary
from mt3_export.lab.report.graph_table import graph_table
from mt3_export.lab.report.head import details, head
from mt3_export.lab.report.layer_plot import layer_plots
from mt3_export.lab.report.markup import Markup, element, escaped, join
from mt3_export.lab.report.rolls import roll_figures
from mt3_export.lab.report.score_plot import score_plots
from mt3_export.lab.report.series import Report, all_series
from mt3_export.lab.report.speed_plot import speed_plot
from mt3_export.lab.report.style import STYLE
from mt3_export.lab.report.summary import summary_table
from mt3_runtime.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mt3_export.lab.overlays import Picture
    from mt3_export.lab.results import Results

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the page may fetch nothing


def write_report(results: Results, pictures: Sequence[Picture], path: Path) -> None:
    """Write results as one HTML file without scripts, which fetches nothing.

    Args:
        results: Any part of them may be missing.
        pictures: Piano rolls, embedded.
        path: Of the file.

    Raises:
        OutputError: it cannot be written.
    """
    atomic_write(path, page(results, pictures).encode())


def page(results: Results, pictures: Sequence[Picture]) -> str:
    """The HTML."""
    advice = recommend(results)
    report = Report(results, advice, all_series(results, advice.choice))
    sections = _sections(report, pictures)
    links = [element("a", key.capitalize(), href=f"#{key}") for key, _, _ in sections]
    nav = element("nav", *links, aria_label="Sections")
    blocks = [element("section", element("h2", title), body, id=key, class_="block") for key, title, body in sections]
    main = element("main", head(report), nav, *blocks)
    title = escaped(f"{results.model}: precision report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{main}\n</body>\n</html>\n"
    )


def _sections(report: Report, pictures: Sequence[Picture]) -> list[tuple[str, str, Markup]]:
    """Key, title and body of every section, in order."""
    table = graph_table(report)
    return [
        ("summary", "All combinations", summary_table(report)),
        ("speed", "Speed and accuracy", _or([speed_plot(report)], "Nothing was both timed and scored.")),
        ("notes", "What it costs in notes", _or(score_plots(report), "No notes were compared with fp32's.")),
        ("tokens", "When decoding diverges", _or([divergence_plot(report)], "Nothing but fp32 was decoded.")),
        ("layers", "Where the error comes from", _or([table, *layer_plots(report)], "No graph's error was measured.")),
        (
            "suspects",
            "Which products cost most",
            _or(bisection_parts(report), "Nothing was bisected: --bisect does it."),
        ),
        ("pictures", "What it looks like", _or(roll_figures(pictures), "There are no piano rolls.")),
        ("reading", "How to read this", glossary(report)),
        ("sources", "Where this comes from", details(report)),
    ]


def _or(parts: Sequence[Markup | None], why: str) -> Markup:
    """The parts that there are, or why there are none."""
    shown = [part for part in parts if part]
    return join(shown) if shown else element("p", why, class_="note")
