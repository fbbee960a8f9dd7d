"""How long steps take, by rows, cache length and how they are asked for; a whole clip; many segments; memory."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_checks.inputs import clip, noise_features
from gpu_checks.plan import CHUNK
from mt3_runtime.decoding import decode_rows
from mt3_runtime.devices import encode_group
from mt3_runtime.memory import first_ids, first_memory
from mt3_runtime.rows import DecodingRules, Row
from mt3_runtime.transcriber import Transcriber

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpu_checks.plan import Plan, Target
    from mt3_runtime.backends.device_rows import DeviceRows
    from mt3_runtime.bundle import Bundle

MODES = {"eager": (1, False), "captured": (1, True), f"{CHUNK} steps": (CHUNK, True)}  # chunk, capture


def step_times(target: Target, plan: Plan) -> dict[str, Any]:
    """Milliseconds of one step, by mode, cache length and number of rows."""
    bundle = plan.open()
    table: dict[str, dict[str, dict[str, float]]] = {}
    problems = []
    for mode, (chunk, capture) in MODES.items():
        backend = target.make(plan, slots=max(plan.rows), chunk=chunk, capture=capture)
        state = backend.encode(noise_features(bundle, 1))[0][0]
        told = first_memory(bundle.manifest.model, max(plan.rows))
        backend.admit(0, [state] * max(plan.rows), told)
        room = backend.length
        table[mode] = {
            str(length): {str(rows): time_steps(backend, rows, min(length, room), plan) for rows in plan.rows}
            for length in plan.lengths
        }
        problems += [backend.capture_problem] if backend.capture_problem else []
        backend.close()
    return {"passed": not problems, "ms_per_step": table, "capture_problems": problems}


def time_steps(backend: DeviceRows, rows: int, length: int, plan: Plan) -> float:
    """With the last places of a cache of `length`, where it is most expensive."""
    chunk = backend.chunk
    positions = np.full(rows, max(0, length - chunk - 1), np.int32)
    backend.seed(0, np.zeros(rows, np.int32))

    def run(launches: int) -> None:
        for index in range(launches):
            backend.launch(positions, chunk)
            if index:
                backend.collect()
        backend.collect()

    run(4)  # warms up, captures, replays
    times, launches = [], max(1, plan.steps // chunk)
    for _ in range(plan.repeat):
        started = perf_counter()
        run(launches)
        times.append((perf_counter() - started) / (launches * chunk) * 1e3)
    return median(times)


def clip_latency(target: Target, plan: Plan) -> dict[str, Any]:
    """Seconds from audio in memory to notes, of a clip of 16 s, after one that was not counted."""
    bundle = plan.open()
    channels = bundle.manifest.model.channels
    backend = target.make(plan, slots=8 if channels == 1 else 4 * channels)
    transcriber = Transcriber(bundle, backend, name=plan.bundle)
    samples, rate = clip(plan.clip_seconds)
    times, notes = [], 0
    for _ in range(plan.repeat + 1):
        started = perf_counter()
        notes = len(transcriber.transcribe(samples, rate).notes)
        times.append(perf_counter() - started)
    backend.close()
    seconds = median(times[1:] or times)
    return {"passed": True, "seconds": seconds, "real_time_factor": plan.clip_seconds / seconds, "notes": notes}


def throughput(target: Target, plan: Plan) -> dict[str, Any]:
    """Segments per second with rows of unequal lengths, which wait for slots: encoder and decoder, no audio."""
    bundle = plan.open()
    backend = target.make(plan, slots=max(plan.rows))
    features = noise_features(bundle, min(plan.segments, 32))
    limits = np.random.default_rng(1).integers(*plan.tokens, plan.segments * bundle.manifest.model.channels)
    rules = DecodingRules(bundle.manifest.model.start_token, None, min(plan.tokens[1], backend.length))
    seconds, tokens = 0.0, 0
    for _ in range(2):  # the first one warms up
        started = perf_counter()
        rows = decode_rows(backend, segments(backend, bundle, features, limits.tolist(), plan), rules)
        tokens = sum(len(row.tokens) for row in rows)
        seconds = perf_counter() - started
    backend.close()
    return {
        "passed": tokens == int(np.minimum(limits, rules.max_tokens).sum()),
        "segments": plan.segments,
        "seconds": seconds,
        "segments_per_second": plan.segments / seconds,
        "tokens_per_second": tokens / seconds,
        "slots": backend.slots,
    }


def segments(backend: DeviceRows, bundle: Bundle, features: Any, limits: list[int], plan: Plan) -> Iterator[Row[int]]:
    group, told = encode_group(bundle.manifest, "cuda"), first_ids(bundle.manifest.model)
    for first in range(0, plan.segments, group):
        wanted = [index % len(features) for index in range(first, min(first + group, plan.segments))]
        for channels in backend.encode(features[wanted]):
            for state in channels:
                key = len(limits)
                yield Row(key, state, limit=limits.pop(), memory=told)


def memory(target: Target, plan: Plan) -> dict[str, Any]:
    """Bytes of the device that a backend takes, by its slots, after one step."""
    taken: dict[str, int] = {}
    for slots in plan.rows:
        before = used(target, plan)
        backend = target.make(plan, slots=slots)
        state = backend.encode(noise_features(plan.open(), 1))[0][0]
        backend.admit(0, [state], first_memory(plan.open().manifest.model, 1))
        backend.step(np.zeros(1, np.int32), np.zeros(1, np.int32))
        gpu: Any = backend.gpu
        taken[str(slots)] = (gpu.allocated if target.backend == "fake" else used(target, plan)) - before
        backend.close()
        del backend, state, gpu
    return {"passed": True, "bytes": taken}


def used(target: Target, plan: Plan) -> int:
    """Bytes in use on the GPU, by whomever."""
    if target.backend == "fake":
        return 0
    from mt3_runtime.backends.gpu_memory import CudaGpu

    gpu = CudaGpu(plan.device)
    try:
        return -gpu.free_memory
    finally:
        gpu.close()
