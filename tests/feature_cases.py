"""Signals for the feature tests, made by formulas; also read by tests/oracle, so no import of the package."""

from __future__ import annotations

import numpy as np

RATE = 16_000
SEGMENT = 32_768  # samples
GOLDEN_FRAMES = (0, 1, 37, 128, 200, 240, 250, 255)  # kept of each segment; the last ones reach past its end


def noise(samples: int) -> np.ndarray:
    """Uniform noise in -1..1 from integers alone, so that it is the same everywhere: [samples] float64."""
    state = np.arange(1, samples + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (state >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def chord(samples: int) -> np.ndarray:
    """Three decaying harmonic tones: [samples] float64."""
    seconds = np.arange(samples) / RATE
    total = np.zeros(samples)
    for hertz in (110.0, 220.5, 329.6):
        for partial in range(1, int(7900 / hertz)):
            total += 0.2 / partial * np.sin(2 * np.pi * hertz * partial * seconds + partial)
    return total * np.exp(-seconds)


def golden_segments() -> np.ndarray:
    """Music with a noise floor, noise that fades in, and a clipped sweep: [3, SEGMENT] float32."""
    seconds = np.arange(SEGMENT) / RATE
    sweep = 3 * np.sin(2 * np.pi * (50 + 1800 * seconds) * seconds)
    music = chord(SEGMENT) + 1e-3 * noise(SEGMENT)
    fading = 0.3 * noise(SEGMENT) * (seconds / seconds[-1]) ** 2
    return np.stack([music, fading, np.clip(sweep, -1, 1) + 1e-3 * noise(SEGMENT)]).astype(np.float32)


def signals() -> dict[str, np.ndarray]:
    """One segment of each kind of sound that strains a transform: name -> [SEGMENT] float32."""
    seconds = np.arange(SEGMENT) / RATE
    tone = np.sin(2 * np.pi * 440.0 * seconds)
    cases = {
        "music": chord(SEGMENT) + 1e-4 * noise(SEGMENT),
        "tone": 0.5 * tone,
        "tone of 16 bits": np.round(0.5 * tone * 32767) / 32768,
        "two tones 100 dB apart": 0.5 * tone + 5e-6 * np.sin(2 * np.pi * 3000.0 * seconds),
        "quiet noise": 1e-4 * noise(SEGMENT),
        "very quiet noise": 1e-7 * noise(SEGMENT),
        "clipped": np.clip(3 * tone + 0.1 * noise(SEGMENT), -1, 1),
        "click": (np.arange(SEGMENT) == 10_000).astype(np.float64),
        "loud noise": 0.9 * noise(SEGMENT),
    }
    return {name: samples.astype(np.float32) for name, samples in cases.items()}
