"""A whole run of the lab: every combination in a process of its own; what is finished is kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from mt3_export.lab.child import run_child
from mt3_export.lab.clips import read_notes
from mt3_export.lab.dataset import find_clips, find_sounds
from mt3_export.lab.folder import claim
from mt3_export.lab.job import CALIBRATED, Job, Sound, held_for_cpu
from mt3_export.lab.material import read_rows
from mt3_export.lab.note_scores import summarise
from mt3_export.lab.results import (
    FORMAT,
    REFERENCE,
    VERSION,
    Bisection,
    Combination,
    Results,
    one_line,
    read_kept,
    to_json,
)
from mt3_runtime.audio import open_audio
from mt3_runtime.devices import parse_device
from mt3_runtime.errors import DeviceError, OptionError
from mt3_runtime.files import atomic_write
from mt3_runtime.loading import MAX_THREADS
from mt3_runtime.machine import describe_machine, package_versions
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mt3_export.lab.dataset import ClipFile
    from mt3_export.lab.variants import Variant
    from mt3_runtime.bundle import Bundle

    Say = Callable[[str], None]
    Progress = Callable[[str, int, int], None]

SHORTEST = 0.01  # seconds: a hop of the family at its rate, see `AudioLimits`, takes 0.008


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure. See `mt3-export precision --help`."""

    bundle: Path
    audio: tuple[Path, ...]
    reference: Path | None
    variants: tuple[Variant, ...]
    devices: tuple[str, ...]
    output: Path
    calibration: tuple[Path, ...] = ()
    seconds: float | None = None
    rows: int = 256
    threads: int = 0
    about: str = ""
    again: bool = False


@dataclass(frozen=True, slots=True)
class Laboratory:
    """An output folder that is ready, and everything that is measured there."""

    options: Options
    bundle: Bundle
    clips: tuple[ClipFile, ...]
    jobs: tuple[Job, ...]


def find_all(options: Options) -> tuple[ClipFile, ...]:
    """The clips, once all else that was asked for is known to make sense.

    Raises:
        OptionError: a device is unknown, a number is one that nothing can run with, there are no clips or not all have
            references, or there are no files to calibrate with.
    """
    for device in options.devices:
        if parse_device(device).kind == "auto":
            raise OptionError("the lab does not choose a device: give --devices with cpu, cuda or tensorrt")
    if options.threads > MAX_THREADS:
        raise OptionError(f"--threads {options.threads} is more than {MAX_THREADS}: give one for each core at most")
    if options.seconds is not None and options.seconds < SHORTEST:
        raise OptionError(f"--seconds {options.seconds:g} is too short to be heard: give at least {SHORTEST}")
    if options.calibration:
        find_sounds(options.calibration)
    return find_clips(options.audio, options.reference)


def check_calibration(options: Options) -> None:
    """Refuse audio for scales that nobody makes.

    Raises:
        OptionError: no precision listed needs any, or no device listed is one that scales are made for.
    """
    if not options.calibration:
        return
    if all(variant.precision not in CALIBRATED for variant in options.variants):
        raise OptionError("no precision listed is calibrated: leave --calibration out, or add qdq to --precisions")
    if all(parse_device(device).kind != "cpu" for device in options.devices):
        raise OptionError("scales are made for the CPU only: leave --calibration out, or give --devices with cpu")


def check_scales(options: Options, bundle: Bundle) -> None:
    """Refuse audio for scales that the bundle has already: its own are what is measured.

    Raises:
        OptionError: it holds graphs that were calibrated.
    """
    if options.calibration and held_for_cpu(bundle) & set(CALIBRATED):
        raise OptionError(
            f"{bundle.path} holds qdq, whose scales are measured as they are: "
            "leave --calibration out, or give a bundle without qdq"
        )


def open_laboratory(options: Options, clips: tuple[ClipFile, ...], bundle: Bundle, progress: Progress) -> Laboratory:
    """Read every clip, and what is calibrated with, to its end, and make the output folder, or go on in it.

    Raises:
        AudioError: a file cannot be read, which is found out here and not after hours.
        OptionError: the folder holds something else.
        OutputError: the folder cannot be made.
    """
    calibration = find_sounds(options.calibration) if options.calibration else ()
    paths = dict.fromkeys([*(clip.audio for clip in clips), *calibration])
    digests: dict[Path, str] = {}
    for done, path in enumerate(paths):
        progress("reads", done, len(paths))
        digests[path] = _heard(path, bundle)
    known = [[clip.name, digests[clip.audio], _digest(clip.reference)] for clip in clips]
    _claim(options, bundle, known, [digests[path] for path in calibration])
    sounds = tuple(Sound(clip.name, str(clip.audio.absolute()), _path(clip.reference)) for clip in clips)
    pairs = dict.fromkeys([("fp32", "cpu"), *((v.name, d) for d, v in product(options.devices, options.variants))])
    jobs = tuple(_job(options, bundle, sounds, *pair) for pair in pairs)
    return Laboratory(options, bundle, clips, jobs)


def _job(options: Options, bundle: Bundle, sounds: tuple[Sound, ...], precision: str, device: str) -> Job:
    return Job(
        bundle=str(bundle.path.absolute()),
        precision=precision,
        device=device,
        plan="",
        output=str(options.output.absolute()),
        clips=sounds,
        calibration=tuple(str(path.absolute()) for path in options.calibration),
        seconds=options.seconds,
        rows=options.rows,
        threads=options.threads,
    )


