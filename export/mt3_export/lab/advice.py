"""Which precision to use, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mt3_export.lab.results import REFERENCE, Estimate
from mt3_export.lab.wording import allowance, counted, duration, percent, points, points_range, size
from mt3_export.lab.wording import significant as digits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_export.lab.results import Combination, Results, Scored

JUDGED = ("onset", "onset_offset_program", "drums")  # the losses that must be within what is allowed
SCORE_NAMES = {
    "onset": "onset F1",
    "onset_offset": "onset + offset F1",
    "onset_offset_program": "onset + offset + program F1",
    "drums": "drum F1",
    "leakage": "instrument leakage",
}
TIE = 0.05
NO_LOSS = Estimate(0.0, 0.0, 0.0)
RULE = (
    "Of what ran here (emulated precisions have no speed), a precision is admissible if the losses of onset F1, of "
    "onset + offset + program F1 and of drum F1 have 95 % intervals that end at or below the allowed loss; fp32 always "
    "is. The fastest admissible one is recommended; of those within 5 % of it, the one that loses least."
)


@dataclass(frozen=True, slots=True)
class Purpose:
    """What to use for one purpose; `combination` is its name, None where none is singled out."""

    title: str
    combination: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Advice:
    """The recommended combination by name (None if there is none), in one sentence, and what speaks for it."""

    choice: str | None
    sentence: str
    reasons: tuple[str, ...]
    purposes: tuple[Purpose, ...]


def recommend(results: Results) -> Advice:
    """The fastest combination whose losses are certainly within `results.allowed_loss`.

    Candidates are done and not emulated. One is admissible if the upper ends of the 95 % intervals of its losses of
    onset, onset + offset + program and drum F1 are at or below the allowed loss (against reference MIDI if there is
    some, else 1 - F1 against fp32's own notes; a score that no clip has does not count). fp32 on the CPU always is. Of
    these the one with the largest `times_realtime`; of those within 5 % of it the one that loses least onset F1, where
    a gain counts as no loss.
    """
    fp32 = reference_of(results)
    if fp32 is None:
        problem = next((c.problem for c in results.combinations if c.name == REFERENCE), "it was not run")
        sentence = "No recommendation: fp32 on the CPU, which all else is compared with, is not done."
        return Advice(None, sentence, (f"{REFERENCE}: {problem}",), ())
    candidates = [c for c in results.combinations if c.outcome == "done" and not c.emulated]
    admissible = [c for c in candidates if is_admissible(results, c)]
    choice = _fastest(results, admissible) or fp32
    return Advice(
        choice.name,
        _sentence(results, fp32, choice, candidates),
        _reasons(results, fp32, choice, candidates),
        _purposes(results, fp32, admissible, candidates),
    )


def reference_of(results: Results) -> Combination | None:
    """fp32 on the CPU, if it is done."""
    return next((c for c in results.combinations if c.name == REFERENCE and c.outcome == "done"), None)


def side_of(results: Results) -> Literal["against_reference", "against_fp32"]:
    """What losses are judged against."""
    return "against_reference" if results.has_reference else "against_fp32"


def scored(results: Results, combination: Combination) -> Scored | None:
    """A combination's scores against what they are judged by."""
    return combination.against_reference if results.has_reference else combination.against_fp32


def loss_of(results: Results, combination: Combination, score: str = "onset") -> Estimate | None:
    """What a combination loses of a score; None if that is not known."""
    if combination.name == REFERENCE:
        return NO_LOSS
    found = scored(results, combination)
    return found.loss.get(score) if found else None


def is_admissible(results: Results, combination: Combination) -> bool:
    """Whether its losses are certainly within what is allowed."""
    return loss_of(results, combination) is not None and not _excesses(results, combination)


def loss_phrase(loss: Estimate, score: str = "onset") -> str:
    """A loss in words: whether it can be told from chance, and its interval."""
    rest = f"points of {SCORE_NAMES[score]} {points_range(loss)}"
    if loss.low == loss.high == 0:
        return f"loses nothing of {SCORE_NAMES[score]}"
    if loss.high - loss.low >= 1:  # one clip
        return f"loses what so few clips cannot tell ({points(loss.mean)} {rest})"
    if loss.low < 0 < loss.high:
        return f"shows no loss that can be told from chance ({points(loss.mean)} {rest})"
    return f"{'gains' if loss.high < 0 else 'loses'} {points(abs(loss.mean))} {rest}"


def _excesses(results: Results, combination: Combination) -> list[tuple[str, Estimate]]:
    """Losses that may be larger than what is allowed."""
    losses = [(score, loss_of(results, combination, score)) for score in JUDGED]
    return [(score, loss) for score, loss in losses if loss is not None and loss.high > results.allowed_loss]


def _times_realtime(combination: Combination) -> float:
    return combination.speed.times_realtime if combination.speed else 0.0


def _fastest(results: Results, admissible: Sequence[Combination]) -> Combination | None:
    best = max(map(_times_realtime, admissible), default=0.0)
    tied = [c for c in admissible if c.speed and _times_realtime(c) >= (1 - TIE) * best]

    def order(combination: Combination) -> tuple[float, bool, float]:
        loss = loss_of(results, combination) or NO_LOSS
        return max(loss.mean, 0.0), combination.name != REFERENCE, -_times_realtime(combination)

    return min(tied, key=order, default=None)


def _against(results: Results) -> str:
    return "the reference MIDI" if results.has_reference else "fp32's own notes"


def _ratio(combination: Combination, fp32: Combination) -> float | None:
    """How many times as fast as fp32."""
    ours, theirs = _times_realtime(combination), _times_realtime(fp32)
    return ours / theirs if ours and theirs else None


def _sentence(results: Results, fp32: Combination, choice: Combination, candidates: Sequence[Combination]) -> str:
    allowed = allowance(results.allowed_loss)
    ratio, loss = _ratio(choice, fp32), loss_of(results, choice)
    if choice is not fp32 and loss is not None:
        speed = f"{digits(ratio, 2)} times as fast as fp32" if ratio else "timed where fp32 was not"
        cost = f"against {_against(results)} {loss_phrase(loss)}"
        return f"Use {choice.name}: it is {speed}, and {cost}; allowed are {allowed} points."
    if len(candidates) == 1:
        return "Stay with fp32: nothing else was measured that could be recommended."
    tempting = _tempting(results, fp32, candidates)
    if tempting and not any(is_admissible(results, c) for c in candidates if c is not fp32):
        return f"Stay with fp32: {_would(results, tempting[0], fp32)}; allowed are {allowed} points."
    if not any(c.speed for c in candidates):
        return "Stay with fp32: nothing was timed."
    return "Stay with fp32: nothing whose loss is allowed is more than 5 % faster."


def _tempting(results: Results, fp32: Combination, candidates: Sequence[Combination]) -> list[Combination]:
    """Combinations that are faster than fp32 but not admissible, the fastest first."""
    others = [c for c in candidates if not is_admissible(results, c) and (_ratio(c, fp32) or 0.0) > 1 + TIE]
    return sorted(others, key=_times_realtime, reverse=True)


def _would(results: Results, combination: Combination, fp32: Combination) -> str:
    """What a combination that is not admissible would bring and cost."""
    ratio = _ratio(combination, fp32)
    speed = f"would be {digits(ratio, 2)} times as fast" if ratio else "was not timed"
    return f"{combination.name} {speed} and {_too_much(results, combination)}"


def _too_much(results: Results, combination: Combination) -> str:
    """Why a combination is not admissible: the loss that may be the largest."""
    excesses = _excesses(results, combination)
    if not excesses:
        return "is not known to keep its notes, as they were not scored"
    score, loss = max(excesses, key=lambda excess: excess[1].high)
    if loss.low > 0:
        return loss_phrase(loss, score)
    return f"may lose {points(loss.high)} points of {SCORE_NAMES[score]} ({points(loss.mean)} {points_range(loss)})"


def _reasons(
    results: Results, fp32: Combination, choice: Combination, candidates: Sequence[Combination]
) -> tuple[str, ...]:
    """Why not another: what is faster and loses too much, or perhaps does not."""
    reasons = []
    sentence = _sentence(results, fp32, choice, candidates)
    for other in _tempting(results, fp32, candidates):
        if _times_realtime(other) > _times_realtime(choice):
            would, hint = _would(results, other, fp32), _more_clips(results, other)
            reasons += [f"{would}{hint}."] if would not in sentence else [f"{other.name}{hint}."] * bool(hint)
    if choice is not fp32 and choice.size_bytes and fp32.size_bytes:
        reasons.insert(0, f"{choice.name} reads {size(choice.size_bytes)}, fp32 {size(fp32.size_bytes)}.")
    if not results.has_reference and len(candidates) > 1:
        reasons.append(
            "There is no reference MIDI, so every note unlike fp32's counts as lost, also where fp32 was wrong: "
            "--reference-midi would tell."
        )
    return tuple(reasons)


def _more_clips(results: Results, combination: Combination) -> str:
    """A hint where what is allowed lies within the intervals; how many, where the means are allowed."""
    allowed = results.allowed_loss
    excesses = [loss for _, loss in _excesses(results, combination)]
    if not excesses or any(loss.low >= allowed for loss in excesses):
        return ""
    heard = f": {counted(results.clips, 'clip')} cannot tell whether that is within what is allowed, more would"
    if results.clips < 5 or any(loss.mean >= allowed for loss in excesses):
        return heard
    # An interval narrows with the square root of the number of clips.
    needs = [((loss.high - loss.mean) / (allowed - loss.mean)) ** 2 for loss in excesses]
    needed = math.ceil(results.clips * max(needs))
    return heard + (f" (about {int(float(f'{needed:.1e}')):,})" if needed <= 100 * results.clips else "")


def _purposes(
    results: Results, fp32: Combination, admissible: Sequence[Combination], candidates: Sequence[Combination]
) -> tuple[Purpose, ...]:
    fastest = _fastest(results, admissible)
    found = []
    if fastest and fastest.speed:
        speed = digits(fastest.speed.times_realtime)
        text = f"transcribes {speed} seconds of audio a second within the allowed loss"
        found.append(Purpose("Most audio an hour", fastest.name, text))
    return (*found, *_quickest(admissible), *_smallest(results, fp32, admissible, candidates), *_devices(results))


def _quickest(admissible: Sequence[Combination]) -> list[Purpose]:
    timed = [(c.speed.latency_ms, c.name) for c in admissible if c.speed]
    if not timed:
        return []
    latency, name = min(timed)
    return [Purpose("Live, one segment at a time", name, f"a segment is done in {duration(latency / 1e3)}")]


def _smallest(
    results: Results, fp32: Combination, admissible: Sequence[Combination], candidates: Sequence[Combination]
) -> list[Purpose]:
    sized = [(c.size_bytes, c.name) for c in admissible if c.size_bytes]
    if not sized:
        return []
    least, name = min(sized)
    text = f"reads {size(least)}"
    if fp32.size_bytes and name != REFERENCE:
        text += f", {percent(round(least / fp32.size_bytes, 2))} of fp32's {size(fp32.size_bytes)}"
    smaller = [c for c in candidates if c not in admissible and c.size_bytes and c.size_bytes < least]
    for other in sorted(smaller, key=lambda c: c.size_bytes or 0)[:1]:
        text += f"; {other.name} would be {size(other.size_bytes or 0)}, but {_too_much(results, other)}"
    return [Purpose("Smallest", name, text)]


def _devices(results: Results) -> list[Purpose]:
    """What emulated precisions promise for devices that have them."""
    return [
        Purpose("For a GPU (emulated)", c.name, _promise(results, c))
        for c in results.combinations
        if c.outcome == "done" and c.emulated
    ]


def _promise(results: Results, combination: Combination) -> str:
    loss, forced = loss_of(results, combination), combination.forced
    said = [] if loss is None else [loss_phrase(loss)]
    if forced:
        said.append(f"{percent(forced.agreement.mean)} of its tokens are fp32's")
    uses = [graph.largest / graph.limit for graph in combination.graphs if graph.limit]
    if uses:
        said.append(f"the largest activation takes {percent(max(uses))} of the type's range")
    broken = sum(graph.non_finite for graph in combination.graphs) + (forced.non_finite if forced else 0)
    if broken:
        said.append(f"{broken:,} numbers overflowed: keep what overflows in fp32 with a plan (--bisect)")
    if combination.fallback_rows:
        said.append(f"{counted(combination.fallback_rows, 'row')} had to be decoded again in fp32")
    return ", ".join(said) or "nothing was scored"
