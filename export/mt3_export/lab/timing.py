"""The last stage of a run: all combinations that are done are timed in turns."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mt3_export.lab.material import is_usable, read_rows
from mt3_export.lab.results import Combination, one_line, to_json
from mt3_export.lab.speed import Timed, measure_speeds, typical_steps
from mt3_runtime.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mt3_export.lab.job import Job
    from mt3_export.lab.results import Speed
    from mt3_export.lab.run import Laboratory


def time_all(
    laboratory: Laboratory,
    jobs: Sequence[Job],
    combinations: Sequence[Combination],
    progress: Callable[[str, int, int], None],
) -> list[Combination]:
    """The combinations with their speeds, which are kept for later runs; those that have one keep it.

    Raises:
        OutputError: a result cannot be written.
    """
    pairs = [pair for pair in zip(jobs, combinations, strict=True) if _is_to_be_timed(pair[1])]
    listed = [Timed(job.name, _bundle(job, laboratory), job.device, job.variant.precision) for job, _ in pairs]
    reference = laboratory.jobs[0]
    rows = [
        said for clip in read_rows(reference.reference_rows, len(reference.clips)) for said in clip if is_usable(said)
    ]
    manifest = laboratory.bundle.manifest
    steps = typical_steps([len(said.tokens) for said in rows], manifest.model.max_length)
    found = measure_speeds(listed, manifest.features, steps, reference.threads or None, progress)
    timed = {job.name: _with_speed(each, found[job.name]) for job, each in pairs}
    for job, _ in pairs:
        atomic_write(job.result, to_json(timed[job.name]))
    return [timed.get(job.name, each) for job, each in zip(jobs, combinations, strict=True)]


def _is_to_be_timed(combination: Combination) -> bool:
    return combination.outcome == "done" and not combination.emulated and combination.speed is None


def _bundle(job: Job, laboratory: Laboratory) -> Path:
    """What was made for it, or else the bundle that has it."""
    return job.work if job.work.exists() else laboratory.bundle.path


def _with_speed(combination: Combination, found: Speed | str) -> Combination:
    if isinstance(found, str):
        return replace(combination, problem=one_line(found))
    return replace(combination, speed=found)
