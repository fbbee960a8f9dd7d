"""Audio for transcribers: whose segments replay scripts, so that every note is known, and music for real networks."""

from __future__ import annotations

import numpy as np
import soundfile

from mt3_runtime.backends.scripted import ScriptedBackend
from mt3_runtime.transcriber import Transcriber

RATE = 16_000
SEGMENT = 32_768  # samples of the tiny MT3 model
LIMIT = 96  # its max_length
STEP = 1 / 1024  # between the levels of two scripts


class Listener(ScriptedBackend):
    """Encodes a segment to the number that its level says; channel c of it is row number * channels + c."""

    def encode(self, features):
        numbers = np.rint(features[:, 0, 0] / STEP)
        self._encoded += len(features)
        rows = numbers[:, None] * self._channels + np.arange(self._channels)
        return rows.astype(np.float32)[:, :, None, None]


def listener(bundle, scripts, *, slots=3, retries=None, **options):
    """A transcriber of `scripts` by row; features are the first sample of a segment."""
    model = bundle.manifest.model
    backend = Listener(scripts, slots=slots, retries=retries, length=model.max_length, channels=model.channels)
    busy = Transcriber(bundle, backend, name="scripts", **options)
    busy.extractor = lambda samples, frames: samples[:, :1, None]
    return busy


def levels(bundle, numbers, cut=500):
    """Samples of segments with these numbers; the last one is a little shorter."""
    size = bundle.manifest.features.segment_samples
    return np.repeat(np.array(numbers, np.float32) * np.float32(STEP), size)[: len(numbers) * size - cut]


def write(path, samples, subtype="FLOAT"):
    soundfile.write(path, samples, RATE, subtype=subtype)
    return path


def silence(segments):
    return np.zeros(segments * SEGMENT - 500, np.float32)


def scripted(bundle, *scripts, slots=3, **options):
    backend = ScriptedBackend(dict(enumerate(scripts)), slots=slots, length=LIMIT, **options)
    return Transcriber(bundle, backend, name="scripts")


def chords(seconds, seed, rate=RATE):
    """Decaying tones over some noise."""
    rng, time_ = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    audio = rng.normal(0, 0.01, len(time_))
    for onset, key in zip(rng.uniform(0, seconds, 12), rng.integers(40, 90, 12), strict=True):
        since = np.maximum(time_ - onset, 0)
        audio += 0.2 * np.exp(-2 * since) * np.sin(2 * np.pi * 440 * 2 ** ((key - 69) / 12) * since)
    return audio.astype(np.float32)
