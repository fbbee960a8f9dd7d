"""`mt3-run transcribe`: which files are written where, and all of them through one scheduler."""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mt3_runtime.console import say, shown
from mt3_runtime.errors import Mt3Error, OptionError, OutputError
from mt3_runtime.files import check_target
from mt3_runtime.loading import load

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence

    from mt3_runtime.transcriber import Transcriber
    from mt3_runtime.transcription import Transcription

FORMATS = ("mid", "json", "png")
LONG_SECONDS = 2.0  # a progress bar appears for work that has taken as long


@dataclass(frozen=True, slots=True)
class Job:
    """One input and the files to write for it."""

    source: Path
    outputs: tuple[Path, ...]


def plan_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Decide every output before any work is done.

    Raises:
        OptionError: options contradict each other, or two results would have one name.
        OutputError: an output cannot be written, or exists under a name that was not given.
        DependencyError: a picture is asked for and Pillow is not installed.
    """
    named = [path for path in (arguments.output, arguments.json, arguments.picture) if path is not None]
    if named and len(arguments.inputs) > 1:
        raise OptionError("-o, --json and --picture name one file each: use --output-dir and --formats for many inputs")
    if arguments.output is not None and arguments.output_dir is not None:
        raise OptionError("-o and --output-dir both say where the MIDI file goes: give one of them")
    formats = arguments.formats.split(",")
    if unknown := [name for name in formats if name not in FORMATS]:
        raise OptionError(f"unknown format {unknown[0]!r}: use some of {','.join(FORMATS)}, separated by commas")
    folder = arguments.output_dir or Path()
    jobs = []
    for source in arguments.inputs:
        automatic = [] if arguments.output else [folder / f"{source.stem}.{suffix}" for suffix in formats]
        jobs.append(Job(source, (*named, *automatic)))
    _check_suffixes(arguments)
    _check_clashes(jobs)
    if any(path.suffix.lower() == ".png" for job in jobs for path in job.outputs):
        from mt3_runtime.picture import check_pillow  # noqa: PLC0415 -- takes time that `load` uses better

        check_pillow()
    if arguments.output_dir is not None:
        _make_folder(folder)
    for path in (path for job in jobs for path in job.outputs):
        check_writable(path)
    if not arguments.overwrite:
        _check_new(path for job in jobs for path in job.outputs if path not in named)
    return jobs


def transcribe_jobs(jobs: Sequence[Job], arguments: argparse.Namespace) -> int:
    """Transcribe every job; returns how many failed. A failed one is reported and keeps nobody else from being done."""
    transcriber = load_asked(arguments, slots=arguments.slots)
    failures, unsaid = 0, device_notes(transcriber)
    if arguments.quiet and arguments.bundle is None:  # more likely forgotten than wanted
        say(f"note: no --bundle was given: {transcriber.bundle.manifest.origin.notice}")
    for job, outcome, bar in _outcomes(transcriber, jobs, quiet=arguments.quiet):
        written = _save(job, outcome)
        bar.clear()
        if isinstance(written, Mt3Error):
            told = str(written) if shown(job.source) in str(written) else f"{shown(job.source)}: {written}"
            say(f"mt3-run: error: {told}")
            failures += 1
        elif not arguments.quiet:
            _tell(job, *written)
            while unsaid:
                say(unsaid.pop())
    if failures and len(jobs) > 1:
        say(f"mt3-run: {failures} of {len(jobs)} files failed, {len(jobs) - failures} were written")
    return failures


def load_asked(arguments: argparse.Namespace, slots: int | None = None) -> Transcriber:
    """The model that the command line asks for."""
    return load(
        arguments.bundle,
        arguments.device,
        precision=arguments.precision,
        slots=slots,
        threads=arguments.threads,
        strict_upstream=arguments.strict_upstream == "on",
        fine_programs=arguments.programs == "fine",
        skip_silence=arguments.skip_silence,
    )


def device_notes(transcriber: Transcriber) -> list[str]:
    """What there is to tell of a device that was chosen for the user."""
    reason = transcriber.device_reason
    return [f"note: running on {transcriber.backend.device}: {reason}"] if reason else []


def _outcomes(
    transcriber: Transcriber, jobs: Sequence[Job], *, quiet: bool
) -> Iterator[tuple[Job, Transcription | Mt3Error, Any]]:
    """What came of each job, as it is finished, and the progress bar, which is to be cleared before words."""
    from tqdm import tqdm  # noqa: PLC0415 -- not needed to say that an option is wrong

    name = jobs[0].source.name if len(jobs) == 1 else f"{len(jobs)} files"
    done, counts = Counter[int](), Counter[int]()
    with tqdm(
        desc=name, unit="segment", delay=LONG_SECONDS, leave=False, disable=quiet or not sys.stderr.isatty()
    ) as bar:

        def progress(index: int, segments: int, count: int) -> None:
            done[index], counts[index] = segments, count
            bar.total = counts.total()
            bar.update(done.total() - bar.n)

        sources = [job.source for job in jobs]
        with closing(transcriber.transcribe_many(sources, progress=progress)) as outcomes:
            for index, outcome in outcomes:
                yield jobs[index], outcome, bar


def _save(job: Job, outcome: Transcription | Mt3Error) -> tuple[Transcription, list[str]] | Mt3Error:
    """Write every file of a job; returns the transcription with all notices, or what went wrong.

    A file that cannot be written keeps none of the others from being written.
    """
    if isinstance(outcome, Mt3Error):
        return outcome
    notices, errors = list(outcome.warnings), list[Mt3Error]()
    for path in job.outputs:
        try:
            notices += [notice for notice in outcome.save(path) if notice not in notices]
        except Mt3Error as error:
            errors.append(error)
    if len(errors) > 1:
        return OutputError("; ".join(map(str, errors)))
    return errors[0] if errors else (outcome, notices)


def _tell(job: Job, transcription: Transcription, notices: Sequence[str]) -> None:
    provenance = transcription.provenance
    speed = 1 / provenance.real_time_factor if provenance.real_time_factor else 0.0
    silent = len(provenance.silent_segments)
    skipped = f", {silent} of {provenance.segments} segments silent" if silent else ""
    say(
        f"{shown(job.source)} -> {', '.join(map(shown, job.outputs))}: {len(transcription.notes)} notes, "
        f"{transcription.duration:.1f} s of audio in {sum(provenance.stage_seconds.values()):.2f} s "
        f"({speed:.1f} x real time, {provenance.device}){skipped}"
    )
    for notice in notices:
        say(f"  note: {notice}")


def _check_suffixes(arguments: argparse.Namespace) -> None:
    check_suffix(arguments.output, ".mid", ".midi")
    check_suffix(arguments.json, ".json")
    check_suffix(arguments.picture, ".png")


def check_suffix(path: Path | None, *suffixes: str) -> None:
    """Raise OptionError if a file was named and its name ends in none of `suffixes`."""
    if path is not None and path.suffix.lower() not in suffixes:
        raise OptionError(f"{shown(path)} does not end in {' or '.join(suffixes)}: name it so")


def _check_clashes(jobs: Sequence[Job]) -> None:
    """Refuse to write one file twice, or over an input."""
    owners: dict[str, Path] = {os.path.realpath(job.source): job.source for job in jobs}
    for job in jobs:
        for path in job.outputs:
            other = owners.setdefault(os.path.realpath(path), job.source)
            if other is not job.source and os.path.realpath(other) == os.path.realpath(job.source):
                raise OptionError(f"{shown(job.source)} is given twice: give it once")
            if other is not job.source or os.path.realpath(path) == os.path.realpath(job.source):
                names = f"{shown(path)} would be written for {shown(job.source)}, but belongs to {shown(other)}"
                raise OptionError(f"{names}: use other folders")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create folder {shown(folder)} ({error.strerror}): choose another --output-dir"
        ) from error


def _check_new(paths: Iterable[Path]) -> None:
    """Keep what stands under a name that nobody gave: beside a recording that may be what was played."""
    there = [path for path in paths if os.path.exists(path)]  # noqa: PTH110 -- see `check_writable`
    if there:
        more, exist, them = (f" and {len(there) - 1} more", "exist", "them") if there[1:] else ("", "exists", "it")
        fix = f"give --overwrite to replace {them}, another --output-dir, or for one input a name with -o"
        raise OutputError(f"{shown(there[0])}{more} {exist} already, and nothing was done: {fix}")


def check_writable(path: Path) -> None:
    """Say now, not after the work, that a result cannot be written."""
    name, folder = shown(path), shown(path.parent)
    # Not those of Path, which raise for names that are too long and folders that may not be entered.
    if os.path.isdir(path):  # noqa: PTH112
        raise OutputError(f"{name} is a folder: name a file in it")
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise OutputError(f"folder {folder} does not exist: create it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"folder {folder} is write-protected: choose another one")
    check_target(path)
