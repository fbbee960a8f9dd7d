"""Which products cost a precision its tokens, and what keeping them in fp32 brings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mt3_export.lab import wording
from mt3_export.lab.report.markup import Markup, element, join

if TYPE_CHECKING:
    from mt3_export.lab.report.series import Report
    from mt3_export.lab.results import Bisection, Suspect

MOST = 15


def bisection_parts(report: Report) -> list[Markup]:
    """A figure for each precision that was bisected."""
    return [_figure(bisection) for bisection in report.results.bisections]


def _figure(bisection: Bisection) -> Markup:
    title = f"What costs {bisection.precision} its tokens"
    caption = (
        "Mean KL from fp32 when nothing but this product is in the lower precision, as share of what all cost "
        "together; filled bars are kept in fp32."
    )
    heading = element("figcaption", element("b", title), " ", element("span", caption))
    parts = [heading, _before_after(bisection)]
    if bisection.suspects:
        top = max(suspect.cost for suspect in bisection.suspects) or 1.0
        items = [_suspect(suspect, bisection, top) for suspect in bisection.suspects[:MOST]]
        parts.append(element("ol", *items, class_="suspects"))
        if len(bisection.suspects) > MOST:
            parts.append(element("p", f"and {len(bisection.suspects) - MOST:,} that cost less", class_="note"))
    else:
        parts.append(
            element("p", "No product was singled out: none costs anything that could be measured.", class_="note")
        )
    return element("figure", *parts, _kept(bisection))


def _before_after(bisection: Bisection) -> Markup:
    all_lower = f"all in {bisection.precision}"
    boxes = [
        (all_lower, bisection.agreement_all, bisection.cost_all, ""),
        ("with the plan", bisection.agreement_kept, bisection.cost_kept, "after"),
    ]
    cards = [
        element(
            "div",
            element("dt", name),
            element("dd", wording.percent(agreement)),
            element("dd", f"of tokens equal, KL {wording.significant(cost, 2)} nats", class_="small"),
            class_=kind or None,
        )
        for name, agreement, cost, kind in boxes
    ]
    return element("dl", *cards, class_="before")


def _suspect(suspect: Suspect, bisection: Bisection, top: float) -> Markup:
    kept = suspect.layer in bisection.kept.get(suspect.graph, ())
    width = 100.0 if suspect.non_finite else 100 * max(0.0, suspect.cost) / top
    bar = element("span", element("i", style=f"width:{width:.1f}%"), class_="track")
    value = f"{suspect.non_finite:,} steps not finite" if suspect.non_finite else wording.percent(suspect.share)
    name = element("span", element("small", f"{suspect.graph} "), suspect.layer, class_="what")
    number = element("span", value, class_="value", title=f"KL {wording.significant(suspect.cost)} nats")
    state = "kept" if kept else None
    return element("li", name, bar, number, class_=state)


def _kept(bisection: Bisection) -> Markup:
    count = sum(map(len, bisection.kept.values()))
    runs = f"{wording.counted(bisection.runs, 'run')} of the model"
    if not count:
        return element("p", f"Nothing is kept in fp32; found with {runs}.", class_="note")
    graphs = [
        join([element("dt", graph), element("dd", element("code", ", ".join(layers)))])
        for graph, layers in bisection.kept.items()
        if layers
    ]
    told = f"The plan keeps {wording.counted(count, 'product')} in fp32"
    plan = element("p", f"{told}, found with {runs}: ", element("code", bisection.plan), class_="note")
    listed = element("details", element("summary", "What is kept"), element("dl", *graphs, class_="facts"))
    return join([plan, listed])
