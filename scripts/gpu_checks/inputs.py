"""What is fed to the models: the demo clip where notes count, noise where only time does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import soundfile

from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import demo_clip_path
from mt3_runtime.features import feature_extractor
from mt3_runtime.memory import first_memory

if TYPE_CHECKING:
    from mt3_runtime.arrays import FloatArray, IntArray
    from mt3_runtime.backends import Backend
    from mt3_runtime.bundle import Bundle


def clip(seconds: float) -> tuple[FloatArray, int]:
    """The demo clip, repeated until it is long enough, and its rate."""
    samples, rate = soundfile.read(demo_clip_path() / "clip.flac", dtype="float32")
    wanted = int(seconds * rate)
    return np.tile(samples, -(-wanted // len(samples)))[:wanted], rate


def clip_features(bundle: Bundle, segments: int) -> FloatArray:
    """Features of the clip, repeated until it is long enough [segments, frames, bins]."""
    spec = bundle.manifest.features
    samples, rate = clip(segments * spec.segment_samples / spec.sample_rate)
    if rate != spec.sample_rate:
        raise ValueError(f"the clip has {rate} Hz, the model {spec.sample_rate}: use another --bundle")
    whole = np.zeros((segments, spec.segment_samples), np.float32)
    whole.reshape(-1)[: len(samples)] = samples[: whole.size]
    return feature_extractor(spec)(whole, [spec.segment_frames] * segments)


def noise_features(bundle: Bundle, segments: int) -> FloatArray:
    spec = bundle.manifest.features
    shape = (segments, spec.segment_frames, spec.bins)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def admit_all(backend: Backend, bundle: Bundle, features: FloatArray) -> None:
    """Give every channel of every segment a slot, from the first on."""
    states = [state for one in features for state in backend.encode(one[None])[0]]
    backend.admit(0, states, first_memory(bundle.manifest.model, len(states)))


def cpu_tokens(
    bundle: Bundle, features: FloatArray, steps: int, threads: int | None = None
) -> tuple[IntArray, FloatArray]:
    """What the CPU backend decodes in fp32, past every end token: tokens and log-probabilities [steps, rows]."""
    model = bundle.manifest.model
    rows = len(features) * model.channels
    backend = OrtBackend(bundle, slots=rows, length=min(steps, model.max_length), threads=threads)
    admit_all(backend, bundle, features)
    return forced(backend, np.zeros((steps, rows), np.int32), model.start_token, own=True)


def forced(backend: Backend, tokens: IntArray, start: int, *, own: bool = False) -> tuple[IntArray, FloatArray]:
    """Step all rows through `tokens` [steps, rows], or through their own, from the start token on."""
    steps, rows = tokens.shape
    reads, found = np.full(rows, start, np.int32), []
    for position in range(steps):
        chosen, log_probs = backend.step(reads, np.full(rows, position, np.int32))
        found.append((chosen.copy(), log_probs.copy()))
        reads = found[-1][0] if own else tokens[position]
    chosen_all, log_probs_all = zip(*found, strict=True)
    return np.stack(chosen_all), np.stack(log_probs_all)
