"""Drum hits: tone bursts with a falling pitch and filtered noise, one kit for each clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from demo_model.synthesis import RATE, Wave

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Drum:
    """How one drum sounds, as ranges that a kit is drawn from.

    `tone` in Hz, at its end; `sweep`: how much higher it starts, as a factor; `ring` and `fade`: time constants of
    the tone and of the noise in seconds; `share`: the noise's part of the level; `bright`: how many times the noise
    is differenced, which takes its low end away.
    """

    key: int
    tone: Range
    sweep: Range
    ring: Range
    fade: Range
    share: Range
    bright: int

    def hit(self, rng: Generator) -> Wave:
        """One hit of unit peak.  # [samples]"""
        ring, fade, share = (float(rng.uniform(*pair)) for pair in (self.ring, self.fade, self.share))
        tone, sweep = float(rng.uniform(*self.tone)), float(rng.uniform(*self.sweep))
        seconds = np.arange(round(min(1.2, 5.0 * max(ring, fade)) * RATE)) / RATE
        glide = 0.025  # seconds
        phase = 2 * np.pi * tone * (seconds + (sweep - 1.0) * glide * (1.0 - np.exp(-seconds / glide)))
        noise = rng.standard_normal(seconds.size)
        for _ in range(self.bright):
            noise = np.diff(noise, prepend=0.0)
        body = np.sin(phase) * np.exp(-seconds / ring)
        hiss = noise / np.abs(noise).max() * np.exp(-seconds / fade)
        wave: NDArray[np.float64] = ((1.0 - share) * body + share * hiss) * np.minimum(seconds / 0.001, 1.0)
        return np.asarray(wave / np.abs(wave).max(), np.float32)


KICK, SNARE, CLOSED_HAT, OPEN_HAT, LOW_TOM, HIGH_TOM, CRASH = 36, 38, 42, 46, 45, 50, 49  # General MIDI keys
DRUMS = {
    drum.key: drum
    for drum in (
        Drum(KICK, (45, 60), (2.0, 3.5), (0.03, 0.08), (0.002, 0.005), (0.1, 0.25), 0),
        Drum(SNARE, (170, 220), (1.0, 1.3), (0.03, 0.05), (0.02, 0.06), (0.45, 0.7), 0),
        Drum(CLOSED_HAT, (300, 400), (1.0, 1.0), (0.002, 0.003), (0.01, 0.02), (0.93, 1.0), 2),
        Drum(OPEN_HAT, (300, 400), (1.0, 1.0), (0.002, 0.003), (0.09, 0.16), (0.93, 1.0), 2),
        Drum(LOW_TOM, (95, 115), (1.3, 1.6), (0.08, 0.14), (0.01, 0.02), (0.1, 0.2), 0),
        Drum(HIGH_TOM, (160, 190), (1.3, 1.6), (0.07, 0.12), (0.01, 0.02), (0.1, 0.2), 0),
        Drum(CRASH, (400, 500), (1.0, 1.0), (0.005, 0.01), (0.35, 0.6), (0.95, 1.0), 1),
    )
}
KEYS = tuple(sorted(DRUMS))
