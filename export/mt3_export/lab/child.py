"""Runs jobs in processes of their own, and makes a result of whatever becomes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mt3_export.lab.job import PROBLEM
from mt3_export.lab.results import Combination, one_line
from mt3_runtime.errors import OutputError
from mt3_runtime.strict import build, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TextIO

    from mt3_export.lab.job import Job

WORKER = [sys.executable, "-P", "-m", "mt3_export.lab.worker"]  # -P: a folder of data is none of modules


def run_child(job: Job, progress: Callable[[str, int, int], None]) -> Combination:
    """What the process found; a crash is a result that failed, with the process's last words in a file beside it.

    What it could not write, it tells: then those are its last words.

    Args:
        job: what to do.
        progress: is told what the process is doing, how far it is and of how many; 0 and 0 where that cannot be told.

    Raises:
        OutputError: there is no room for that file.
    """
    log, told = job.result.with_suffix(".log"), ""
    with (
        _opened(job, log) as errors,
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
            said = _parsed(line)
            if isinstance(said, dict):
                told = str(said.get(PROBLEM, "")) or told
            progress(*_told(said, line))
    if process.returncode == 0 and job.result.exists():
        log.unlink()
        return build(Combination, parse_json(job.result.read_bytes(), job.result.name), job.result.name)
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    words = told or last[-1]
    problem = f"its process ended with exit code {process.returncode} ({words[:300]}): see {log.name}"
    emulated = job.device == "cpu" and job.variant.is_half
    return Combination(job.title, job.device, emulated, "failed", one_line(problem))


def _opened(job: Job, log: Path) -> TextIO:
    """The file of last words, new; what an earlier process found is gone."""
    try:
        job.result.unlink(missing_ok=True)
        return log.open("w", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {log} ({error.strerror}): free some space or give another --output") from None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _told(said: Any, line: str) -> tuple[str, int, int]:
    try:
        stage, done, count = said
        return str(stage), int(done), int(count)
    except (ValueError, TypeError):  # what some library printed
        return one_line(line), 0, 0