def measure(laboratory: Laboratory, say: Say, progress: Progress) -> tuple[Combination, ...]:
    """Run what is not finished; fp32 on the CPU comes first, and the others are compared with it.

    Args:
        laboratory: what to run.
        say: is told of every combination that is finished or failed.
        progress: is told what the one under way is doing, how far it is, and of how many.

    Raises:
        DeviceError: fp32 on the CPU failed, without which there is nothing to compare with.
    """
    found: list[Combination] = []
    for job in laboratory.jobs:
        found.append(measure_one(job, say, progress, again=laboratory.options.again))
        if job.name == REFERENCE and found[-1].outcome != "done":
            raise DeviceError(f"fp32 on the CPU, which all is compared with, failed ({found[-1].problem}): mend that")
    return tuple(found)


def measure_one(job: Job, say: Say, progress: Progress, *, again: bool = False) -> Combination:
    """One combination, measured now, unless an earlier run finished it and it is not to be done again."""
    kept = None if again else read_combination(job)
    if kept:
        say(f"{job.name}: kept from an earlier run")
        return kept
    found = run_child(job, lambda text, done, count: progress(f"{job.name} {text}", done, count))
    say(f"{job.name}: {f'{found.outcome}: {found.problem}' if found.problem else 'done'}")
    return found


def read_combination(job: Job) -> Combination | None:
    """What an earlier run finished; None where it did not, compared with another fp32 or plan, or cannot be read."""
    found = read_kept(Combination, job.result)
    if found is None:
        return None
    if job.name == REFERENCE and not _is_readable(job):
        return None
    is_whole = found.outcome == "done" and (found.emulated or found.speed is not None)
    return found if is_whole and found.compared_with == job.compared_with() else None


def _is_readable(job: Job) -> bool:
    """Whether what fp32 said and heard is there and whole: all others are compared with it."""
    try:
        read_rows(job.reference_rows, len(job.clips))
        return len(read_notes(job.reference_notes)) == len(job.clips)
    except Exception:  # noqa: BLE001 -- what a damaged file raises is not foreseen; it is made again, whatever it is
        return False


def scored(combination: Combination, reference: Combination) -> Combination:
    """The combination with means over clips, and what they lose to fp32's."""
    if combination.outcome != "done":
        return combination
    with_reference = any(clip.against_reference for clip in combination.clips)
    clips = combination.clips
    return replace(
        combination,
        against_fp32=summarise(clips, reference.clips, "fp32"),
        against_reference=summarise(clips, reference.clips, "reference") if with_reference else None,
    )


def collect(
    laboratory: Laboratory,
    combinations: Sequence[Combination],
    bisections: Sequence[Bisection],
    *,
    allowed_loss: float,
    command: str,
) -> Results:
    """Everything that was found, for the report."""
    options = laboratory.options
    heard = options.about or ", ".join(map(str, options.audio))
    if any(each.precision in CALIBRATED for each in combinations):
        heard += f"; scales of qdq {_scales_from(laboratory, combinations)}"
    clips = combinations[0].clips
    return Results(
        format=FORMAT,
        version=VERSION,
        model=laboratory.bundle.manifest.model.name,
        bundle=one_line(laboratory.bundle.path.name),
        bundle_sha256=laboratory.bundle.sha256,
        audio=one_line(heard),
        clips=len(clips),
        seconds=float(sum(clip.seconds for clip in clips)),
        has_reference=options.reference is not None,
        allowed_loss=allowed_loss,
        machine=describe_machine().cpu_name,
        versions={"mt3-runtime": __version__, **{name: text for name, text in package_versions().items() if text}},
        command=one_line(command),
        combinations=tuple(scored(each, combinations[0]) for each in combinations),
        bisections=tuple(bisections),
    )


def _scales_from(laboratory: Laboratory, combinations: Sequence[Combination]) -> str:
    """Whose the scales of qdq are: made for the CPU alone, and there only for a bundle that has none."""
    made = any(each.precision in CALIBRATED and parse_device(each.device).kind == "cpu" for each in combinations)
    if not made or held_for_cpu(laboratory.bundle) & set(CALIBRATED):
        return "are the bundle's own"
    return f"from {', '.join(map(str, laboratory.options.calibration)) or 'the same clips'}"


def _heard(path: Path, bundle: Bundle) -> str:
    """The digest of a sound file that was decoded to its end."""
    with open_audio(path, sample_rate=bundle.manifest.features.sample_rate) as stream:
        for _ in stream.blocks:
            pass
    return _digest(path)


def _claim(options: Options, bundle: Bundle, clips: Sequence[list[str]], calibration: Sequence[str]) -> None:
    """Make the folder for the results of this bundle, these clips and this machine, or go on in it."""
    identity = {
        "format": FORMAT,
        "version": [VERSION, __version__, package_versions().get("onnxruntime"), describe_machine().cpu_name],
        "bundle": bundle.sha256,
        "clips": list(clips),
        "calibration": list(calibration),
        "seconds": options.seconds,
        "rows": options.rows,
        "threads": options.threads,
    }
    claim(options.output, identity)


def _digest(path: Path | None) -> str:
    if path is None:
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _path(path: Path | None) -> str:
    return "" if path is None else str(path.absolute())


def write_results(folder: Path, results: Results) -> None:
    """Write `results.json`.

    Raises:
        OutputError: it cannot be written.
    """
    atomic_write(folder / "results.json", to_json(results))
