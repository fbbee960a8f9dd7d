"""The top of the report: what was measured, what to use, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mt3_export.lab import wording
from mt3_export.lab.advice import RULE, loss_of, reference_of, side_of
from mt3_export.lab.report.markup import Markup, element, join
from mt3_export.lab.results import REFERENCE

if TYPE_CHECKING:
    from mt3_export.lab.report.series import Report
    from mt3_export.lab.results import Combination


def head(report: Report) -> Markup:
    """Title, facts, recommendation and advice for each purpose."""
    results = report.results
    heard = f"{wording.counted(results.clips, 'clip')} ({wording.duration(results.seconds)})"
    reference = "with reference MIDI" if results.has_reference else "without reference MIDI"
    title = element("h1", results.model)
    over = element("p", "Precision report", class_="over")
    line = element("p", f"{heard} from {results.audio}, {reference}. Measured on {results.machine}.", class_="lead")
    made = element("p", element("code", results.command)), element("p", _versions(report))
    folded = element("details", element("summary", "Command and versions"), *made)
    return join([element("header", over, title, line, folded), _verdict(report), _purposes(report)])


def details(report: Report) -> Markup:
    """Where the numbers come from: bundle, machine, versions and command."""
    results = report.results
    done = sum(combination.outcome == "done" for combination in results.combinations)
    facts = [
        ("Command", element("code", results.command)),
        ("Bundle", element("code", results.bundle)),
        ("Its sha256", element("code", results.bundle_sha256)),
        ("Machine", results.machine),
        ("Audio", results.audio),
        ("Combinations", f"{done} of {len(results.combinations)} done"),
        ("Versions", _versions(report)),
    ]
    return element("dl", *(join([element("dt", name), element("dd", what)]) for name, what in facts), class_="facts")


def _versions(report: Report) -> str:
    return ", ".join(f"{name} {version}" for name, version in report.results.versions.items()) or "not recorded"


def _verdict(report: Report) -> Markup:
    advice, results = report.advice, report.results
    chosen = next((series.combination for series in report.series if series.chosen), None)
    name = element("p", chosen.precision if chosen else "none", class_="choice")
    where = [element("p", f"on {chosen.device}", class_="where")] if chosen else []
    sentence = element("p", advice.sentence, class_="sentence")
    reasons = [element("ul", *(element("li", reason) for reason in advice.reasons))] if advice.reasons else []
    allowed = f"Allowed loss here: {wording.allowance(results.allowed_loss)} points of F1 (1 point is 0.01). "
    rule = element("details", element("summary", "The rule"), element("p", allowed, RULE))
    words = element("div", sentence, *reasons, rule, class_="words")
    label = element("p", "Recommended", class_="over")
    figures = _figures(report, chosen) if chosen else []
    left = element("div", label, name, *where, class_="pick")
    return element("section", left, words, *figures, class_="verdict", aria_label="Recommendation")


def _figures(report: Report, chosen: Combination) -> list[Markup]:
    """The few numbers that a decision hangs on."""
    results, fp32 = report.results, reference_of(report.results)
    shown: list[tuple[str, str]] = []
    if chosen.speed:
        shown.append((wording.factor(chosen.speed.times_realtime), "real time"))
        if fp32 and fp32.speed and chosen is not fp32:
            ratio = chosen.speed.times_realtime / fp32.speed.times_realtime
            shown.append((wording.factor(ratio), "as fast as fp32"))
    found = getattr(chosen, side_of(results))
    onset, loss = found.scores.get("onset") if found else None, loss_of(results, chosen)
    if results.has_reference and onset:
        shown.append((wording.f1(onset.mean), f"onset F1, {wording.f1_range(onset)}"))
    if loss and chosen.name != REFERENCE:
        shown.append((wording.points(loss.mean), f"points of onset F1 lost {wording.points_range(loss)}"))
    if chosen.size_bytes:
        shown.append((wording.size(chosen.size_bytes), "on disk"))
    boxes = [element("div", element("dd", value), element("dt", what)) for value, what in shown]
    return [element("dl", *boxes, class_="figures")] if boxes else []


def _purposes(report: Report) -> Markup | None:
    named = {series.combination.name: series for series in report.series}
    cards = []
    for purpose in report.advice.purposes:
        series = named.get(purpose.combination or "")
        swatch = element("i", class_=f"swatch {series.hue}") if series else None
        name = series.label if series else purpose.combination
        heading = element("h3", purpose.title)
        cards.append(element("li", heading, element("p", swatch, name, class_="which"), element("p", purpose.text)))
    return element("ul", *cards, class_="purposes") if cards else None
