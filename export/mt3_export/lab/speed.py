"""How fast a bundle is: by `mt3-run bench` in processes of its own, which nothing else has warmed or filled."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from statistics import median
from typing import TYPE_CHECKING, Any

from mt3_export.lab.results import Speed
from mt3_runtime.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mt3_runtime.specs import FeatureSpec

SEGMENTS, REPEAT = 16, 3
ROUNDS = 5  # in turns: on shared machines a slow minute is then everybody's
MAIN = "import sys; from mt3_runtime.cli import main; sys.exit(main())"


@dataclass(frozen=True, slots=True)
class Timed:
    """A combination that can be timed: a bundle that has it, the device, and the precision as the bundle lists it."""

    name: str
    bundle: Path
    device: str
    precision: str


def measure_speeds(
    listed: Sequence[Timed],
    features: FeatureSpec,
    steps: int,
    threads: int | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, Speed | str]:
    """Time combinations in turns, each time in a new process, and take the medians: by name, or why there is none.

    Args:
        listed: what to time.
        features: of the model.
        steps: of every row, which should be the median of the audio at hand.
        threads: of the CPU; None for all.
        progress: is told which one is under way.
    """
    runs: dict[str, list[Speed]] = {each.name: [] for each in listed}
    failed: dict[str, Speed | str] = {}
    for turn in range(ROUNDS):
        for place, each in enumerate(listed):
            progress(f"times {each.name}", turn * len(listed) + place, ROUNDS * len(listed))
            if each.name not in failed:
                try:
                    runs[each.name].append(_speed(_bench(_command(each, steps, threads)), features, steps))
                except DeviceError as error:
                    failed[each.name] = f"not timed: {error}"
    return {name: _medians(own) for name, own in runs.items() if name not in failed} | failed


def _medians(runs: Sequence[Speed]) -> Speed:
    return Speed(**{field.name: median(getattr(run, field.name) for run in runs) for field in fields(Speed)})


def _command(timed: Timed, steps: int, threads: int | None) -> list[str]:
    options = ["--device", timed.device, "--precision", timed.precision, *(["--threads", threads] if threads else [])]
    options += ["--segments", SEGMENTS, "--steps", steps, "--repeat", REPEAT]
    return [
        str(part) for part in (sys.executable, "-P", "-c", MAIN, "bench", "--bundle", timed.bundle, *options, "--json")
    ]


def _bench(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603 -- our own code
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
        raise DeviceError(f"mt3-run bench failed ({lines[-1][:300]}): run it by hand")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _speed(found: dict[str, Any], features: FeatureSpec, steps: int) -> Speed:
    encode_ms = found["encode_s"] / found["segments"] * 1e3
    by_rows = {int(rows): ms for rows, ms in found["decode_ms_per_step"].items()}
    most = max(by_rows)
    audio = found["segments"] * features.segment_samples / features.sample_rate
    return Speed(
        load_s=found["load_s"],
        encode_ms=encode_ms,
        step_ms=by_rows[1],
        batch_step_ms=by_rows[most],
        batch_rows=most,
        latency_ms=encode_ms + steps * by_rows[1],
        times_realtime=audio / found["total_s"],
        peak_mb=found["peak_rss_mb"],
    )


def typical_steps(lengths: list[int], most: int) -> int:
    """Steps of a row in the middle of all, its end included."""
    return min(most, round(median(lengths)) + 1) if lengths else 1
