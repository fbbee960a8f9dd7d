"""What every figure calls a combination, and the colour that it has in all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.lab.results import REFERENCE

if TYPE_CHECKING:
    from mt3_export.lab.advice import Advice
    from mt3_export.lab.results import Combination, Results

HUES = 8


@dataclass(frozen=True, slots=True)
class Series:
    """A combination with its label and its class of colour; `chosen`: it is the recommended one."""

    combination: Combination
    label: str
    hue: str
    chosen: bool

    @property
    def is_reference(self) -> bool:
        """Whether it is what all others are compared with."""
        return self.combination.name == REFERENCE

    @property
    def done(self) -> bool:
        """Whether it has results."""
        return self.combination.outcome == "done"


def all_series(results: Results, choice: str | None) -> tuple[Series, ...]:
    """Every combination in the order of the results; fp32 on the CPU has the colour of ink."""
    several = len({c.device for c in results.combinations if c.outcome == "done"}) > 1
    found, hue = [], 0
    for combination in results.combinations:
        alone = combination.outcome == "done" and not several
        label = combination.precision if alone else f"{combination.precision} {combination.device}"
        colour = "ref"
        if combination.name != REFERENCE:
            colour, hue = f"h{hue % HUES}", hue + 1
        found.append(Series(combination, label, colour, combination.name == choice))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Report:
    """All that sections are made of."""

    results: Results
    advice: Advice
    series: tuple[Series, ...]

    @property
    def done(self) -> tuple[Series, ...]:
        """Series that have results."""
        return tuple(series for series in self.series if series.done)

    @property
    def others(self) -> tuple[Series, ...]:
        """Series that have results and are not what all are compared with."""
        return tuple(series for series in self.done if not series.is_reference)
