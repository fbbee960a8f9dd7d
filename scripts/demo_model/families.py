"""The instruments of the synthetic music: what tells one program from another, and how much one program varies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.random import Generator

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Timbre:
    """An additive voice, as one clip hears it.

    `slope`: partial k starts at k^-slope; `decay`: nepers per second, times k^`damping`; `attack` and `release` in
    seconds; `even`: level of the even partials; `pluck`: where along its length a string is plucked, 0 for not at
    all; `stretch`: partial k sounds at k sqrt(1 + stretch k^2); `formant`: Hz of a resonance, 0 for none; `spread`:
    cents between two detuned copies, 0 for one copy; `vibrato`: depth as a fraction of the frequency, `rate` in Hz;
    `noise`: level of a burst at the onset; `stops`: level of each partial, replacing the slope where not empty.
    """

    slope: float
    decay: float
    damping: float
    attack: float
    release: float
    even: float
    pluck: float
    stretch: float
    formant: float
    spread: float
    vibrato: float
    rate: float
    noise: float
    stops: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """One program and the range of its timbres; fields as in `Timbre`, drawn anew for every clip.

    `program` is General MIDI, counted from 0; `low` and `high` are MIDI pitches; `chords`: how often the voice plays
    chords instead of a line.
    """

    name: str
    program: int
    low: int
    high: int
    chords: float
    slope: Range
    attack: Range
    decay: Range = (0.0, 0.0)
    damping: Range = (0.5, 0.7)
    release: Range = (0.07, 0.14)
    even: Range = (1.0, 1.0)
    pluck: Range = (0.0, 0.0)
    stretch: Range = (0.0, 0.0)
    formant: Range = (0.0, 0.0)
    spread: Range = (0.0, 0.0)
    vibrato: Range = (0.0, 0.0)
    noise: Range = (0.0, 0.0)
    stops: int = 0

    def draw(self, rng: Generator) -> Timbre:
        """One timbre of the family."""
        names = (
            "slope", "decay", "damping", "attack", "release", "even", "pluck", "stretch", "formant", "spread",
            "vibrato", "noise",
        )  # fmt: skip
        values = {name: float(rng.uniform(*getattr(self, name))) for name in names}
        stops: tuple[float, ...] = ()
        if self.stops:
            stops = (1.0, *rng.uniform(0.0, 1.0, self.stops - 1).tolist())
        return Timbre(**values, rate=float(rng.uniform(4.8, 6.2)), stops=stops)


FAMILIES = (
    Family(
        "piano", 0, 40, 88, chords=0.5, slope=(1.2, 1.6), attack=(0.003, 0.006), decay=(1.0, 2.2),
        stretch=(1e-4, 5e-4), noise=(0.0, 0.04), release=(0.08, 0.14),
    ),
    Family("organ", 16, 40, 84, chords=0.5, slope=(1.0, 1.0), attack=(0.008, 0.015), stops=8),
    Family(
        "guitar", 24, 40, 79, chords=0.4, slope=(0.9, 1.2), attack=(0.002, 0.004), decay=(2.0, 3.2),
        damping=(0.6, 0.8), pluck=(0.12, 0.25), noise=(0.0, 0.02),
    ),
    Family("bass", 33, 33, 55, chords=0.0, slope=(1.0, 1.4), attack=(0.004, 0.008), decay=(0.8, 1.6)),
    Family(
        "strings", 48, 45, 88, chords=0.4, slope=(1.0, 1.3), attack=(0.03, 0.06), spread=(0.0, 8.0),
        vibrato=(0.001, 0.003), release=(0.09, 0.16),
    ),
    Family("brass", 61, 43, 79, chords=0.2, slope=(0.9, 1.2), attack=(0.015, 0.03), formant=(900.0, 1500.0)),
    Family(
        "reed", 71, 50, 86, chords=0.0, slope=(0.9, 1.2), attack=(0.012, 0.025), even=(0.03, 0.15),
        vibrato=(0.0, 0.001),
    ),
    Family("lead", 81, 52, 88, chords=0.0, slope=(0.6, 0.8), attack=(0.002, 0.005), spread=(14.0, 24.0)),
)  # fmt: skip
PROGRAMS = tuple(family.program for family in FAMILIES)
BY_PROGRAM = {family.program: family for family in FAMILIES}
