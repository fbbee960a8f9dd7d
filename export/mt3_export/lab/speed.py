"""How fast a bundle is: by `mt3-run bench` in processes of its own, which nothing else has warmed or filled."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from statistics import median
from typing import TYPE_CHECKING, Any

from mt3_export.lab.results import Speed
from mt3_runtime.errors import DeviceError

if TYPE_CHECKING:
    from pathlib import Path

    from mt3_runtime.specs import FeatureSpec

SEGMENTS, REPEAT = 16, 3
PROCESSES = 3  # on shared machines some are slow from their beginning to their end
MAIN = "import sys; from mt3_runtime.cli import main; sys.exit(main())"


def measure_speed(
    bundle: Path, device: str, precision: str, features: FeatureSpec, steps: int, threads: int | None
) -> Speed:
    """Time a bundle with `steps` steps a row, which should be the median of the audio at hand: medians of processes.

    Raises:
        DeviceError: a process failed; the message has its last line.
    """
    options = ["--device", device, "--precision", precision, *(["--threads", threads] if threads else [])]
    options += ["--segments", SEGMENTS, "--steps", steps, "--repeat", REPEAT]
    command = [sys.executable, "-P", "-c", MAIN, "bench", "--bundle", bundle, *options, "--json"]
    runs = [_speed(_bench([str(part) for part in command]), features, steps) for _ in range(PROCESSES)]
    return Speed(**{field.name: median(getattr(run, field.name) for run in runs) for field in fields(Speed)})


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
