"""Runs jobs in processes of their own, and makes a result of whatever becomes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from mt3_export.lab.results import Combination, one_line
from mt3_runtime.strict import build, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from mt3_export.lab.job import Job

WORKER = [sys.executable, "-P", "-m", "mt3_export.lab.worker"]  # -P: a folder of data is none of modules


def run_child(job: Job, progress: Callable[[str, int, int], None]) -> Combination:
    """What the process found; a crash is a result that failed, with the process's last words in a file beside it.

    Args:
        job: what to do.
        progress: is told what the process is doing, how far it is and of how many; 0 and 0 where that cannot be told.
    """
    job.result.unlink(missing_ok=True)
    log = job.result.with_suffix(".log")
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(  # noqa: S603 -- our own interpreter and code
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        ) as process,
    ):
        if process.stdin is None or process.stdout is None:
            raise TypeError("a process without pipes")
        with suppress(BrokenPipeError):  # it is gone already: its exit code says so
            process.stdin.write(job.to_json())
            process.stdin.close()
        for line in process.stdout:
            progress(*_told(line))
    if process.returncode == 0 and job.result.exists():
        log.unlink()
        return build(Combination, parse_json(job.result.read_bytes(), job.result.name), job.result.name)
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    problem = f"its process ended with exit code {process.returncode} ({said[-1][:300]}): see {log.name}"
    emulated = job.device == "cpu" and job.variant.is_half
    return Combination(job.title, job.device, emulated, "failed", one_line(problem))


def _told(line: str) -> tuple[str, int, int]:
    try:
        stage, done, count = json.loads(line)
        return str(stage), int(done), int(count)
    except (ValueError, TypeError):  # what some library printed
        return one_line(line), 0, 0
