"""What stands between the instruments and the listener: reverberation, tone, level, noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from demo_model.synthesis import RATE, Wave

if TYPE_CHECKING:
    from numpy.random import Generator

_DRY = 0.5  # share of the clips without reverberation


def record(mix: Wave, rng: Generator) -> Wave:
    """The mix as a microphone hears it, at a random level, with a peak below 1.  # [samples]"""
    wave = _filter(mix, _impulse_response(rng), tilt=float(rng.uniform(-2.0, 2.0)))
    peak = float(np.abs(wave).max())
    level = 10.0 ** (rng.uniform(-16.0, -1.0) / 20.0)
    noise = 10.0 ** (rng.uniform(-75.0, -50.0) / 20.0)
    hiss = rng.standard_normal(len(wave), dtype=np.float32)
    scaled = wave * np.float32(level / peak if peak > 0 else 0.0) + np.float32(noise * level) * hiss
    return np.clip(scaled, -1.0, 1.0)


def _impulse_response(rng: Generator) -> Wave:
    if rng.random() < _DRY:
        return np.ones(1, np.float32)
    reverberation = float(rng.uniform(0.15, 0.4))  # seconds to -60 dB
    wet = 10.0 ** (rng.uniform(-20.0, -12.0) / 20.0)
    seconds = np.arange(round(0.8 * reverberation * RATE)) / RATE
    tail = rng.standard_normal(seconds.size) * np.exp(-6.9 * seconds / reverberation)
    tail[: RATE // 200] = 0.0  # nothing is reflected in the first 5 ms
    response = np.asarray(wet * tail / np.sqrt((tail**2).sum()), np.float32)
    response[0] = 1.0
    return response


def _filter(wave: Wave, response: Wave, tilt: float) -> Wave:
    """Convolve with `response` and tilt the spectrum by `tilt` dB per octave around 500 Hz."""
    wanted = len(wave) + len(response)
    size = min(s for s in (2**p * m for p in range(8, 20) for m in (1, 3, 5)) if s >= wanted)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / RATE), 50.0) / 500.0)
    gain = (10.0 ** (tilt * octaves / 20.0)).astype(np.float32)
    spectrum = np.fft.rfft(wave, size) * gain
    if len(response) > 1:
        spectrum *= np.fft.rfft(response, size)
    return np.asarray(np.fft.irfft(spectrum, size)[: len(wave)], np.float32)
