"""Reads ONNX Runtime's profiles: which nodes ran, on what shapes, for how long."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mt3_runtime.errors import DependencyError
from roofline_parts.kinds import CONTROL, kind_of

if TYPE_CHECKING:
    from pathlib import Path

Shape = tuple[int, ...]
KERNEL = "_kernel_time"


@dataclass(frozen=True, slots=True)
class Node:
    """One node of one run; `ms` without those inside it, which are nodes of the run too.

    Constants that were packed when the session was made are missing from its inputs.
    """

    name: str
    operator: str
    ms: float
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class ProfiledRun:
    """One run of a graph; `ms` of all of it."""

    ms: float
    nodes: tuple[Node, ...]


def read_profile(path: Path) -> list[ProfiledRun]:
    """Every run in a profile, in order.

    Raises:
        DependencyError: no runs are in it, or not as this script knows them.
    """
    try:
        events = _listed(json.loads(path.read_text("utf-8")))
        runs = sorted((event for event in events if event["name"] == "model_run"), key=_start)
        # a loop before what is inside it
        nodes = sorted(
            (event for event in events if event["name"].endswith(KERNEL)),
            key=lambda event: (_start(event), kind_of(event["args"]["op_name"]) != CONTROL, -event["dur"]),
        )
        found = _runs(runs, nodes)
    except (ValueError, KeyError, TypeError) as error:
        raise DependencyError(
            f"ONNX Runtime's profile is not as expected ({error!r:.80}): use the version that pyproject.toml names"
        ) from None
    return found


def _listed(events: Any) -> list[dict[str, Any]]:
    if not isinstance(events, list):
        raise TypeError("no list of events")
    return events


def _start(event: dict[str, Any]) -> int:
    return int(event["ts"])


def _runs(runs: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> list[ProfiledRun]:
    """Each node to the last run that began before it: runs of a session follow each other."""
    starts = [_start(run) for run in runs]
    belonging: list[list[Node]] = [[] for _ in runs]
    own = _own_times(nodes)
    for node, duration in zip(nodes, own, strict=True):
        at = bisect_right(starts, _start(node)) - 1
        if at < 0:
            raise ValueError(f"{node['name']} belongs to no run")
        belonging[at].append(_node(node, duration))
    return [ProfiledRun(run["dur"] / 1e3, tuple(own)) for run, own in zip(runs, belonging, strict=True)]


def _own_times(nodes: list[dict[str, Any]]) -> list[int]:
    """Microseconds of every node without those inside it, for nodes in the order in which they began."""
    own = [node["dur"] for node in nodes]
    around: list[int] = []  # the loops that the present node is in, by index, the innermost last
    for index, node in enumerate(nodes):
        while around and _start(node) >= _start(nodes[around[-1]]) + nodes[around[-1]]["dur"]:
            around.pop()
        if around:
            own[around[-1]] -= node["dur"]
        if kind_of(node["args"]["op_name"]) == CONTROL:
            around.append(index)
    return own


def _node(event: dict[str, Any], duration: int) -> Node:
    facts = event["args"]
    inputs, outputs = (
        tuple(tuple(shape) for typed in facts[key] for shape in typed.values())
        for key in ("input_type_shape", "output_type_shape")
    )
    return Node(event["name"].removesuffix(KERNEL), facts["op_name"], duration / 1e3, inputs, outputs)
