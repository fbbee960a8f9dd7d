"""Rounds of measurements, machine and graphs in turn: one that slows down slows both."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from statistics import median
from time import sleep
from typing import TYPE_CHECKING, Any

from roofline_parts.memory import Memory, buffer_bytes, largest_cache
from roofline_parts.products import DYNAMIC, MATMUL, NBITS, Products, ProductSizes
from roofline_parts.roofs import Speeds, demands, roofs
from roofline_parts.watched import watching
from roofline_parts.work import SETTLE, Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.bundle import Bundle

BEYOND = 4  # times the largest cache: what is smaller may not come from memory
Ways = dict[str, dict[str, float]]  # of each speed what each way of measuring gave


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure; `seconds` of a part in a round."""

    rows: tuple[int, ...]
    position: int
    precision: str
    threads: int
    rounds: int
    seconds: float = 0.3
    buffer: int | None = None
    products: ProductSizes = field(default_factory=ProductSizes)


def measure(bundle: Bundle, plan: Plan) -> dict[str, Any]:
    """Speeds, and every graph against them."""
    options = {"threads": plan.threads, "precision": plan.precision}
    found = demands(bundle, plan.rows, plan.position, plan.seconds, **options)
    cache = largest_cache()
    size = buffer_bytes(cache) if plan.buffer is None else plan.buffer
    memory, products = Memory(plan.threads, size), Products(plan.threads, plan.products)
    with watching() as watch:
        work = Work(bundle, watch, plan.rows, plan.position, **options)
    ways, timings = [], []
    for number in range(plan.rounds):
        print(f"round {number + 1} of {plan.rounds} ...", file=sys.stderr, flush=True)
        ways.append(_ways(memory, products, cache))
        timings.append({key: time for part in work.parts for key, time in work.measure(part, plan.seconds).items()})
    memory.close()
    speeds = [_speeds(found_ways) for found_ways in ways]
    return {
        "precision": work.backend.precision,
        "threads": work.backend.threads,
        "position": plan.position,
        "rounds": plan.rounds,
        "cache_bytes": cache,
        "buffer_bytes": size,
        "speeds": {name: median(getattr(speed, name) for speed in speeds) for name in Speeds.__slots__},
        "ways": _middle(ways),
        "graphs": roofs(found, speeds, timings),
    }


def _ways(memory: Memory, products: Products, cache: int) -> Ways:
    """Everything once. Threads of the last part still wait for work, spinning: leave them the time to give up."""
    sleep(SETTLE)
    reads, copies = memory.reads(), memory.copies()
    peaks = products.peaks()
    return {
        "read": reads | products.reads(BEYOND * cache),
        "copy": copies,
        "fp32": {MATMUL: peaks[MATMUL]},
        "int8": {how: rate for how, rate in peaks.items() if how.startswith((DYNAMIC, NBITS))},
    }


def _speeds(ways: Ways) -> Speeds:
    """The best way of each."""
    return Speeds(**{name: max(rates.values()) for name, rates in ways.items()})


def _middle(rounds: Sequence[Ways]) -> Ways:
    return {
        name: {how: median(each[name][how] for each in rounds) for how in rates} for name, rates in rounds[0].items()
    }
