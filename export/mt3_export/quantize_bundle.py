"""Bundles with graphs of 8 and 4 bits: of a checkpoint as it is exported, or of a bundle as it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from mt3_export.bundle_folder import finish, new_folder, records
from mt3_export.graph_reading import read_written
from mt3_export.mixed_plan import check_products, plans_by_precision, said
from mt3_export.products import products
from mt3_export.qdq_files import write_calibrated
from mt3_export.quantized import form_of, quantize
from mt3_export.weights_file import WeightsFile
from mt3_runtime.errors import BundleError, OptionError
from mt3_runtime.graphs import QUANTIZED, UNCALIBRATED
from mt3_runtime.manifest import GraphFile
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    from mt3_export.mixed_plan import MixedPlan
    from mt3_export.quantized import Form
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.graphs import Precision

LOWERING = "ort"


def quantize_bundle(
    bundle: Bundle,
    output: Path,
    precisions: Iterable[str],
    *,
    plans: Sequence[MixedPlan] = (),
    calibration: Sequence[Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the bundle `output`: everything that `bundle` holds, and its graphs in the precisions listed.

    Neither the checkpoint nor torch is needed.

    Args:
        bundle: with graphs for the CPU in fp32.
        output: folder to create.
        precisions: some of `QUANTIZED`.
        plans: what stays in fp32; their precisions are written whether they are listed or not.
        calibration: audio, files and folders, for "qdq" alone.
        progress: see `mt3_export.calibration.calibrate`.

    Raises:
        AudioError: a file to calibrate with cannot be read.
        BundleError: a file is not what the manifest lists, a graph cannot be used, or there are none for the CPU.
        DependencyError: onnxruntime, which calibration needs, is not installed.
        OptionError: a precision is none of these, or in the bundle already; or it and the calibration do not fit; or a
            plan does not fit the model.
        OutputError: `output` exists, or cannot be written.
    """
    mixed = plans_by_precision(plans, bundle.manifest.model.name, [spec.name for spec in bundle.manifest.contracts])
    wanted = _wanted(bundle, {*precisions, *mixed})
    _check_calibration(wanted, calibration)
    with new_folder(output) as folder:
        for file in bundle.manifest.files:
            shutil.copyfile(bundle.verify(file), folder / file)
        if records(folder.iterdir()) != bundle.manifest.files:
            raise BundleError(f"{bundle.path} is not what the manifest lists (changed or cut off): copy it again")
        entries = list(bundle.manifest.graphs)
        origin = bundle.manifest.origin
        tools = {**origin.tools, "quantizer": f"mt3-runtime {__version__}", **said(plans)}
        for precision in wanted:
            if precision in UNCALIBRATED:
                entries += write_quantized(folder, entries, precision, mixed.get(precision))
            else:
                added, said_of = write_calibrated(folder, bundle, calibration, mixed.get(precision), progress)
                entries += added
                tools[f"calibration {precision}"] = said_of
        origin = replace(origin, tools=tools)
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


def _check_calibration(wanted: Sequence[Precision], calibration: Sequence[Path]) -> None:
    calibrated = [precision for precision in wanted if precision not in UNCALIBRATED]
    if calibrated and not calibration:
        raise OptionError(f"{calibrated[0]} has to hear some music of the kind it is for: give --calibration FILES")
    if calibration and not calibrated:
        raise OptionError("no precision listed is calibrated: leave --calibration out, or add qdq to --precision")


def write_quantized(
    folder: Path, entries: Sequence[GraphFile], precision: Precision, mixed: MixedPlan | None = None
) -> Iterator[GraphFile]:
    """Write the graphs of one precision beside those of fp32; the entries of all graphs of that precision.

    Graphs that the precision leaves as they are stay the files that they are, and products that `mixed` keeps in fp32.

    Raises:
        BundleError: there are no graphs of fp32 for the CPU, or one cannot be used.
        OptionError: a graph has no product of a name that is to be kept.
    """
    sources = [entry for entry in entries if (entry.lowering, entry.precision) == (LOWERING, "fp32")]
    if not sources:
        raise BundleError(f"the bundle has no graphs for the CPU in fp32, which {precision} is made of: export again")
    weights = WeightsFile(folder / f"weights.{precision}.bin", "fp32")
    try:
        for source in sources:
            form = form_of(precision, source.graph)
            if mixed:
                check_products(mixed, source.graph, products(read_written(folder, source).graph))
            if form is None:
                if mixed and mixed.of(source.graph):
                    said_so = f"the plan for {precision} keeps products of {source.graph}"
                    raise OptionError(f"{said_so}, which {precision} leaves in fp32 anyway: leave them out")
                yield replace(source, precision=precision)
                continue
            keep = mixed.of(source.graph) if mixed else ()
            file = f"{source.graph}.{precision}.{LOWERING}.onnx"
            (folder / file).write_bytes(_quantized(read_written(folder, source), form, weights, keep))
            yield GraphFile(source.graph, source.lowering, precision, file, weights.name)
    finally:
        weights.close()


def _quantized(model: ir.Model, form: Form, weights: WeightsFile, keep: Collection[str]) -> bytes:
    quantize(model, form, keep)
    weights.move(model)
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data
