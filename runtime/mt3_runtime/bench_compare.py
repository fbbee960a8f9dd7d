"""Puts an earlier result of `mt3-run bench --json` beside a new one, and says what else differs between the two."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SIZE_LIMIT = 16 << 20  # bytes
FIGURES = (
    "load_s", "encode_s", "decode_ms_per_step", "total_s", "peak_rss_mb",
    "one_s", "all_s", "ratio", "p50_ms", "p99_ms", "worst_ms", "load",
)  # fmt: skip
LENGTHS, LENGTH_RUNS, LENGTH_FIGURES = "lengths", ("given", "long_alone", "all_long"), ("admit_s", "decode_s")
CIRCUMSTANCES = (
    "cpu", "gpu", "device", "provider", "precision", "threads", "spinning", "slots", "model", "bundle_sha256",
    "segments", "steps", "repeat", "songs", "streams", "notices",
)  # fmt: skip
FIX = "give one that mt3-run bench --json or scripts/bench_against wrote"
SHOWN = 80  # characters of a value that a table shows


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of a result, by name, and what they were measured on and with."""

    figures: dict[str, float]
    circumstances: dict[str, Any]
    command: str


def read_result(path: Path) -> Measured:
    """An earlier result, or the first of the commands that `scripts/bench_against` timed: medians of its runs.

    Raises:
        OptionError: the file cannot be read, or is no such result.
    """
    try:
        with path.open("rb") as file:
            text = file.read(SIZE_LIMIT + 1)
        _require(len(text) <= SIZE_LIMIT, path, f"is larger than {SIZE_LIMIT} bytes")
        data = json.loads(text, parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise OptionError(f"--compare {str(path)!r:.200} cannot be read ({reason}): {FIX}") from None
    _require(isinstance(data, dict), path, "is not one JSON object")
    runs = data.get("runs")
    if runs is not None:
        runs = next(iter(runs.values()), None) if isinstance(runs, dict) else None
        _require(isinstance(runs, list) and all(isinstance(run, dict) for run in runs), path, "lists no runs")
    results = [measured(run) for run in (runs if isinstance(runs, list) else [data])]
    figures = _middle([result.figures for result in results])
    _require(bool(figures), path, "has no figures of a bench")
    return Measured(figures, results[0].circumstances, results[0].command)


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and infinity are no JSON, and no figures


def _require(condition: bool, path: Path, what: str) -> None:
    if not condition:
        raise OptionError(f"--compare {str(path)!r:.200} {what}: {FIX}")


def measured(result: dict[str, Any]) -> Measured:
    """Sort one result of `bench` into figures and circumstances; what is neither is left out."""
    figures: dict[str, Any] = {name: result.get(name) for name in FIGURES}
    steps = figures.pop("decode_ms_per_step")
    if not isinstance(steps, dict):  # as other programs print it: of all rows
        steps = {str(result.get("rows", result.get("segments"))): steps}
    figures |= {f"decode_ms_per_step, rows {rows}": ms for rows, ms in steps.items()}
    circumstances = {name: result[name] for name in CIRCUMSTANCES if name in result}
    lengths = result.get(LENGTHS)
    if isinstance(lengths, dict):
        circumstances["lengths"] = lengths.get(LENGTHS)
        figures["lengths ratio"] = lengths.get("ratio")
        for run in LENGTH_RUNS:
            part = lengths.get(run)
            figures |= {f"lengths {run} {name}": part.get(name) for name in LENGTH_FIGURES if isinstance(part, dict)}
    versions = result.get("versions")
    if isinstance(versions, dict):
        circumstances |= {f"{name} version": version for name, version in versions.items()}
    kept = {name: float(value) for name, value in figures.items() if _is_figure(value)}
    return Measured(kept, circumstances, str(result.get("command", "unknown")))


def _is_figure(value: object) -> bool:
    """Whether it is a number that another can be divided by."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return value > 0 and math.isfinite(float(value)) and math.isfinite(1 / float(value))
    except OverflowError:
        return False


def _middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the figures that all runs have."""
    shared = [name for name in (runs[0] if runs else ()) if all(name in run for run in runs)]
    return {name: median(run[name] for run in runs) for name in shared}


def compare(old: Measured, new: Measured, file: Path) -> dict[str, Any]:
    """Every figure that both have with new over old, what only one of them has, and all that differs besides."""
    shared = [name for name in new.figures if name in old.figures]
    return {
        "file": str(file),
        "command": old.command,
        "figures": {
            name: {
                "old": old.figures[name],
                "new": new.figures[name],
                "new_over_old": new.figures[name] / old.figures[name],
            }
            for name in shared
        },
        "only_old": [name for name in old.figures if name not in shared],
        "only_new": [name for name in new.figures if name not in shared],
        "differs": {
            name: {"old": old.circumstances.get(name), "new": new.circumstances.get(name)}
            for name in _either(old.circumstances, new.circumstances)
            if old.circumstances.get(name) != new.circumstances.get(name)
        },
    }


def _either(first: dict[str, Any], second: dict[str, Any]) -> Iterable[str]:
    """Keys of both, each once, in order."""
    return dict.fromkeys([*second, *first])


def compare_lines(compared: dict[str, Any]) -> list[str]:
    """The comparison for a person."""
    lines = [
        f"compared with {_shown(compared['file'])} ({_shown(compared['command'])})",
        f"  {'':30}{'old':>12}{'new':>12}{'new/old':>10}",
    ]
    for name, row in compared["figures"].items():
        lines.append(f"  {name:30}{row['old']:12.4g}{row['new']:12.4g}{row['new_over_old']:10.3f}")
    for name in ("old", "new"):
        only = compared[f"only_{name}"]
        lines += [f"  only in the {name} one: {', '.join(map(_shown, only))}"] if only else []
    if not compared["differs"]:
        return [*lines, "  nothing else that is recorded differs"]
    lines.append("  what else differs:")
    lines += [
        f"    {_shown(name)}: {_shown(row['old'])} -> {_shown(row['new'])}" for name, row in compared["differs"].items()
    ]
    return lines


def _shown(value: object) -> str:
    plain = isinstance(value, str) and value.isprintable()
    text = "unknown" if value is None else str(value) if plain else json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
