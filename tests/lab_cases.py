"""Made-up but plausible results of the lab, of a model like the demo's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from mt3_export.lab.results import (
    FORMAT,
    VERSION,
    Bisection,
    Clip,
    Combination,
    Estimate,
    F1s,
    Forced,
    FreeRun,
    GraphError,
    LayerError,
    Results,
    Scored,
    Speed,
    Suspect,
)

SCORES = ("onset", "onset_offset", "onset_offset_program", "drums", "leakage")
BASE = {"onset": 0.936, "onset_offset": 0.871, "onset_offset_program": 0.842, "drums": 0.974, "leakage": 0.021}
LAYERS = {
    "encoder": (
        "projection",
        *(f"layers.{i}.{part}" for i in range(4) for part in ("qkv", "output", "feed_forward.gates",
                                                              "feed_forward.output")),
    ),
    "cross_kv": tuple(f"projections.{i}" for i in range(6)),
    "decode_step": (
        *(f"layers.{i}.{part}" for i in range(3) for part in ("qkv", "output", "cross_query", "cross_output",
                                                              "feed_forward.gates", "feed_forward.output")),
        "head",
    ),
}  # fmt: skip
LIMITS = {"fp16": 65504.0, "bf16": 3.3895314e38}
KINDS = ("one-voice", "two-voices", "one-voice-drums", "four-voices-drums", "drums")


def estimate(mean, half=0.01):
    return Estimate(float(mean), float(mean - half), float(mean + half))


def scored(loss, half=0.001, base=None):
    """Scores of what loses this of every score, and the losses."""
    base = BASE if base is None else base
    signs = {name: -1 if name == "leakage" else 1 for name in SCORES}
    scores = {name: estimate(min(1.0, max(0.0, base[name] - signs[name] * loss)), 0.012) for name in SCORES}
    losses = {name: estimate(loss * (0.6 + 0.2 * index), half) for index, name in enumerate(SCORES)}
    return Scored(scores, losses)


def speed(times, step=2.0, latency=180.0):
    return Speed(0.62, 31.5, step, 4 * step, 8, latency, times, 412.0)


def clip_name(index):
    return f"{KINDS[index % len(KINDS)]}/{index // len(KINDS):04}"


def clips_of(rng, count, error, *, reference):
    found = []
    for index in range(count):
        ours = [float(max(0.0, 1 - error * factor * rng.exponential())) for factor in (1, 1.5, 1.7, 0.4)]
        theirs = [float(min(1.0, max(0.0, BASE[name] + rng.normal(0, 0.03)))) for name in SCORES[:4]]
        against = F1s(*theirs, 0.02) if reference else None
        found.append(Clip(clip_name(index), 8.0 + index % 12, 40 + index, F1s(*ours, 0.0), against))
    return tuple(found)


def graph_errors(precision, size):
    return tuple(
        GraphError(graph, size * 40, size, 1 - size**2 / 2, 20 * float(-np.log10(size)) + 18, largest,
                   LIMITS.get(precision), 0)
        for graph, largest in (("encoder", 6120.0), ("cross_kv", 48.0), ("decode_step", 1420.0))
    )  # fmt: skip


def layer_errors(rng, size):
    found = []
    for graph, layers in LAYERS.items():
        grown = size * 0.3
        for layer in layers:
            grown *= float(np.exp(rng.normal(0.06, 0.25)))
            largest = 10 ** (1.2 + 2.2 * (zlib_share(layer)))
            found.append(LayerError(graph, layer, grown, largest, 0))
    return tuple(found)


def zlib_share(text):
    """A number in 0..1 that belongs to a text."""
    return sum(map(ord, text)) % 97 / 97


def free_run(rng, rows, rate):
    lengths = rng.integers(20, 260, rows)
    left = rng.geometric(rate, rows) if rate else lengths
    first = [int(at) if at < length else -1 for at, length in zip(left, lengths, strict=True)]
    names = tuple(f"{clip_name(row // 5)}:{row % 5}" for row in range(rows))
    return FreeRun(names, tuple(first), tuple(map(int, lengths)))


def combination(precision, error, times, size_mb, loss, *, count=40, emulated=False, reference=True, half=0.0008):
    """A combination that is done, with everything that the lab measures."""
    rng = np.random.default_rng(sum(map(ord, precision)))
    agreement = 1 - error / 8
    return Combination(
        precision,
        "cpu",
        emulated,
        "done",
        size_bytes=None if emulated else int(size_mb * 1e6),
        speed=None if emulated else speed(times, 9 / times * 4, 1500 / times),
        graphs=graph_errors(precision, error),
        layers=layer_errors(rng, error),
        forced=Forced(200, 20_000, round(20_000 * agreement), estimate(agreement, error / 30), error**2, error**2 * 9,
                      error, 0),
        free=free_run(rng, 200, error / 12),
        clips=clips_of(rng, count, error, reference=reference),
        against_fp32=scored(error / 2, error / 15, dict.fromkeys(SCORES, 1.0) | {"leakage": 0.0}),
        against_reference=scored(loss, half) if reference else None,
    )  # fmt: skip


def fp32(*, times=21.0, count=40, reference=True):
    made = combination("fp32", 1e-9, times, 203, 0.0, count=count, reference=reference)
    perfect = Scored({**dict.fromkeys(SCORES, Estimate(1.0, 1.0, 1.0)), "leakage": Estimate(0.0, 0.0, 0.0)}, {})
    theirs = Scored(scored(0.0).scores, {}) if reference else None
    return replace(made, graphs=(), layers=(), forced=None, free=None, against_fp32=perfect, against_reference=theirs)


@cache
def example(*, count=40, reference=True):
    """A whole run: fp32, emulated halves, quantised ones, one that failed and one that cannot run."""
    common = {"count": count, "reference": reference}
    combinations = (
        fp32(**common),
        combination("fp16", 6e-4, 0, 0, 0.00002, emulated=True, **common),
        combination("bf16", 5e-3, 0, 0, 0.0004, emulated=True, **common),
        combination("int8", 7.4e-2, 37.8, 62, 0.0026, **common),
        combination("int8-decoder", 2.6e-2, 29.1, 128, 0.0006, **common),
        combination("w8", 2.2e-2, 28.4, 131, 0.0003, **common),
        combination("w4", 2.4e-1, 29.9, 119, 0.0081, half=0.003, **common),
        combination("qdq8", 6.1e-2, 33.0, 64, 0.0021, **common),
        Combination(
            "fp32",
            "tensorrt",
            emulated=False,
            outcome="impossible",
            problem="no NVIDIA GPU was found: run on a machine with one",
        ),
        Combination(
            "fp16",
            "cuda",
            emulated=False,
            outcome="failed",
            problem="CUDA out of memory while loading decode_step: use fewer slots",
        ),
    )
    return Results(
        FORMAT, VERSION, "mt3-demo", "engines/demo", "9f" * 32, "synthesised clips of five kinds", count, 560.0,
        reference, 0.002, "x86-64, 2 cores, AVX-512 VNNI", {"mt3-runtime": "0.8.0", "onnxruntime": "1.31.0"},
        "mt3-export precision engines/demo --audio set/audio --reference-midi set/midi --bisect int8 --output lab",
        combinations, (bisection(),),
    )  # fmt: skip


def bisection():
    names = [(graph, layer) for graph, layers in LAYERS.items() for layer in layers]
    costs = 0.0042 * 0.7 ** np.arange(18)
    picked = [names[(index * 7) % len(names)] for index in range(18)]
    suspects = tuple(
        Suspect(graph, layer, float(cost), float(cost / costs.sum()), 0)
        for (graph, layer), cost in zip(picked, costs, strict=True)
    )
    kept: dict[str, tuple[str, ...]] = {}
    for suspect in suspects[:4]:
        kept[suspect.graph] = (*kept.get(suspect.graph, ()), suspect.layer)
    return Bisection("int8", 0.0138, 0.9812, suspects, kept, 0.0031, 0.9957, 61, "plan.int8.toml")
