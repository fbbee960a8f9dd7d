"""What of a checkpoint its file does not say: options that several commands have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mt3_export.settings import FAMILY, check_name
from mt3_export.yourmt3_models import MODELS as YOURMT3
from mt3_runtime.cli import positive
from mt3_runtime.console import say
from mt3_runtime.specs import MT3_FRONTENDS, POSITION_BASES

if TYPE_CHECKING:
    import argparse

    from mt3_export.checkpoint import Checkpoint

MODELS = (*FAMILY, *YOURMT3)
OF_A_CHECKPOINT = ("position_base", "frontend", "mel_norm", "num_heads", "max_length", "memory_length", "name")


def add_checkpoint_options(parser: argparse.ArgumentParser, *, required: bool = True, named: bool = True) -> None:
    """Add the file, what it may not say, and what it is called, if it is to be `named`."""
    parser.add_argument("--checkpoint", required=required, metavar="FILE|random:SEED", help="weights to export")
    parser.add_argument(
        "--position-base", type=int, choices=POSITION_BASES, help="mt3: 255, Magenta's rule, or 256, MR-MT3's"
    )
    parser.add_argument("--frontend", choices=MT3_FRONTENDS, help="mt3: log-mel it was trained with")
    parser.add_argument("--mel-norm", choices=("on", "off"), help="mt3: whether it was scaled to 0..1")
    parser.add_argument("--num-heads", type=positive, metavar="N", help="attention heads, where the file does not say")
    parser.add_argument("--max-length", type=positive, metavar="N", help="longest token sequence of a segment")
    parser.add_argument(
        "--memory-length",
        type=int,
        metavar="N",
        help="MR-MT3: vectors of its memory, where the file's name does not say",
    )
    if named:
        parser.add_argument("--name", help="what the model is called in results (default: from the file)")
    else:
        parser.set_defaults(name=None)


def load_checkpoint_of(arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint that the options name; warnings go to standard error.

    Raises:
        CheckpointError: it is not what it is given as.
        OptionError: an option makes no sense.
    """
    from dataclasses import replace  # noqa: PLC0415 -- torch takes seconds to import: not for --help

    from mt3_export.checkpoint import load_checkpoint  # noqa: PLC0415

    if arguments.name is not None:
        check_name(arguments.name)
    checkpoint = load_checkpoint(
        arguments.checkpoint,
        model=arguments.model,
        frontend=arguments.frontend,
        mel_norm=None if arguments.mel_norm is None else arguments.mel_norm == "on",
        position_base=arguments.position_base,
        num_heads=arguments.num_heads,
        max_length=arguments.max_length,
        memory_length=arguments.memory_length,
    )
    for warning in checkpoint.warnings:
        say(f"note: {warning}")
    if arguments.name:
        return replace(checkpoint, model=replace(checkpoint.model, name=arguments.name))
    return checkpoint
