"""The command line of `scripts/train_demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Nothing heavy is imported before it is needed: the processes that make batches import this module, too.

PLAN = ("seed", "steps", "batch", "size", "precision")
CONDITIONS = {  # options and their fields
    "minutes": "minutes",
    "validate": "validate_minutes",
    "device": "device",
    "threads": "threads",
    "workers": "workers",
}
_NOTHING = "give --state DIR to train or export, or --evaluate FILE"
# What may stand beside the option that decides what is done, by that option; the first that is given decides.
BESIDE = {"evaluate": ("clips",), "export": ("state",), "state": (*CONDITIONS, *PLAN)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error, explained in one line."""
    from mt3_export.dependencies import needing
    from mt3_runtime.errors import Mt3Error

    parser = _parser()
    given = vars(parser.parse_args(arguments))
    if problem := _problem(given):
        parser.error(problem)
    try:
        with needing("cpu,export", "mir_eval"):
            _run(given)
    except Mt3Error as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    # Only what is given gets a value: what would be ignored can then be refused.
    parser = argparse.ArgumentParser(
        description="Train, export and score the demo model.", argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--state", type=Path, metavar="DIR", help="folder of the run; a new one is begun")
    parser.add_argument("--minutes", type=float, help="stop after so long; default: when the plan is done")
    parser.add_argument("--export", type=Path, metavar="FILE", help="do not train: write the weights as safetensors")
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="score a checkpoint or a bundle")
    parser.add_argument("--clips", type=_positive, help="clips of each kind to score (default: 100)")
    parser.add_argument("--threads", type=_positive, help="of the CPU for training; default: all")
    parser.add_argument("--workers", type=_positive, help="processes that make music (default: 1)")
    parser.add_argument("--device", help="torch device, as cpu or cuda (default: cpu)")
    parser.add_argument("--validate", type=float, help="minutes between validations (default: 15)")
    plan = parser.add_argument_group("a new run", "what decides its outcome; kept in the folder")
    plan.add_argument("--seed", type=int, help="default: 0")
    plan.add_argument("--steps", type=_positive, help="length of the plan (default: 6000); may be changed later")
    plan.add_argument("--batch", type=_positive, help="segments in a step (default: 32)")
    plan.add_argument("--size", choices=("small", "full"), help="small: the demo; full: MT3's own, for a GPU")
    plan.add_argument("--precision", choices=("bf16", "fp32"), help="of matrix products (default: bf16)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _problem(given: Mapping[str, Any]) -> str | None:
    """What is wrong with options that are right one by one."""
    if not {"evaluate", "state"} & set(given):
        return "give --state DIR, the run to export" if "export" in given else _NOTHING
    deciding = next(name for name in BESIDE if name in given)
    ignored = [f"--{name}" for name in given if name not in (deciding, *BESIDE[deciding])]
    if ignored:
        doing = "training" if deciding == "state" else f"--{deciding}"
        return f"{doing} does not use {', '.join(ignored)}: leave that out"
    return None


def _run(given: Mapping[str, Any]) -> None:
    if "evaluate" in given:
        from demo_model.evaluation import evaluate_file, table

        print(table(evaluate_file(given["evaluate"], given.get("clips", 100))))
        return
    from demo_model import sitting

    if "export" in given:
        sitting.export(given["state"], given["export"])
    else:
        chosen = {name: given[name] for name in PLAN if name in given}
        conditions = {field: given[name] for name, field in CONDITIONS.items() if name in given}
        sitting.train(given["state"], chosen, sitting.Conditions(**conditions))
