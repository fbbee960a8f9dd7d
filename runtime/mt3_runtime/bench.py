"""Times a bundle on random features with a forced number of steps, so that every model and machine does equal work."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from itertools import chain
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.bench_compare import compare, compare_lines, measured, read_result
from mt3_runtime.bench_lengths import bench_lengths, to_lines
from mt3_runtime.bench_songs import bench_songs, bench_streams, song_lines
from mt3_runtime.decoding import decode_rows
from mt3_runtime.devices import encode_group
from mt3_runtime.errors import OptionError
from mt3_runtime.launches import is_device, launching
from mt3_runtime.loading import load
from mt3_runtime.machine import describe_machine, may_spin, package_versions, peak_rss_mb
from mt3_runtime.memory import first_ids, first_memory
from mt3_runtime.piece import alone
from mt3_runtime.rows import DecodingRules, Row
from mt3_runtime.stopwatch import Stopwatch
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mt3_runtime.arrays import FloatArray
    from mt3_runtime.backends import Backend
    from mt3_runtime.specs import ModelSpec
    from mt3_runtime.transcriber import Transcriber


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to run: `segments` segments of `steps` tokens, at most `slots` rows at a time, `repeat` times.

    With `lengths` each row takes its own number of steps instead (see `bench_lengths`); with `songs` or `streams` that
    many pieces of so many segments go through side by side (see `bench_songs`). `compare` names an earlier result.
    """

    bundle: Path | None
    device: str
    precision: str
    threads: int | None
    segments: int
    steps: int
    repeat: int
    slots: int | None
    lengths: tuple[int, ...] | None = None
    songs: int | None = None
    streams: int | None = None
    compare: Path | None = None


def bench(options: BenchOptions) -> dict[str, Any]:
    """Measure one bundle; medians over `repeat` passes after one that is not counted.

    Returns:
        `encode_s` (all segments), `decode_ms_per_step` by number of rows, `total_s` (encode plus all steps of all
        rows, scheduled as in a transcription), or `lengths`, `songs` or `streams` in place of these; `load_s`,
        `peak_rss_mb`, and what was run where; with `options.compare` also `compared`, see `bench_compare.compare`.

    Raises:
        OptionError: more steps than the model has positions, figures that exclude each other, or nothing to compare
            with in that file.
    """
    if sum(value is not None for value in (options.lengths, options.songs, options.streams)) > 1:
        raise OptionError("--lengths, --songs and --streams are measured one at a time: give one of them")
    earlier = None if options.compare is None else read_result(options.compare)
    started = perf_counter()
    transcriber = load(
        options.bundle, options.device, precision=options.precision, slots=options.slots, threads=options.threads
    )
    load_s = perf_counter() - started
    features = transcriber.bundle.manifest.features
    shape = (options.segments, features.segment_frames, features.bins)
    try:
        noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        figures = _figures(transcriber, noise, options)
    except MemoryError:
        raise OptionError("so much does not fit into memory at once: give fewer segments, songs or streams") from None
    result = {
        **figures,
        "load_s": load_s,
        "peak_rss_mb": peak_rss_mb(),
        "segments": options.segments,
        "repeat": options.repeat,
        **_circumstances(transcriber),
    }
    if earlier is not None and options.compare is not None:
        result["compared"] = compare(earlier, measured(result), options.compare)
    return result


def _figures(transcriber: Transcriber, noise: FloatArray, options: BenchOptions) -> dict[str, Any]:
    if options.lengths:
        return _lengths(transcriber, noise, options)
    if options.steps > transcriber.backend.length:
        raise OptionError(f"--steps {options.steps} is more than the model's {transcriber.backend.length}: ask fewer")
    if options.songs:
        return bench_songs(transcriber, options.songs, options.segments, options.steps, options.repeat)
    if options.streams:
        return bench_streams(transcriber, options.streams, options.segments, options.steps, options.repeat)
    return _steps(transcriber, noise, options)


def to_text(result: dict[str, Any]) -> str:
    """The figures for a person."""
    head = (
        f"{result['model']} on {result['device']} ({result['provider']}, {result['precision']}, "
        f"{result['threads']} threads, {result['slots']} slots, {result['gpu'] or result['cpu']})\n"
        f"load    {result['load_s']:.2f} s"
    )
    tail = [f"memory  {result['peak_rss_mb']:.0f} MB at the peak"]
    tail += compare_lines(result["compared"]) if "compared" in result else []
    return "\n".join([head, *_figure_lines(result), *tail])


