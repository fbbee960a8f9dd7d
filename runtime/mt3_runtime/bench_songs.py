"""Times whole pieces of audio with a forced number of tokens a segment: songs side by side, and live streams."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from itertools import repeat as repeated
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.rows import DecodingRules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mt3_runtime.arrays import FloatArray
    from mt3_runtime.live import LiveStreams
    from mt3_runtime.transcriber import Transcriber

_CUT = 500  # samples that the last segment is shorter: no segment of padding follows


def bench_songs(transcriber: Transcriber, songs: int, segments: int, steps: int, repeat: int) -> dict[str, Any]:
    """Transcribe one song alone and then `songs` of them together, `repeat` times after a round that is not counted.

    Returns:
        Medians: `one_s`, `all_s`, and `ratio`, how many times more songs a second are done together.
    """
    audio = _noise(transcriber, segments)[:-_CUT]
    rate = transcriber.bundle.manifest.features.sample_rate
    rounds = []
    with _forced(transcriber, steps):
        for _ in range(repeat + 1):
            seconds = []
            for count in (1, songs):
                started = perf_counter()
                for _, result in transcriber.transcribe_many(repeated((audio, rate), count)):
                    if isinstance(result, Exception):
                        raise result
                seconds.append(perf_counter() - started)
            rounds.append(seconds)
    one, many = zip(*rounds[1:], strict=True)
    ratios = [songs * alone / together for alone, together in zip(one, many, strict=True)]
    return {"steps": steps, "songs": songs, "one_s": median(one), "all_s": median(many), "ratio": median(ratios)}


def bench_streams(transcriber: Transcriber, streams: int, segments: int, steps: int, repeat: int) -> dict[str, Any]:
    """Let `streams` live streams come in at the speed of music, evenly shifted against each other.

    The clock is made of the time that work takes and of the waiting for the next segment, which is skipped: what is
    measured is what would be seen, without sitting through it. All of that `repeat` times, after a pass that is not
    counted. Blocks are at the model's rate: a resampler would hold back the last 20 to 100 ms.

    Returns:
        Milliseconds from the last sample of a segment to its notes, over all passes: `p50_ms`, `p99_ms`, `worst_ms`,
        and how many there were, `counted`; `load`, the share of the time in which there was work.
    """
    passes = [_listen(transcriber, streams, segments, steps) for _ in range(repeat + 1)][1:]
    latencies = np.array([1e3 * seconds for found, _ in passes for seconds in found])
    return {
        "steps": steps,
        "streams": streams,
        "counted": len(latencies),
        "p50_ms": float(np.percentile(latencies, 50)),
        "p99_ms": float(np.percentile(latencies, 99)),
        "worst_ms": float(latencies.max()),
        "load": median(load for _, load in passes),
    }


def _listen(transcriber: Transcriber, streams: int, segments: int, steps: int) -> tuple[list[float], float]:
    """One pass: latencies in seconds, and the load."""
    features = transcriber.bundle.manifest.features
    segment, length = _noise(transcriber, 1), features.segment_samples / features.sample_rate
    # A segment of YourMT3 goes out with the first sample after it.
    first = np.concatenate([segment, segment[:1]]) if features.centred else segment
    arrivals = deque(
        sorted((length * (index + 1 + at / streams), at, index) for at in range(streams) for index in range(segments))
    )
    clock = _Clock(arrivals[0][0])
    with _forced(transcriber, steps), transcriber.live() as live:
        for at in range(streams):
            live.open(at, features.sample_rate)
        latencies = list(_latencies(live, arrivals, (first, segment), clock))
    return latencies, clock.worked / (segments * length)


def song_lines(result: dict[str, Any]) -> list[str]:
    """The figures of either for a person."""
    work = f"{result['segments']} segments x {result['steps']} steps"
    if "streams" in result:
        when = f"{result['p50_ms']:.0f} ms (p50), {result['p99_ms']:.0f} (p99), {result['worst_ms']:.0f} at worst"
        return [
            f"streams {result['streams']} of {work}, busy {result['load']:.0%} of the time",
            f"        notes {when} after the last sample of their segment ({result['counted']} segments)",
        ]
    return [
        f"songs   1 of {work}: {result['one_s']:.3f} s; {result['songs']} side by side: {result['all_s']:.3f} s",
        f"        {result['ratio']:.2f} times the songs a second",
    ]


class _Clock:
    """Time as a listener would see it, in seconds; `worked` is what of it was spent on work."""

    def __init__(self, now: float) -> None:
        self.now, self.worked = now, 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        started = perf_counter()
        yield
        seconds = perf_counter() - started
        self.now += seconds
        self.worked += seconds


def _latencies(
    live: LiveStreams[int],
    arrivals: deque[tuple[float, int, int]],
    blocks: tuple[FloatArray, FloatArray],
    clock: _Clock,
) -> Iterator[float]:
    """Seconds from the arrival of each segment to its notes.

    arrivals: when, in which stream, and as which segment of it, in order of time; blocks: the first one of a stream,
    and every other one.
    """
    arrived: dict[tuple[int, int], float] = {}
    while arrivals or not live.is_idle:
        if arrivals and live.is_idle:
            clock.now = max(clock.now, arrivals[0][0])
        with clock.working():
            while arrivals and arrivals[0][0] <= clock.now:
                due, at, index = arrivals.popleft()
                arrived[at, index] = due
                live.feed(at, blocks[bool(index)])
            done = live.advance()
        for at, segment in done:
            yield clock.now - arrived.pop((at, segment.index))


@contextmanager
def _forced(transcriber: Transcriber, steps: int) -> Iterator[None]:
    """Every row takes so many steps, whatever it says."""
    rules = transcriber.rules
    transcriber.rules = DecodingRules(rules.start_token, None, steps)
    try:
        yield
    finally:
        transcriber.rules = rules


def _noise(transcriber: Transcriber, segments: int) -> FloatArray:
    size = transcriber.bundle.manifest.features.segment_samples
    noise: FloatArray = 0.1 * np.random.default_rng(0).standard_normal(segments * size, dtype=np.float32)
    return noise
