"""The command `mt3-export precision`: its options, and what they mean together."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_export.checkpoint_options import MODELS, OF_A_CHECKPOINT, add_checkpoint_options, load_checkpoint_of
from mt3_export.dependencies import needing
from mt3_runtime.cli import positive
from mt3_runtime.console import give, say
from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 -- argparse names it no other way


def add_precision(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("precision", help="what every precision costs in notes and brings in time: a report")
    parser.add_argument("bundle", type=Path, nargs="?", metavar="DIR", help="what to measure, or else --checkpoint")
    parser.add_argument(
        "--audio", type=Path, nargs="+", required=True, metavar="PATH", help="files, or folders of them"
    )
    parser.add_argument(
        "--reference-midi", type=Path, metavar="DIR", help="what was played: a MIDI file for every clip"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder of the report, or to go on in"
    )
    parser.add_argument("--precisions", type=_listed, metavar="LIST", help="with commas (default: all)")
    parser.add_argument(
        "--devices", type=_listed, default=["cpu"], metavar="LIST", help="some of cpu,cuda,tensorrt (default: cpu)"
    )
    parser.add_argument(
        "--bisect", type=_listed, metavar="LIST", help="precisions whose worst products are looked for, for a plan"
    )
    parser.add_argument("--plan-output", type=Path, metavar="FILE", help="default: plan.PRECISION.toml in the output")
    parser.add_argument(
        "--calibration", type=Path, nargs="+", metavar="PATH", help="audio for qdq (default: the clips)"
    )
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="of every clip, from its start (default: all)")
    parser.add_argument(
        "--rows", type=positive, default=256, metavar="N", help="rows told fp32's tokens (default: 256)"
    )
    parser.add_argument(
        "--allow",
        type=_share,
        default=0.005,
        metavar="F1",
        help="loss of F1 a recommendation may have (default: 0.005)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of the CPU (default: one for every core)")
    parser.add_argument(
        "--about", default="", metavar="TEXT", help="what the audio is, for the report (default: names)"
    )
    parser.add_argument("--again", action="store_true", help="measure also what is finished")
    parser.add_argument("--model", choices=MODELS, help="with --checkpoint: what it is")
    add_checkpoint_options(parser, required=False)
    parser.set_defaults(command=_precision, needs="cpu,quantize")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no length of time: give a number above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no difference of F1: give 0 to 1, such as 0.005")
    return value


def _listed(text: str) -> list[str]:
    return text.split(",")


def _precision(arguments: argparse.Namespace) -> int:
    from mt3_export.lab.command import measure_precisions  # noqa: PLC0415

    if (arguments.bundle is None) == (arguments.checkpoint is None):
        raise OptionError("what is to be measured is a bundle or a checkpoint: give the folder, or --checkpoint")
    if arguments.checkpoint and not arguments.model:
        raise OptionError("a checkpoint does not say what it is: give --model")
    said = [name for name in ("model", *OF_A_CHECKPOINT) if getattr(arguments, name) is not None]
    if said and not arguments.checkpoint:
        raise OptionError(f"--{said[0].replace('_', '-')} is of a checkpoint, a bundle says it itself: leave it out")

    def bundle() -> Path:
        return arguments.bundle or _exported(arguments)

    give(measure_precisions(arguments, bundle, say))
    return 0


def _exported(arguments: argparse.Namespace) -> Path:
    """The bundle of a checkpoint, in the folder of the report."""
    with needing("cpu,export"):
        from mt3_export.lab.exported import export_once  # noqa: PLC0415

        gpus = any(device != "cpu" for device in arguments.devices)
        return export_once(load_checkpoint_of(arguments), arguments.output, gpus=gpus)
