"""The command line of `scripts/train_demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Nothing heavy is imported before it is needed: the processes that make batches import this module, too.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error, explained in one line."""
    from mt3_export.dependencies import needing
    from mt3_runtime.errors import Mt3Error

    parser = _parser()
    options = parser.parse_args(arguments)
    if not (options.state or options.evaluate):
        parser.error("give --state DIR to train or export, or --evaluate FILE")
    if options.export and not options.state:
        parser.error("give --state DIR, the run to export")
    try:
        with needing("cpu,export", "mir_eval"):
            _run(options)
    except Mt3Error as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train, export and score the demo model.")
    parser.add_argument("--state", type=Path, metavar="DIR", help="folder of the run; a new one is begun")
    parser.add_argument("--minutes", type=float, help="stop after so long; default: when the plan is done")
    parser.add_argument("--export", type=Path, metavar="FILE", help="do not train: write the weights as safetensors")
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="score a checkpoint or a bundle")
    parser.add_argument("--clips", type=_positive, default=100, help="clips of each kind to score (default: 100)")
    parser.add_argument("--threads", type=_positive, help="of the CPU for training; default: all")
    parser.add_argument("--workers", type=_positive, default=1, help="processes that make music (default: 1)")
    parser.add_argument("--device", default="cpu", help="torch device, as cpu or cuda (default: cpu)")
    parser.add_argument("--validate", type=float, default=15.0, help="minutes between validations (default: 15)")
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


def _run(options: argparse.Namespace) -> None:
    if options.evaluate:
        from demo_model.evaluation import evaluate_file, table

        print(table(evaluate_file(options.evaluate, options.clips)))
        return
    from demo_model import sitting

    if options.export:
        sitting.export(options.state, options.export)
    else:
        chosen = {name: getattr(options, name) for name in ("seed", "steps", "batch", "size", "precision")}
        sitting.train(
            options.state,
            {name: value for name, value in chosen.items() if value is not None},
            sitting.Conditions(
                minutes=options.minutes,
                validate_minutes=options.validate,
                device=options.device,
                threads=options.threads,
                workers=options.workers,
            ),
        )
