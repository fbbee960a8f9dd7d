"""The command `mt3-export precision`: what every precision costs, and what it brings."""

from __future__ import annotations

import shlex
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mt3_export.lab.advice import recommend
from mt3_export.lab.bisections import bisect_one, check_bisected, check_plan_output, planned, save_bisection
from mt3_export.lab.dataset import read_reference
from mt3_export.lab.folder import alone_in, check_folder
from mt3_export.lab.overlays import draw_overlays
from mt3_export.lab.report.page import write_report
from mt3_export.lab.results import Bisection
from mt3_export.lab.run import (
    Options,
    check_calibration,
    check_scales,
    collect,
    find_all,
    measure,
    measure_one,
    open_laboratory,
    write_results,
)
from mt3_export.lab.spreadsheet import write_clips_csv, write_csv
from mt3_export.lab.timing import time_all
from mt3_export.lab.variants import VARIANTS, parse_variants
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import Mt3Error, OutputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from mt3_export.lab.dataset import ClipFile
    from mt3_export.lab.results import Results
    from mt3_export.lab.run import Laboratory
    from mt3_export.lab.variants import Variant

    Say = Callable[[str], None]
    Progress = Callable[[str, int, int], None]

COUNTED, PLAIN = "{desc} |{bar:30}| {n_fmt} of {total_fmt}, {elapsed}", "{desc}, {elapsed}"  # of tqdm


def measure_precisions(arguments: argparse.Namespace, bundle: Callable[[], Path], say: Say) -> str:
    """Carry the command out; what it prints.

    Args:
        arguments: see `mt3-export precision --help`.
        bundle: gives the bundle, once all that is asked for is known to make sense: it may have to be exported.
        say: is told of what is finished.

    Raises:
        Mt3Error: an option is wrong, nothing can be compared, or a file cannot be written. What is finished stays.
    """
    bisected = check_bisected(arguments.bisect or ())
    check_plan_output(arguments.plan_output, bisected)
    options = _options(arguments)
    check_calibration(options)
    clips = find_all(options)
    _read_references(clips, options.seconds, say)
    check_folder(options.output)
    with alone_in(options.output), _progress(say) as (tell, progress):
        opened = open_bundle(bundle())
        check_scales(options, opened)
        laboratory = open_laboratory(replace(options, bundle=opened.path), clips, opened, progress)
        shutil.rmtree(options.output / "work", ignore_errors=True)  # of a run that was killed
        try:
            return _measure(laboratory, arguments, bisected, tell, progress)
        finally:
            shutil.rmtree(options.output / "work", ignore_errors=True)


def _measure(
    laboratory: Laboratory, arguments: argparse.Namespace, bisected: Sequence[Variant], tell: Say, progress: Progress
) -> str:
    command = shlex.join(["mt3-export", *sys.argv[1:]])
    jobs = list(laboratory.jobs)
    combinations, bisections = list(measure(laboratory, tell, progress)), list[Bisection]()
    unwritten: OutputError | None = None

    def report() -> str:
        results = collect(laboratory, combinations, bisections, allowed_loss=arguments.allow, command=command)
        return write_all(laboratory, results)

    report()  # before what may take as long again, and fail
    for variant in bisected:
        plan = arguments.plan_output or laboratory.options.output / f"plan.{variant.name}.toml"
        try:
            found = bisect_one(laboratory, variant, tell)
        except Mt3Error as error:
            tell(f"{variant.name} is not bisected: {error}")
            continue
        try:
            bisections.append(save_bisection(laboratory, found, plan))
        except OutputError as error:  # what was found belongs in the report all the same
            bisections.append(found)
            tell(str(error))
            unwritten = error
            continue
        if bisections[-1].kept:
            jobs.append(planned(laboratory.jobs[0], variant, plan))
            combinations.append(measure_one(jobs[-1], tell, progress, again=arguments.again))
    combinations[:] = time_all(laboratory, jobs, combinations, progress)
    text = report()
    if unwritten:
        tell(text)
        raise unwritten
    return text


def write_all(laboratory: Laboratory, results: Results) -> str:
    """Write everything there is to read, and say what it comes to."""
    folder = laboratory.options.output
    write_results(folder, results)
    write_csv(results, folder / "results.csv")
    write_clips_csv(results, folder / "clips.csv")
    advice = recommend(results)
    write_report(results, draw_overlays(results, folder, advice.choice), folder / "report.html")
    return f"{advice.sentence}\n{folder / 'report.html'}"


def _read_references(clips: Sequence[ClipFile], seconds: float | None, say: Say) -> None:
    """Find out now, not after hours, what of the references cannot be read."""
    for clip in clips:
        for warning in read_reference(clip, seconds).warnings if clip.reference else ():
            say(f"note: reference of {clip.name}: {warning}")


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        bundle=arguments.bundle or arguments.output,
        audio=tuple(arguments.audio),
        reference=arguments.reference_midi,
        variants=parse_variants(arguments.precisions or list(VARIANTS)),
        devices=tuple(arguments.devices),
        output=arguments.output,
        calibration=tuple(arguments.calibration or ()),
        seconds=arguments.seconds,
        rows=arguments.rows,
        threads=arguments.threads or 0,
        about=arguments.about,
        again=arguments.again,
    )


@contextmanager
def _progress(say: Say) -> Iterator[tuple[Say, Progress]]:
    """What is told of what is finished, and of what is under way: a bar, where there is a terminal."""
    from tqdm import tqdm  # noqa: PLC0415 -- not needed to say that an option is wrong

    with tqdm(leave=False, disable=not sys.stderr.isatty()) as bar:

        def tell(text: str) -> None:
            bar.clear()
            say(text)

        def progress(text: str, done: int, count: int) -> None:
            bar.bar_format = COUNTED if count else PLAIN
            bar.n, bar.total = done, count
            bar.set_description_str(text)

        yield tell, progress
