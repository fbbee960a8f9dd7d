"""Bisections in a run of the lab: what was found is kept, and every plan is measured as a combination of its own."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_export.lab.bisection import Trial, bisect_precision
from mt3_export.lab.results import Bisection, one_line, read_kept, to_json
from mt3_export.lab.variants import VARIANTS
from mt3_export.lab.worker import material_of
from mt3_export.mixed_plan import ROUNDED, MixedPlan, write_plan
from mt3_runtime.errors import OptionError, OutputError
from mt3_runtime.files import atomic_write, check_target
from mt3_runtime.loading import load

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mt3_export.lab.job import Job
    from mt3_export.lab.run import Laboratory
    from mt3_export.lab.variants import Variant

ROWS = 48  # rows told in every trial: there are some forty
UNWRITTEN = "not written"  # in place of a plan's name


def check_bisected(names: Sequence[str]) -> tuple[Variant, ...]:
    """The variants that are to be bisected.

    Raises:
        OptionError: one is none that a plan can be for.
    """
    known = [name for name in VARIANTS if name in ROUNDED]
    for name in names:
        if name not in known:
            raise OptionError(f"{name!r:.40} cannot be bisected: use {', '.join(known)}, or some of them with commas")
    return tuple(VARIANTS[name] for name in dict.fromkeys(names))


def check_plan_output(path: Path | None, bisected: Sequence[Variant]) -> None:
    """Refuse a place for plans that is none, before any work.

    Raises:
        OptionError: there is not one plan to write, or there is such a file, which somebody may have made.
        OutputError: no file can be made there.
    """
    if path is None:
        return
    if len(bisected) != 1:
        raise OptionError("--plan-output is the file of one plan: give --bisect with one precision, or leave it out")
    check_target(path)
    if path.exists():
        raise OptionError(f"{path} exists already: remove it, or give another --plan-output")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"folder {path.parent} does not exist: create it, or give another --plan-output")
    if not os.access(Path(os.path.realpath(path)).parent, os.W_OK):
        raise OutputError(f"folder {path.parent} is write-protected: give another --plan-output")


def bisect_one(laboratory: Laboratory, variant: Variant, say: Callable[[str], None]) -> Bisection:
    """The worst products of a precision, found now, or what an earlier run found; its plan is yet to be written.

    Raises:
        OptionError: there is nothing to bisect.
        OutputError: the bundles that are tried cannot be written.
    """
    reference = laboratory.jobs[0]
    found = None if laboratory.options.again else read_kept(Bisection, _kept(laboratory, variant.name))
    if found:
        say(f"bisection of {variant.name}: kept from an earlier run")
        return found
    transcriber = load(laboratory.bundle.path, "cpu", precision="fp32", threads=reference.threads or None)
    material = material_of(replace(reference, rows=ROWS), transcriber)
    work = reference.work.with_name(f"bisection.{variant.name}")
    trial = Trial(laboratory.bundle, variant, material, work, reference.threads)
    return replace(bisect_precision(trial, say), plan=UNWRITTEN)


def save_bisection(laboratory: Laboratory, found: Bisection, plan: Path) -> Bisection:
    """Keep what was found for later runs, and write the plan, whose name the result has.

    Raises:
        OutputError: that cannot be written; what was found is no less true.
    """
    atomic_write(_kept(laboratory, found.precision), to_json(found))
    write_plan(_plan(laboratory, found), plan, f"Made by mt3-export precision --bisect {found.precision}.")
    return replace(found, plan=plan.name)


def planned(job: Job, variant: Variant, plan: Path) -> Job:
    """The job that measures a plan."""
    return replace(job, precision=variant.name, plan=str(plan.absolute()))


def _kept(laboratory: Laboratory, precision: str) -> Path:
    return laboratory.jobs[0].results / f"bisection.{precision}.json"


def _plan(laboratory: Laboratory, found: Bisection) -> MixedPlan:
    measured: dict[str, float | str] = {
        "agreement_all": found.agreement_all,
        "agreement_kept": found.agreement_kept,
        "kl_all": found.cost_all,
        "kl_kept": found.cost_kept,
        "audio": one_line(shlex.join(path.name for path in laboratory.options.audio)),
    }
    variant = VARIANTS[found.precision]
    return MixedPlan(laboratory.bundle.manifest.model.name, variant.precision, found.kept, measured)
