"""Bundles with graphs of 8 and 4 bits: of a checkpoint as it is exported, or of a bundle as it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from mt3_export.bundle_folder import finish, new_folder, records
from mt3_export.quantized import form_of, quantize
from mt3_export.weights_file import WeightsFile
from mt3_runtime.errors import BundleError, OptionError
from mt3_runtime.graphs import QUANTIZED
from mt3_runtime.manifest import GraphFile
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from mt3_export.quantized import Form
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.graphs import Precision

LOWERING = "ort"


def quantize_bundle(bundle: Bundle, output: Path, precisions: Iterable[str]) -> Path:
    """Write the bundle `output`: everything that `bundle` holds, and its graphs in the precisions listed.

    Neither the checkpoint nor torch is needed.

    Raises:
        BundleError: a file is not what the manifest lists, or there are no graphs for the CPU.
        OptionError: a precision is none of these, or in the bundle already.
        OutputError: `output` exists, or cannot be written.
    """
    wanted = _wanted(bundle, precisions)
    with new_folder(output) as folder:
        for file in bundle.manifest.files:
            shutil.copyfile(bundle.path / file, folder / file, follow_symlinks=False)
        if records(folder.iterdir()) != bundle.manifest.files:
            raise BundleError(f"{bundle.path} is not what the manifest lists (changed or cut off): copy it again")
        entries = list(bundle.manifest.graphs)
        for precision in wanted:
            entries += write_quantized(folder, entries, precision)
        origin = bundle.manifest.origin
        origin = replace(origin, tools={**origin.tools, "quantizer": f"mt3-runtime {__version__}"})
        written = (path for path in folder.iterdir() if path.name not in bundle.manifest.files)
        files = dict(sorted((bundle.manifest.files | records(written)).items()))
        finish(folder, replace(bundle.manifest, graphs=tuple(entries), files=files, origin=origin))
    return output


def _wanted(bundle: Bundle, precisions: Iterable[str]) -> tuple[Precision, ...]:
    given, held = set(precisions), {entry.precision for entry in bundle.manifest.graphs}
    unknown = given - set(QUANTIZED)
    if unknown:
        raise OptionError(f"{min(unknown)!r} is nothing to quantise to: use {', '.join(QUANTIZED)}")
    if given & held:
        raise OptionError(f"{bundle.path} holds {min(given & held)} already: leave it out")
    return tuple(precision for precision in QUANTIZED if precision in given)


def write_quantized(folder: Path, entries: Sequence[GraphFile], precision: Precision) -> Iterator[GraphFile]:
    """Write the graphs of one precision beside those of fp32; the entries of all graphs of that precision.

    Graphs that the precision leaves as they are stay the files that they are.

    Raises:
        BundleError: there are no graphs of fp32 for the CPU.
    """
    sources = [entry for entry in entries if (entry.lowering, entry.precision) == (LOWERING, "fp32")]
    if not sources:
        raise BundleError(f"the bundle has no graphs for the CPU in fp32, which {precision} is made of: export again")
    weights = WeightsFile(folder / f"weights.{precision}.bin", "fp32")
    try:
        for source in sources:
            form = form_of(precision, source.graph)
            if form is None:
                yield replace(source, precision=precision)
                continue
            file = f"{source.graph}.{precision}.{LOWERING}.onnx"
            (folder / file).write_bytes(_quantized(folder / source.file, form, weights))
            yield GraphFile(source.graph, source.lowering, precision, file, weights.name)
    finally:
        weights.close()


def _quantized(path: Path, form: Form, weights: WeightsFile) -> bytes:
    model = ir.load(path)
    quantize(model, form)
    weights.move(model)
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data
