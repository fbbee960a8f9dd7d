"""The graphs of "qdq": calibrated with the bundle that they are added to, in every lowering that it has for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from mt3_export.calibration import SHARE, calibrate
from mt3_export.graph_reading import read_written
from mt3_export.mixed_plan import check_products
from mt3_export.products import products
from mt3_export.qdq import ARITHMETIC, quantize_static
from mt3_export.weights_file import WeightsFile
from mt3_runtime.errors import BundleError
from mt3_runtime.graphs import FEATURES
from mt3_runtime.manifest import GraphFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from mt3_export.mixed_plan import MixedPlan
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.graphs import Precision
    from mt3_runtime.manifest import LoweringName

QDQ: Precision = "qdq"


def write_calibrated(
    folder: Path,
    bundle: Bundle,
    audio: Sequence[Path],
    mixed: MixedPlan | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[GraphFile], str]:
    """Write the graphs of "qdq" into a folder that holds the files of `bundle`.

    Returns:
        The entries of all of them, and in words what they were calibrated with.

    Raises:
        Mt3Error: see `calibrate` and `write_static`.
    """
    if not any((entry.lowering, entry.precision) == ("ort", "fp32") for entry in bundle.manifest.graphs):
        raise BundleError(f"the bundle has no graphs for the CPU in fp32, which {QDQ} is made of: export again")
    found = calibrate(bundle, audio, progress=progress)
    entries: list[GraphFile] = []
    for lowering in ARITHMETIC:
        fp32 = [e for e in bundle.manifest.graphs if (e.lowering, e.precision) == (lowering, "fp32")]
        entries += write_static(folder, fp32, lowering, found.scales, mixed)
    return entries, f"{found.segments} segments, range of {SHARE:.3%} of the numbers"


def write_static(
    folder: Path,
    sources: Sequence[GraphFile],
    lowering: LoweringName,
    scales: Mapping[str, Mapping[str, float]],
    mixed: MixedPlan | None = None,
) -> Iterator[GraphFile]:
    """Write the graphs of one lowering in "qdq", with weights in a file of their own; the entries of all of them.

    Args:
        folder: of the bundle.
        sources: the entries of that lowering in fp32.
        lowering: decides the arithmetic.
        scales: by graph and product, see `quantize_static`.
        mixed: products that stay in fp32.

    Raises:
        BundleError: a graph cannot be used, or weights are not finite.
        OptionError: a graph has no product of a name that is to be kept.
    """
    weights = WeightsFile(folder / f"weights.{QDQ}.{lowering}.bin", "fp32")
    try:
        for source in sources:
            if source.graph == FEATURES:
                yield replace(source, precision=QDQ)
                continue
            model = read_written(folder, source)
            if mixed and lowering == "ort":  # experts are other products in the others
                check_products(mixed, source.graph, products(model.graph))
            keep = mixed.of(source.graph) if mixed else ()
            quantize_static(model, scales.get(source.graph, {}), ARITHMETIC[lowering], keep)
            weights.move(model)
            file = f"{source.graph}.{QDQ}.{lowering}.onnx"
            (folder / file).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
            yield GraphFile(source.graph, lowering, QDQ, file, weights.name)
    finally:
        weights.close()
