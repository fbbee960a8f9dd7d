"""The roofs as a table for a person, and what was run where."""

from __future__ import annotations

import datetime as dt
import shlex
import sys
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from mt3_runtime.machine import describe_machine, package_versions
from mt3_runtime.version import __version__
from roofline_parts.kinds import KINDS
from roofline_parts.roofs import BETWEEN

if TYPE_CHECKING:
    from mt3_runtime.bundle import Bundle

PYTHON = "python"
MEGA, GIGA = 1e6, 1e9


def circumstances(bundle: Bundle) -> dict[str, Any]:
    """Command, machine, versions and bundle."""
    machine, versions = asdict(describe_machine()), package_versions()
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["scripts/roofline", *sys.argv[1:]]),
        "machine": {name: machine[name] for name in ("system", "cpu_name", "cpu_flags", "usable_cores")},
        "versions": {
            "mt3-runtime": __version__,
            "python": sys.version.split()[0],
            "onnx": metadata.version("onnx"),
            **{name: versions[name] for name in ("numpy", "onnxruntime") if versions[name]},
        },
        "model": bundle.manifest.model.name,
        "bundle_sha256": bundle.sha256,
    }


def to_text(document: dict[str, Any]) -> str:
    """Speeds, floors, and where the time goes."""
    return "\n".join([*_head(document), "", *_floors(document["graphs"]), "", *_shares(document["graphs"])])


def _head(document: dict[str, Any]) -> list[str]:
    machine, speeds, ways = document["machine"], document["speeds"], document["ways"]
    rates = {"read": "GB/s", "copy": "GB/s, read and written together", "fp32": "GFLOP/s", "int8": "Gop/s"}
    what = f"{document['model']} in {document['precision']} on {machine['cpu_name']}, {document['threads']} threads"
    lines = [
        f"{what}, position {document['position']}; medians of {document['rounds']} rounds",
        f"buffers of {document['buffer_bytes'] / MEGA:.0f} MB, largest cache {document['cache_bytes'] / MEGA:.0f} MB",
    ]
    for name, unit in rates.items():
        others = ", ".join(f"{how} {rate / GIGA:.1f}" for how, rate in ways[name].items())
        lines.append(f"  {name:5}{speeds[name] / GIGA:8.1f} {unit}  ({others})")
    return lines


def _floors(graphs: list[dict[str, Any]]) -> list[str]:
    head = (
        f"{'graph':20}{'weights MB':>11}{'read MB':>9}{'write MB':>9}{'GFLOP':>8}{'int8 Gop':>9}"
        f"{'floor ms':>10} {'bound by':11}{'measured':>9}{'ratio':>7}"
    )
    lines = [head]
    for entry in graphs:
        megabytes = [entry[key] / MEGA for key in ("weight_bytes", "read_bytes", "written_bytes")]
        done = [entry["operations"].get(kind, 0) / GIGA for kind in ("fp32", "int8")]
        lines.append(
            f"{name_of(entry):20}{megabytes[0]:11.1f}{megabytes[1]:9.2f}{megabytes[2]:9.2f}{done[0]:8.2f}{done[1]:9.2f}"
            f"{entry['floor_ms']:10.3f} {entry['bound_by']:11}{entry['measured_ms']:9.3f}{entry['ratio']:7.2f}"
        )
    return lines


def _shares(graphs: list[dict[str, Any]]) -> list[str]:
    """Milliseconds by kind as the profile has them, with the number of nodes."""
    used = [kind for kind in KINDS if any(entry["nodes"].get(kind) for entry in graphs)]
    columns = "".join(f"{kind:>17}" for kind in used)
    lines = [
        "where the time of a profiled run goes, ms (nodes); python: around the session, not profiled",
        f"{'graph':20}{columns}{BETWEEN:>15}{PYTHON:>9}",
    ]
    for entry in graphs:
        spent, nodes = entry["profile_ms"], entry["nodes"]
        cells = "".join(f"{f'{spent.get(kind, 0.0):.3f} ({nodes.get(kind, 0)})':>17}" for kind in used)
        lines.append(f"{name_of(entry):20}{cells}{spent.get(BETWEEN, 0.0):15.3f}{entry['python_ms']:9.3f}")
    unnamed = sorted({operator for entry in graphs for operator in entry["unnamed_operators"]})
    if unnamed:
        lines.append(f"other: {', '.join(unnamed)} (give them a kind in scripts/roofline_parts/kinds.py)")
    return lines


def name_of(entry: dict[str, Any]) -> str:
    """The graph, and how many rows or segments."""
    what = "segment" if entry["graph"] == "encoder" else "row"
    return f"{entry['graph']}, {entry['count']} {what}{'s' if entry['count'] > 1 else ''}"
