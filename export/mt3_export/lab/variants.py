"""What the lab compares: precisions by name, and bundles in which all or some products are in one of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import onnx_ir as ir

from mt3_export.bundle_folder import finish, new_folder, records
from mt3_export.graph_reading import read_graph
from mt3_export.lab.emulation import LIMITS, TYPES, emulate, halved
from mt3_export.qdq import ARITHMETIC, quantize_static
from mt3_export.quantized import STATIC, form_of, quantizable, quantize
from mt3_export.weights_file import WeightsFile
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import OptionError
from mt3_runtime.graphs import FEATURES, QUANTIZED

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence
    from pathlib import Path

    from mt3_export.lab.emulation import Half
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.graphs import Precision
    from mt3_runtime.manifest import GraphFile, LoweringName

LOWERING: LoweringName = "ort"
DECODER = ("memory", "cross_kv", "prefix", "decode_step")


@dataclass(frozen=True, slots=True)
class Variant:
    """A precision as the lab names it; `graphs`: those that it changes, None for what the precision does."""

    name: str
    precision: Precision
    graphs: tuple[str, ...] | None = None

    @property
    def is_half(self) -> bool:
        """Whether it is of half precision, which a CPU emulates."""
        return self.precision in TYPES

    @property
    def limit(self) -> float | None:
        """The largest number of the type that products are rounded to; None where scales follow the numbers."""
        return LIMITS.get(self.precision)

    def changes(self, graph: str) -> bool:
        """Whether it changes anything in a graph."""
        if self.graphs is not None and graph not in self.graphs:
            return False
        return self.is_half or form_of(self.precision, graph) is not None


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("fp32", "fp32"),
        Variant("fp16", "fp16"),
        Variant("bf16", "bf16"),
        Variant("int8", "int8"),
        Variant("int8-encoder", "int8", ("encoder",)),
        Variant("int8-decoder", "int8", DECODER),
        *(Variant(name, name) for name in QUANTIZED if name != "int8"),
    )
}


def parse_variants(listed: Iterable[str]) -> tuple[Variant, ...]:
    """Every one once, fp32 first: the others are compared with it.

    Raises:
        OptionError: one is unknown.
    """
    given = list(dict.fromkeys(name.strip() for name in listed))
    for name in given:
        if name not in VARIANTS:
            raise OptionError(f"unknown precision {name!r:.40}: use {', '.join(VARIANTS)}, or some of them with commas")
    return tuple(VARIANTS[name] for name in dict.fromkeys(["fp32", *given]))


def changed_products(bundle: Bundle, variant: Variant) -> list[tuple[str, str]]:
    """Every product that a variant changes, as graph and name, in the order of the data flow."""
    found = []
    for entry in _originals(bundle):
        if variant.changes(entry.graph):
            graph = read_graph(bundle, entry).graph
            found += [(entry.graph, name) for name in (halved(graph) if variant.is_half else quantizable(graph))]
    return found


def write_variant(
    bundle: Bundle,
    variant: Variant,
    output: Path,
    keep: Mapping[str, Container[str]],
    scales: Mapping[str, Mapping[str, float]] | None = None,
) -> Bundle:
    """Write a bundle for the CPU with the products of a variant, but for those of `keep`, by graph.

    Graphs that are not changed stay fp32's. Weights that the bundle holds in that precision are used as they are. The
    graphs of an emulated half are listed as fp32's: they are such by their types. `scales`: by graph and product, for
    qdq, see `mt3_export.calibration`.

    Raises:
        BundleError: a file is not what the manifest lists, or there are no graphs for the CPU in fp32.
        OutputError: `output` exists, or cannot be written.
    """
    label: Precision = "fp32" if variant.is_half else variant.precision
    with new_folder(output) as folder:
        originals = _originals(bundle)
        for weights in {entry.weights for entry in originals}:
            shutil.copyfile(bundle.verify(weights), folder / weights)
        quantized = WeightsFile(folder / "weights.changed.bin", "fp32")
        try:
            writer = _Writer(bundle, variant, folder, quantized, keep, scales or {})
            entries = [writer.write(replace(entry, precision=label)) for entry in originals]
        finally:
            quantized.close()
        used = {name for entry in entries for name in (entry.file, entry.weights)}
        for path in [path for path in folder.iterdir() if path.name not in used]:
            path.unlink()
        finish(folder, replace(bundle.manifest, graphs=tuple(entries), files=records(folder.iterdir())))
    return open_bundle(output)


def _originals(bundle: Bundle) -> Sequence[GraphFile]:
    graphs = [spec.name for spec in bundle.manifest.contracts if spec.name != FEATURES]
    return [bundle.graph(name, LOWERING, "fp32") for name in graphs]


@dataclass(frozen=True, slots=True)
class _Writer:
    bundle: Bundle
    variant: Variant
    folder: Path
    weights: WeightsFile
    keep: Mapping[str, Container[str]]
    scales: Mapping[str, Mapping[str, float]]

    def write(self, entry: GraphFile) -> GraphFile:
        """Write what becomes of a graph of fp32; `entry` has the label of its new precision."""
        graph = entry.graph
        if not self.variant.changes(graph):
            (self.folder / entry.file).write_bytes(self.bundle.read(entry.file))
            return entry
        model = read_graph(self.bundle, entry)
        if self.variant.is_half:
            emulate(model, cast("Half", self.variant.precision), self.keep.get(graph, ()))
            changed = replace(entry, file=f"{graph}.{self.variant.precision}.emulated.onnx")
        else:
            self._quantize(model, graph)
            self.weights.move(model)
            changed = replace(
                entry, file=f"{graph}.{self.variant.precision}.{LOWERING}.onnx", weights=self.weights.name
            )
        (self.folder / changed.file).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        return changed

    def _quantize(self, model: ir.Model, graph: str) -> None:
        form, keep = form_of(self.variant.precision, graph), self.keep.get(graph, ())
        if form == STATIC:
            quantize_static(model, self.scales.get(graph, {}), ARITHMETIC[LOWERING], keep)
        elif form is not None:
            quantize(model, form, keep)
        self._use_own(model, graph)

    def _use_own(self, model: ir.Model, graph: str) -> None:
        """Take the numbers that the bundle has for that precision: they are what is to be judged."""
        for entry in self.bundle.manifest.graphs:
            if (entry.graph, entry.lowering, entry.precision) != (graph, LOWERING, self.variant.precision):
                continue
            self.bundle.verify(entry.weights)
            own = read_graph(self.bundle, entry).graph.initializers
            for name, value in model.graph.initializers.items():
                mine, theirs = value.const_value, own[name].const_value if name in own else None
                if mine is not None and theirs is not None and (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype):
                    value.const_value = theirs
