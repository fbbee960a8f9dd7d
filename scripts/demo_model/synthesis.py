"""Notes -> audio: additive voices, each computed as one small matrix product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from numpy.random import Generator

    from demo_model.families import Timbre

Wave = NDArray[np.float32]

RATE = 16_000  # Hz
MAX_PARTIALS = 16
TOP = 7400.0  # Hz; partials above are left out, the features end at 7600 Hz
_BLOCK = 128  # samples; a note of n samples is the product [n / 128, 2 * partials] @ [2 * partials, 128]


def play(pitch: int, seconds: float, velocity: int, timbre: Timbre, rng: Generator) -> Wave:
    """One note, held for `seconds`, with its release after that.  # [samples]"""
    count = round((seconds + timbre.release) * RATE)
    base = 440.0 * 2.0 ** ((pitch - 69) / 12.0)
    hertz, levels, decays = _partials(base, timbre)
    wave = _sum_partials(hertz, levels, decays, rng.uniform(0, 2 * np.pi, len(hertz)), count)
    if timbre.vibrato:
        wave = _wobble(wave, timbre, rng.uniform(0, 2 * np.pi))
    if timbre.noise:
        burst = min(count, RATE // 50)
        fall = np.exp(-np.arange(burst) / (RATE / 250.0))
        wave[:burst] += (timbre.noise * fall * rng.standard_normal(burst)).astype(np.float32)
    return wave * _envelope(count, seconds, timbre) * np.float32((velocity / 127.0) ** 1.3)


def _partials(base: float, timbre: Timbre) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Frequency in Hz, level and decay in nepers per second of every partial; the levels have unit power."""
    k = np.arange(1, MAX_PARTIALS + 1, dtype=np.float64)
    hertz = base * k * np.sqrt(1.0 + timbre.stretch * k * k)
    k, hertz = k[hertz < TOP], hertz[hertz < TOP]
    levels = k**-timbre.slope
    if timbre.stops:
        levels = levels * np.resize(timbre.stops, len(k))
    if timbre.pluck:
        levels = levels * np.abs(np.sin(np.pi * k * timbre.pluck))
    if timbre.formant:
        levels = levels * (0.3 + np.exp(-(((hertz - timbre.formant) / 600.0) ** 2)) * 2.0)
    levels = levels * np.where(k % 2 == 0, timbre.even, 1.0)
    levels = levels / np.sqrt((levels**2).sum())
    decays = timbre.decay * k**timbre.damping
    if timbre.spread:
        ratio = 2.0 ** (timbre.spread / 2400.0)
        hertz = np.concatenate((hertz * ratio, hertz / ratio))
        levels, decays = np.tile(levels / np.sqrt(2.0), 2), np.tile(decays, 2)
    return hertz, levels, decays


def _sum_partials(
    hertz: NDArray[np.float64],
    levels: NDArray[np.float64],
    decays: NDArray[np.float64],
    phases: NDArray[np.float64],
    count: int,
) -> Wave:
    """Sum of decaying sines.

    With t = block + rest, exp(z t) = exp(z block) exp(z rest): the sum over partials is a matrix product.
    """
    z = np.asarray((2j * np.pi * hertz - decays) / RATE, np.complex128)  # per sample
    outer = _powers(z, -(-count // _BLOCK), _BLOCK) * (levels * np.exp(1j * phases))  # [blocks, partials]
    inner = _powers(z, _BLOCK, 1)  # [block, partials]
    left = np.concatenate((outer.real, -outer.imag), axis=1, dtype=np.float32)
    right = np.concatenate((inner.real, inner.imag), axis=1, dtype=np.float32)
    return np.asarray((left @ right.T).reshape(-1)[:count])


def _powers(z: NDArray[np.complex128], count: int, step: int) -> NDArray[np.complex128]:
    """exp(z step n) for n below `count`, by doubling: far fewer exponentials.  # [partials] -> [count, partials]"""
    powers = np.ones((count, len(z)), np.complex128)
    known = 1
    while known < count:
        more = min(known, count - known)
        np.multiply(powers[:more], np.exp(z * (step * known)), out=powers[known : known + more])
        known += more
    return powers


def _wobble(wave: Wave, timbre: Timbre, phase: float) -> Wave:
    """The wave read at a speed that varies by the vibrato's depth."""
    turns = 2 * np.pi * timbre.rate / RATE
    places = np.arange(len(wave), dtype=np.float64)
    bent = places + timbre.vibrato / turns * (np.sin(turns * places + phase) - np.sin(phase))
    return np.asarray(np.interp(bent, places, wave), np.float32)


def _envelope(count: int, seconds: float, timbre: Timbre) -> Wave:
    """Raised-cosine attack, then 1, then an exponential release after `seconds`."""
    envelope = np.ones(count, np.float32)
    rise = min(count, max(2, round(timbre.attack * RATE)))
    envelope[:rise] = 0.5 - 0.5 * np.cos(np.pi * np.arange(rise) / rise)
    held = min(count, round(seconds * RATE))
    envelope[held:] *= np.exp(-6.0 / timbre.release * np.arange(count - held) / RATE).astype(np.float32)
    return envelope


def add(mix: Wave, wave: Wave, onset: float, gain: float = 1.0) -> None:
    """Add `wave` to `mix` from `onset` seconds on, cut at the end of `mix`."""
    start = round(onset * RATE)
    room = mix[start : start + len(wave)]
    room += np.float32(gain) * wave[: len(room)]
