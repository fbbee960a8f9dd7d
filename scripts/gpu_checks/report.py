"""What was run where, and the results as a table for a person."""

from __future__ import annotations

import datetime as dt
import shlex
import subprocess
import sys
from importlib import metadata
from typing import Any

from mt3_runtime.machine import describe_machine
from mt3_runtime.version import __version__

PACKAGES = (
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "tensorrt_rtx_cu13_bindings",
    "cuda-bindings",
    "torch",
    "numpy",
)
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"


def circumstances(bundle: str, sha256: str) -> dict[str, Any]:
    """Command, versions, GPU and driver."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["scripts/gpu_check", *sys.argv[1:]]),
        "bundle": bundle,
        "bundle_sha256": sha256,
        "versions": {"mt3-runtime": __version__, "python": sys.version.split()[0], **installed()},
        "cpu": describe_machine().cpu_name,
        "gpus": gpus(),
    }


def installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    names = QUERY.split(",")
    return [dict(zip(names, map(str.strip, line.split(",")), strict=False)) for line in run.stdout.splitlines()]


def to_text(document: dict[str, Any]) -> str:
    """All results, a line for each check and a table for each speed."""
    gpu = ", ".join(f"{one['name']} (driver {one['driver_version']})" for one in document["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [document["command"], gpu, versions, ""]
    for result in document["results"]:
        lines.append(line_of(result))
        if "ms_per_step" in result:
            lines += tables(result["ms_per_step"])
    failed = sum(result["status"] not in {"passed", "skipped"} for result in document["results"])
    skipped = sum(result["status"] == "skipped" for result in document["results"])
    lines += ["", f"{len(document['results'])} checks, {failed} failed, {skipped} could not run here"]
    return "\n".join(lines)


def line_of(result: dict[str, Any]) -> str:
    head = f"{result['status']:8}{result['target']:20}{result['check']:12}"
    if "error" in result:
        return head + str(result["error"])
    hidden = {"status", "target", "check", "passed", "ms_per_step", "seconds_taken"}
    return head + ", ".join(f"{name} {short(value)}" for name, value in result.items() if name not in hidden)


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{name}:{short(inner)}" for name, inner in value.items())
    return str(value)


def tables(modes: dict[str, Any]) -> list[str]:
    """Lines of milliseconds: a column for each number of rows."""
    lines: list[str] = []
    for mode, figures in modes.items():
        by_length = figures if isinstance(next(iter(figures.values())), dict) else {"": figures}
        for length, by_rows in by_length.items():
            columns = "".join(f"{time:9.3f}" for time in by_rows.values())
            if not lines:
                lines.append(f"    {'ms a step':16}{'cache':>6}" + "".join(f"{rows:>9}" for rows in by_rows) + "  rows")
            lines.append(f"    {mode:16}{length:>6}{columns}")
    return lines
