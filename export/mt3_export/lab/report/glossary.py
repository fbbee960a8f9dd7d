"""How to read every figure, and what was not measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mt3_export.lab.report.markup import Markup, element, join

if TYPE_CHECKING:
    from mt3_export.lab.report.series import Report

TERMS = (
    ("Size", "Graphs and weights that this precision reads; what it shares with others counts for each."),
    ("Load", "From a started process to a bundle that can transcribe."),
    ("Segment", "Latency: encoding a segment and the steps of one row, alone, with this audio's median of steps."),
    ("Step", "One decoding step of one row."),
    ("Throughput", "Seconds of audio transcribed in a second, many segments side by side."),
    ("Memory", "Largest resident memory of the process that was timed."),
    (
        "Equal",
        (
            "Teacher forcing: told fp32's own tokens step by step, the share of steps at which it would choose the "
            "same next token. Errors do not add up here; in free decoding they do."
        ),
    ),
    (
        "KL",
        (
            "Kullback-Leibler divergence from fp32's distribution of the next token to this one's, in nats. It shows "
            "what does not change a token yet. None where a device gives back tokens only."
        ),
    ),
    ("Onset F1", "Notes of equal pitch whose onsets are within 50 ms, each paired once; drums with drums."),
    ("Onset + offset", "Also ends within 50 ms, or a fifth of the note's length if that is more; pitched notes only."),
    ("+ program", "Also the same instrument."),
    ("Drums", "Onset F1 of drums alone."),
    ("Leakage", "Share of notes on programs that the other side does not have at all; less is better."),
    ("Loss", "fp32's score less this one's, clip by clip (of leakage the other way round); 1 point is 0.01 of F1."),
    ("95 % interval", "Percentile bootstrap over clips: what the mean could be with other clips like these."),
    ("Relative error", "Norm of the difference from fp32 over fp32's norm, a graph being given fp32's inputs."),
    ("PSNR", "Peak of fp32's output over the root mean square of the difference."),
    (
        "Of the limit",
        (
            "Largest number that a graph's products read or give in fp32, over the largest of the type: beyond 100 % "
            "it overflows. None where scales follow the numbers."
        ),
    ),
    ("Emulated", "Rounded on the CPU where a device would store a half; what a fused kernel does inside is not seen."),
)


def glossary(report: Report) -> Markup:
    """Definitions, then what is missing."""
    terms = element("dl", *(join([element("dt", term), element("dd", words)]) for term, words in TERMS), class_="terms")
    missing = _missing(report)
    if not missing:
        return terms
    items = element("ul", *(element("li", words) for words in missing))
    return join([terms, element("h3", "What was not measured"), items])


def _missing(report: Report) -> list[str]:
    results = report.results
    told = [
        f"{c.name}: {c.problem or 'no reason was given'}"
        for c in results.combinations
        if c.problem or c.outcome != "done"
    ]
    emulated = [s.label for s in report.done if s.combination.emulated]
    untimed = [s.label for s in report.done if not s.combination.emulated and s.combination.speed is None]
    unscored = [s.label for s in report.others if s.combination.against_fp32 is None]
    unforced = [s.label for s in report.others if s.combination.forced is None]
    again = [s.label for s in report.done if s.combination.fallback_rows]
    if emulated:
        told.append(f"Speed, size and memory of {', '.join(emulated)}: emulated here.")
    if untimed:
        told.append(f"Speed of {', '.join(untimed)}.")
    if unscored:
        told.append(f"Notes of {', '.join(unscored)}.")
    if unforced:
        told.append(f"Next tokens of {', '.join(unforced)}.")
    if again:
        told.append(f"What {', '.join(again)} would do with rows that are not finite: decoded again in fp32.")
    if not results.has_reference:
        told.append("Notes against what was really played: there was no reference MIDI.")
    if not results.bisections:
        told.append("Which products cost most: nothing was bisected (--bisect PRECISION does).")
    return told
