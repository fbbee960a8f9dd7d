"""The command `mt3-export`: checkpoints to bundles, and what is in them."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_export.checkpoint_options import MODELS, add_checkpoint_options, load_checkpoint_of
from mt3_export.dependencies import needing
from mt3_export.mr_mt3 import models_of
from mt3_export.precision_options import add_precision
from mt3_export.published import PUBLISHED
from mt3_export.yourmt3_models import MODELS as YOURMT3
from mt3_runtime.cli import positive
from mt3_runtime.console import give, report_errors, say, shown
from mt3_runtime.errors import CheckpointError, OptionError
from mt3_runtime.parser import Parser
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from mt3_export.checkpoint import Checkpoint
    from mt3_runtime.bundle import Bundle

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 -- argparse names it no other way

DIFFERS = 1  # exit code of `verify` when a graph is further from torch than it may be


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return report_errors("mt3-export", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    with needing(arguments.needs):
        return command(arguments)


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser: argparse.ArgumentParser = Parser(
        prog="mt3-export", description="Turn checkpoints of the MT3 family into bundles."
    )
    parser.add_argument("--version", action="version", version=f"mt3-runtime {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_bundle(commands)
    _add_quantize(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_fetch(commands)
    _add_engines(commands)
    add_precision(commands)
    return parser


def _add_bundle(commands: Commands) -> None:
    parser = commands.add_parser("bundle", help="checkpoint to bundle")
    parser.add_argument(
        "--model", required=True, choices=MODELS, help="what the checkpoint is (published MR-MT3: mr-mt3)"
    )
    add_checkpoint_options(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to create")
    _add_precisions(parser, "fp32", "with commas: fp32 (always); fp16, bf16 (for GPUs); int8, w8, w4 (for the CPU)")
    parser.add_argument("--weights", choices=("fp32", "fp16"), default="fp32", help="how matrices are stored")
    parser.add_argument("--notice", default="", help="a line shown to everyone who uses the bundle")
    _add_plans(parser)
    parser.set_defaults(command=_bundle, needs="export")


def _add_precisions(parser: argparse.ArgumentParser, default: str, text: str) -> None:
    parser.add_argument(
        "--precision", type=lambda listed: listed.split(","), default=[default], metavar="LIST", help=text
    )


def _add_plans(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a precision with products left in fp32, as mt3-export precision --bisect writes it; once for each",
    )


def _add_quantize(commands: Commands) -> None:
    parser = commands.add_parser("quantize", help="add graphs of 8 or 4 bits to a bundle; needs no checkpoint")
    parser.add_argument("bundle", type=Path, metavar="DIR")
    listed = "with commas: int8 (all products), w8, w4 (the decoder's), qdq (all, calibrated); default: int8"
    _add_precisions(parser, "int8", listed)
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE|DIR",
        help="qdq: audio of the kind that it is for, from which up to 64 segments are taken",
    )
    _add_plans(parser)
    parser.set_defaults(precision=None)  # int8, or what the plans are for
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to create")
    parser.set_defaults(command=_quantize, needs="quantize")


def _add_verify(commands: Commands) -> None:
    parser = commands.add_parser("verify", help="compare a bundle's graphs with torch, step by step")
    parser.add_argument("bundle", type=Path, metavar="DIR")
    parser.add_argument("--model", choices=MODELS, default="mt3", help="what the checkpoint is (default: mt3)")
    add_checkpoint_options(parser, named=False)
    parser.add_argument("--segments", type=positive, default=2, metavar="N")
    parser.add_argument("--steps", type=positive, default=64, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.set_defaults(command=_verify, needs="cpu,export")


def _add_inspect(commands: Commands) -> None:
    parser = commands.add_parser("inspect", help="what a bundle holds; checks every file")
    parser.add_argument("bundle", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.set_defaults(command=_inspect, needs="quantize")


def _add_fetch(commands: Commands) -> None:
    parser = commands.add_parser("fetch", help="download a published checkpoint and verify it")
    parser.add_argument("name", choices=sorted(PUBLISHED))
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where to (default: the user's cache)")
    parser.set_defaults(command=_fetch, needs="export")


def _add_engines(commands: Commands) -> None:
    parser = commands.add_parser("engines", help="TensorRT engines of a bundle, for this machine's cache")
    parser.add_argument("bundle", type=Path, metavar="DIR")
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), default="fp16", help="default: fp16")
    parser.add_argument("--backend", choices=("tensorrt", "tensorrt-rtx"), help="default: the one that is installed")
    parser.add_argument(
        "--target",
        default="this",
        metavar="this|LIST",
        help="the GPU at hand (default), or compute capabilities with commas, for tensorrt-rtx: sm_75,sm_86",
    )
    parser.add_argument("--profile", metavar="NAME", help="of the recipe, such as latency (default: all)")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="sizes to build for (default: by model)")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="products left in fp32, of this precision")
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.set_defaults(command=_engines, needs="quantize")


def _bundle(arguments: argparse.Namespace) -> int:
    from mt3_export.bundle_folder import check_output  # noqa: PLC0415
    from mt3_export.bundle_writer import check_notice, export_bundle  # noqa: PLC0415
    from mt3_export.mixed_plan import read_plan  # noqa: PLC0415
    from mt3_export.precision import checked_precisions  # noqa: PLC0415

    check_output(arguments.output)  # before the work
    check_notice(arguments.notice)
    plans = [read_plan(file) for file in arguments.plan]
    precisions = checked_precisions(arguments.precision)
    checkpoint = load_checkpoint_of(arguments)
    export_bundle(
        checkpoint,
        arguments.output,
        precisions=precisions,
        weights_storage=arguments.weights,
        notice=arguments.notice,
        plans=plans,
    )
    say(f"{shown(arguments.output)}: {checkpoint.model.name} from {checkpoint.source}")
    return 0


def _quantize(arguments: argparse.Namespace) -> int:
    from mt3_export.mixed_plan import read_plan  # noqa: PLC0415
    from mt3_export.quantize_bundle import quantize_bundle  # noqa: PLC0415
    from mt3_runtime.bundle import open_bundle  # noqa: PLC0415

    plans = [read_plan(file) for file in arguments.plan]
    listed = arguments.precision or ([] if plans else ["int8"])
    bundle = open_bundle(arguments.bundle)
    with _bar("calibration", bool(arguments.calibration)) as progress:
        quantize_bundle(
            bundle, arguments.output, listed, plans=plans, calibration=arguments.calibration, progress=progress
        )
    written = dict.fromkeys([*listed, *(plan.precision for plan in plans)])
    say(f"{shown(arguments.output)}: {shown(arguments.bundle)} and {', '.join(written)}")
    return 0


@contextmanager
def _bar(name: str, wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as a function of what is done and how much there is."""
    from tqdm import tqdm  # noqa: PLC0415

    with tqdm(desc=name, leave=False, disable=not (wanted and sys.stderr.isatty())) as bar:

        def progress(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        yield progress


def _verify(arguments: argparse.Namespace) -> int:
    from mt3_export.verify import verify_bundle  # noqa: PLC0415
    from mt3_runtime.bundle import open_bundle  # noqa: PLC0415

    bundle = open_bundle(arguments.bundle)
    _check_model(bundle, arguments.model)
    checkpoint = load_checkpoint_of(arguments)
    _check_memory(bundle, checkpoint)
    if checkpoint.model.max_length < arguments.steps:
        raise CheckpointError(
            f"--steps {arguments.steps} is more than max_length {checkpoint.model.max_length}: ask fewer"
        )
    reports = verify_bundle(bundle, checkpoint, segments=arguments.segments, steps=arguments.steps)
    if arguments.json:
        give(json.dumps([report.to_dict() for report in reports]))
    else:
        give("\n".join(report.to_text() for report in reports))
    return 0 if all(report.passed for report in reports) else DIFFERS


def _check_model(bundle: Bundle, name: str) -> None:
    """Raise OptionError for a model that cannot be in the bundle, before its weights are read."""
    model = bundle.manifest.model
    if (model.family == "yourmt3") != (name in YOURMT3):
        fix = "give --model mt3" if model.family == "mt3" else f"give --model with its name ({', '.join(YOURMT3)})"
        if model.memory:
            fix = f"give --model {' or '.join(models_of(model.memory))}"
        raise OptionError(f"{bundle.path} is a bundle of family {model.family}, not of {name}: {fix}")
    # MR-MT3 of memory length 0 makes bundles without a memory too.
    if model.memory and name not in models_of(model.memory):
        fix = " or ".join(models_of(model.memory))
        raise OptionError(f"{bundle.path} has a memory of other segments that is not of {name}: give --model {fix}")


def _check_memory(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raise OptionError where only the length of the memory differs: that is easily given wrong."""
    lengths = [model.memory.length if model.memory else 0 for model in (bundle.manifest.model, checkpoint.model)]
    if lengths[0] != lengths[1]:
        other = "" if lengths[0] else ", or --model mt3 where it was made from that"
        raise OptionError(
            f"{bundle.path} has a memory of {lengths[0]} vectors, {checkpoint.source} was taken to have {lengths[1]}: "
            f"give --memory-length {lengths[0]}{other}"
        )


def _inspect(arguments: argparse.Namespace) -> int:
    from mt3_export.inspection import inspect_bundle  # noqa: PLC0415

    inspection = inspect_bundle(arguments.bundle)
    give(json.dumps(inspection.to_dict(), indent=1) if arguments.json else inspection.to_text())
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from mt3_export.fetch import fetch_checkpoint  # noqa: PLC0415

    give(str(fetch_checkpoint(arguments.name, arguments.directory)))
    return 0


def _engines(arguments: argparse.Namespace) -> int:
    from mt3_export.engines_command import build_engines  # noqa: PLC0415

    give(build_engines(arguments, say))
    return 0
