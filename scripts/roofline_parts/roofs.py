"""The floor of every graph, its time, and how far apart they are."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from roofline_parts.counts import GROWING, Traffic, kernels, operations, traffic
from roofline_parts.kinds import KINDS, OTHER, kind_of
from roofline_parts.profiles import read_profile
from roofline_parts.watched import watching
from roofline_parts.work import WARM, Work

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mt3_runtime.bundle import Bundle
    from roofline_parts.profiles import ProfiledRun
    from roofline_parts.watched import Session
    from roofline_parts.work import Key, Timing

BETWEEN = "between nodes"


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of the machine in one round: bytes and operations per second."""

    read: float
    copy: float
    fp32: float
    int8: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What one run of a graph has to do, and what a profiled run of it spent its time on.

    `nodes` and `profile_ms` go by kind of operator; `unnamed` are the operators that have none.
    """

    traffic: Traffic
    operations: Counter[str]
    nodes: Counter[str]
    profile_ms: dict[str, float]
    unnamed: tuple[str, ...]


def floor_ms(demand: Demand, speeds: Speeds) -> dict[str, float]:
    """Milliseconds that memory and that arithmetic take at the least."""
    moved, done = demand.traffic, demand.operations
    return {
        "memory": 1e3 * ((moved.weights + moved.read) / speeds.read + moved.written / speeds.copy),
        "arithmetic": 1e3 * (done["fp32"] / speeds.fp32 + done["int8"] / speeds.int8),
    }


def demands(bundle: Bundle, rows: Sequence[int], position: int, seconds: float, **options: Any) -> dict[Key, Demand]:
    """Run every part with a profile of every node, and count."""
    found: dict[Key, Demand] = {}
    order = [spec.name for spec in bundle.manifest.contracts]
    with tempfile.TemporaryDirectory(prefix="roofline-") as folder:
        with watching(Path(folder)) as watch:
            work = Work(bundle, watch, rows, position, **options)
        for part in work.parts:
            work.measure(part, seconds)
        for graph, session in work.sessions:
            found |= _demands(bundle, graph, session, position)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def _demands(bundle: Bundle, graph: str, session: Session, position: int) -> dict[Key, Demand]:
    """Of one graph, by the number of its rows or segments."""
    model, memory = session.model(), bundle.manifest.model.memory
    before = bundle.manifest.model.prefix_length + position
    profile = read_profile(Path(session.end_profiling()))
    by_count: dict[int, list[ProfiledRun]] = defaultdict(list)
    for run, profiled in zip(session.runs, profile, strict=True):
        by_count[run.count].append(profiled)
    by_count.pop(0, None)
    found: dict[Key, Demand] = {}
    for count, runs in by_count.items():
        axes = {"rows": count, "segments": count, GROWING: before, "written": memory.length if memory else 0}
        nodes = runs[-1].nodes
        found[graph, count] = Demand(
            traffic(session, model, axes),
            operations(nodes, kernels(model), before + 1),
            Counter(kind_of(node.operator) for node in nodes),
            _profile_ms(runs[WARM:]),
            tuple(sorted({node.operator for node in nodes if kind_of(node.operator) == OTHER})),
        )
    return found


def _profile_ms(runs: Sequence[ProfiledRun]) -> dict[str, float]:
    """Medians over runs of the time in nodes of each kind, and of the rest."""
    spent: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        by_kind: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        for node in run.nodes:
            by_kind[kind_of(node.operator)] += node.ms
        for kind in KINDS:
            spent[kind].append(by_kind[kind])
        spent[BETWEEN].append(run.ms - sum(by_kind.values()))
    return {kind: median(times) for kind, times in spent.items() if any(times)}


def roofs(
    found: Mapping[Key, Demand], speeds: Sequence[Speeds], timings: Sequence[Mapping[Key, Timing]]
) -> list[dict[str, Any]]:
    """One entry for each graph and number of rows: medians over rounds, each ratio of one and the same round."""
    entries = []
    for (graph, count), demand in found.items():
        times = [timing[graph, count] for timing in timings]
        measured = [time.session + time.outside for time in times]
        floors = [floor_ms(demand, speed) for speed in speeds]
        middle = {bound: median(floor[bound] for floor in floors) for bound in floors[0]}
        ratios = [ms / max(floor.values()) for ms, floor in zip(measured, floors, strict=True)]
        entries.append(
            {
                "graph": graph,
                "count": count,
                "weight_bytes": demand.traffic.weights,
                "read_bytes": demand.traffic.read,
                "written_bytes": demand.traffic.written,
                "operations": dict(demand.operations),
                "floor_ms": max(middle.values()),
                "bound_by": max(middle, key=lambda bound: middle[bound]),
                "floors_ms": middle,
                "measured_ms": median(measured),
                "python_ms": median(time.outside for time in times),
                "ratio": median(ratios),
                "nodes": dict(demand.nodes),
                "profile_ms": demand.profile_ms,
                "unnamed_operators": list(demand.unnamed),
            }
        )
    return entries
