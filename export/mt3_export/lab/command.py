"""The command `mt3-export precision`: what every precision costs, and what it brings."""

from __future__ import annotations

import shlex
import shutil
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mt3_export.lab.advice import recommend
from mt3_export.lab.bisections import bisect_one, check_bisected, planned
from mt3_export.lab.dataset import read_reference
from mt3_export.lab.overlays import draw_overlays
from mt3_export.lab.report.page import write_report
from mt3_export.lab.run import Options, collect, measure, measure_one, open_laboratory, write_results
from mt3_export.lab.spreadsheet import write_clips_csv, write_csv
from mt3_export.lab.variants import VARIANTS, parse_variants
from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mt3_export.lab.results import Bisection, Results
    from mt3_export.lab.run import Laboratory

    Say = Callable[[str], None]


def measure_precisions(arguments: argparse.Namespace, bundle: Path, say: Say) -> str:
    """Carry the command out on a bundle; what it prints.

    Raises:
        Mt3Error: an option is wrong, nothing can be compared, or a file cannot be written. What is finished stays.
    """
    bisected = check_bisected(arguments.bisect or ())
    if arguments.plan and len(bisected) != 1:
        raise OptionError("--plan names the file of one bisection: give --bisect with one precision, or leave it out")
    laboratory = open_laboratory(_options(arguments, bundle))
    _read_references(laboratory, say)
    folder = arguments.output
    bisections: list[Bisection] = []
    with _progress(say) as (tell, progress):
        try:
            combinations = list(measure(laboratory, tell, progress))
            for variant in bisected:
                plan = arguments.plan or folder / f"plan.{variant.name}.toml"
                bisections.append(bisect_one(laboratory, variant, plan, tell))
                if bisections[-1].kept:
                    job = planned(laboratory.jobs[0], variant, plan)
                    combinations.append(measure_one(job, tell, progress, again=arguments.again))
        finally:
            shutil.rmtree(folder / "work", ignore_errors=True)
    command = shlex.join(["mt3-export", *sys.argv[1:]])
    results = collect(laboratory, combinations, bisections, allowed_loss=arguments.allow, command=command)
    return write_all(laboratory, results)


def write_all(laboratory: Laboratory, results: Results) -> str:
    """Write everything there is to read, and say what it comes to."""
    folder = laboratory.options.output
    write_results(folder, results)
    write_csv(results, folder / "results.csv")
    write_clips_csv(results, folder / "clips.csv")
    advice = recommend(results)
    write_report(results, draw_overlays(results, folder, advice.choice), folder / "report.html")
    return f"{advice.sentence}\n{folder / 'report.html'}"


def _read_references(laboratory: Laboratory, say: Say) -> None:
    """Find out now, not after hours, what of the references cannot be read."""
    for clip in laboratory.clips:
        for warning in read_reference(clip, laboratory.options.seconds).warnings if clip.reference else ():
            say(f"note: reference of {clip.name}: {warning}")


def _options(arguments: argparse.Namespace, bundle: Path) -> Options:
    return Options(
        bundle=bundle,
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
def _progress(say: Say) -> Iterator[tuple[Say, Say]]:
    """What is told of what is finished, and of what is under way: a line that the next one replaces."""
    from tqdm import tqdm  # noqa: PLC0415 -- not needed to say that an option is wrong

    with tqdm(bar_format="{desc} ({elapsed})", leave=False, disable=not sys.stderr.isatty()) as bar:

        def tell(text: str) -> None:
            bar.clear()
            say(text)

        yield tell, bar.set_description_str
