"""The bundle of a checkpoint, made once for a folder of results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mt3_export.bundle_writer import export_bundle
from mt3_export.lab.folder import EXPORTED
from mt3_export.state import printable
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import OptionError, OutputError

if TYPE_CHECKING:
    from pathlib import Path

    from mt3_export.checkpoint import Checkpoint
    from mt3_runtime.graphs import Precision


def export_once(checkpoint: Checkpoint, folder: Path, *, gpus: bool) -> Path:
    """Export to a bundle inside of `folder`, unless it is there; with fp16 and bf16 where GPUs are to be measured.

    Raises:
        OptionError: the bundle there is of another checkpoint.
        OutputError: it cannot be written.
    """
    output = folder / EXPORTED
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16") if gpus else ("fp32",)
    if output.exists():
        manifest = open_bundle(output).manifest
        origin = manifest.origin
        made_from = (manifest.model, manifest.features, origin.checkpoint_sha256 or origin.checkpoint)
        # What is in a file is told by its hash, under any name; random weights have a seed alone.
        if made_from != (checkpoint.model, checkpoint.features, checkpoint.sha256 or printable(checkpoint.source)):
            of = f"another checkpoint than {checkpoint.source}, or of other options"
            raise OptionError(f"{output} is of {of}: give another --output")
        if not set(precisions) <= {entry.precision for entry in manifest.graphs}:
            raise OptionError(f"{output} has no graphs for GPUs, as none was asked for then: give another --output")
        return output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder} ({error.strerror}): choose another --output") from None
    return export_bundle(checkpoint, output, precisions=precisions)