def _figure_lines(result: dict[str, Any]) -> list[str]:
    if "lengths" in result:
        return to_lines(result["lengths"])
    if "songs" in result or "streams" in result:
        return song_lines(result)
    rows = ", ".join(f"{count} rows {ms:.2f}" for count, ms in result["decode_ms_per_step"].items())
    return [
        f"encode  {result['encode_s']:.3f} s for {result['segments']} segments",
        f"decode  {rows} ms a step",
        f"total   {result['total_s']:.3f} s for {result['segments']} segments x {result['steps']} steps",
    ]


def _steps(transcriber: Transcriber, features: FloatArray, options: BenchOptions) -> dict[str, Any]:
    backend, model = transcriber.backend, transcriber.bundle.manifest.model
    rules = DecodingRules(model.start_token, None, options.steps)
    group = encode_group(transcriber.bundle.manifest, backend.device)
    passes = [_one_pass(backend, features, group, rules, model) for _ in range(options.repeat + 1)][1:]
    encoding = [encode for encode, _ in passes]
    if hasattr(backend, "synchronize"):  # it returns before it is done, and decoding waits for the rest
        encoding = [_encode(backend, features, group) for _ in range(options.repeat + 1)][1:]
    states = backend.encode(features[:1])[0][0]  # of one row
    rows = sorted({1, min(options.segments * model.channels, backend.slots)})
    steps = {
        str(n): [_decode(backend, states, n, options.steps, model) for _ in range(options.repeat + 1)][1:] for n in rows
    }
    return {
        "steps": options.steps,
        "encode_s": median(encoding),
        "decode_ms_per_step": {name: median(times) for name, times in steps.items()},
        "total_s": median(total for _, total in passes),
    }


def _lengths(transcriber: Transcriber, features: FloatArray, options: BenchOptions) -> dict[str, Any]:
    backend, model = transcriber.backend, transcriber.bundle.manifest.model
    states = [alone(own) for one in features for own in backend.encode(one[None])[0]]  # of each row
    _settle(backend)
    return {"lengths": bench_lengths(backend, states, model, options.lengths or (), options.repeat)}


def _circumstances(transcriber: Transcriber) -> dict[str, Any]:
    """What was run where."""
    backend = transcriber.backend
    return {
        "slots": backend.slots,
        "model": transcriber.bundle.manifest.model.name,
        "bundle_sha256": transcriber.bundle.sha256,
        "device": backend.device,
        "provider": backend.provider,
        "precision": backend.precision,
        "threads": backend.threads,
        "spinning": may_spin(backend.threads) if backend.device == "cpu" else None,
        "device_reason": transcriber.device_reason,
        "notices": list(transcriber.notices),
        "gpu": getattr(backend, "gpu_name", None),
        "cpu": describe_machine().cpu_name,
        "command": shlex.join(["mt3-run", *sys.argv[1:]]),
        "versions": {"mt3-runtime": __version__, **{k: v for k, v in package_versions().items() if v}},
    }


def _one_pass(
    backend: Backend, features: FloatArray, group: int, rules: DecodingRules, model: ModelSpec
) -> tuple[float, float]:
    """Encode and decode everything: seconds of encoding, and of all. No segment waits for another one here."""
    clock, memory = Stopwatch(), first_ids(model)

    def rows() -> Iterator[Row[int]]:
        for first in range(0, len(features), group):
            with clock.stage("encode"):
                states = backend.encode(features[first : first + group])  # [segments, channels, frames, d_model]
            for own in chain.from_iterable(states):
                yield Row(first, alone(own), memory=memory)

    for _ in clock.each("decode", decode_rows(backend, rows(), rules)):
        pass
    return clock.seconds["encode"], sum(clock.seconds.values())


def _encode(backend: Backend, features: FloatArray, group: int) -> float:
    """Seconds until everything is encoded."""
    _settle(backend)
    started = perf_counter()
    for first in range(0, len(features), group):
        backend.encode(features[first : first + group])
    _settle(backend)
    return perf_counter() - started


def _settle(backend: Any) -> None:
    """Wait for what a device was asked for, if it is one."""
    getattr(backend, "synchronize", lambda: None)()


def _decode(backend: Backend, states: Any, rows: int, steps: int, model: ModelSpec) -> float:
    """Milliseconds of one step over `rows` rows with the same states, over `steps` steps from the start."""
    device = launching(backend)
    device.admit(0, [states] * rows, first_memory(model, rows))
    device.seed(0, np.full(rows, model.start_token, np.int32))
    _settle(backend)
    started = perf_counter()
    under_way = 0
    for first in range(0, steps, device.chunk):
        device.launch(np.full(rows, first, np.int32), min(device.chunk, steps - first))
        under_way += 1
        if under_way > is_device(backend):
            device.collect()
            under_way -= 1
    for _ in range(under_way):
        device.collect()
    return (perf_counter() - started) / steps * 1e3
