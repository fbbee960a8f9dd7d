"""Writes a bundle: traced graphs, shared weights and a manifest, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from itertools import product
from typing import TYPE_CHECKING

import onnx_ir as ir

from mt3_export.bundle_folder import finish, new_folder, records
from mt3_export.features_graph import trace_features
from mt3_export.lowering import LOWERINGS, Cuda, TensorRT
from mt3_export.mixed_plan import plans_by_precision, said
from mt3_export.network import build_modules
from mt3_export.onnx_graph import PREFIX, for_cuda, trace
from mt3_export.precision import PLANS, checked_precisions
from mt3_export.quantize_bundle import write_quantized
from mt3_export.settings import check_name
from mt3_export.state import printable
from mt3_export.weights_file import WeightsFile, stored_weights
from mt3_runtime.errors import BundleError, OptionError
from mt3_runtime.graphs import FEATURES, QUANTIZED, graph_specs
from mt3_runtime.manifest import FORMAT, MANIFEST_LIMIT, VERSION, GraphFile, Manifest, Origin
from mt3_runtime.specs import VocabularySpec
from mt3_runtime.version import __version__
from mt3_runtime.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from mt3_export.checkpoint import Checkpoint
    from mt3_export.lowering import Lowering
    from mt3_export.mixed_plan import MixedPlan
    from mt3_runtime.graphs import GraphSpec, Precision
    from mt3_runtime.manifest import LoweringName, WeightsStorage
    from mt3_runtime.specs import FeatureSpec, ModelSpec

YOURMT3_STEPS = 205  # of a segment of 32,767 samples
HEAD_UNIT = 8  # com.microsoft.GroupQueryAttention refuses other widths when it is run
TOOLS = ("torch", "onnxscript", "onnx_ir")


def export_bundle(
    checkpoint: Checkpoint,
    output: Path,
    *,
    precisions: Sequence[Precision] = ("fp32",),
    weights_storage: WeightsStorage = "fp32",
    notice: str = "",
    plans: Sequence[MixedPlan] = (),
) -> Path:
    """Trace every graph of a checkpoint in every lowering and write the bundle `output`.

    What `plans` keep in fp32 stays so; their precisions are written whether they are listed or not.

    Returns:
        The folder written.

    Raises:
        OutputError: `output` exists, or cannot be written.
        OptionError: `notice` is too long or not one printable line, the weights do not fit fp16, or a plan does not fit
            the model.
        BundleError: a traced graph does not keep its contract, no backend could run it, or the head has tokens that
            the vocabulary has not.
    """
    if checkpoint.model.d_kv % HEAD_UNIT:
        raise BundleError(
            f"heads of width {checkpoint.model.d_kv} are no multiple of {HEAD_UNIT}, as ONNX Runtime asks: "
            "check the number of heads"
        )
    vocabulary = vocabulary_of(checkpoint.model, checkpoint.features)
    check_name(checkpoint.model.name)
    check_notice(notice)
    mixed = plans_by_precision(plans, checkpoint.model.name, graph_specs(checkpoint.model, checkpoint.features))
    with new_folder(output) as folder:
        listed = checked_precisions((*precisions, *mixed))
        graphs = _write_graphs(checkpoint, folder, listed, weights_storage, mixed)
        origin = Origin(
            checkpoint=printable(checkpoint.source),
            checkpoint_sha256=checkpoint.sha256,
            weights_storage=weights_storage,
            exporter=f"mt3-runtime {__version__}",
            tools={name: metadata.version(name) for name in TOOLS} | said(plans),
            notice=notice,
        )
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            model=checkpoint.model,
            features=checkpoint.features,
            vocabulary=vocabulary,
            contracts=_contracts(checkpoint, graphs),
            graphs=graphs,
            files=records(folder.iterdir()),
            origin=origin,
        )
        finish(folder, manifest)
    return output


def check_notice(notice: str) -> None:
    """Raise OptionError for a notice that no manifest can hold, before the work.

    One that is shorter may still be too long beside the rest of a manifest: `finish` knows.
    """
    if not notice.isprintable():
        raise OptionError("the notice holds a line break or a control character: give one line of text")
    size = len(json.dumps(notice))
    if size > MANIFEST_LIMIT:
        raise OptionError(f"the notice takes {size} bytes, a manifest at most {MANIFEST_LIMIT}: shorten the notice")


def vocabulary_of(model: ModelSpec, features: FeatureSpec) -> VocabularySpec:
    """The vocabulary of a model.

    YourMT3 counts steps from the start of a segment: 206 with 0, or as many as fit one of another length
    (`config/config.py`, `max_shift_steps`). Its head has a row for every token, and tells which.

    Raises:
        BundleError: it tells neither.
    """
    if model.family == "mt3":
        return VocabularySpec()
    fitting = int(features.segment_samples / features.sample_rate // 0.01) + 1
    specs = [VocabularySpec(max_shift_steps=steps) for steps in (YOURMT3_STEPS, fitting)]
    sizes = {len(Vocabulary(spec)): spec for spec in specs}
    if model.vocab_size < len(Vocabulary(VocabularySpec(max_shift_steps=1))):
        return specs[0]  # too small for any: nobody will read what it says
    if model.vocab_size not in sizes:
        known = " or ".join(map(str, sizes))
        raise BundleError(f"a head of {model.vocab_size} tokens is none of YourMT3's, {known}: use another checkpoint")
    return sizes[model.vocab_size]


def _write_graphs(
    checkpoint: Checkpoint, folder: Path, precisions: Sequence[Precision], storage: WeightsStorage,
    mixed: Mapping[Precision, MixedPlan],
) -> tuple[GraphFile, ...]:  # fmt: skip
    tensors = stored_weights(checkpoint.tensors, storage)  # rounded before anything is folded, as `verify` does
    rounded = replace(checkpoint, tensors=tensors)
    entries: list[GraphFile] = []
    traced = [precision for precision in precisions if precision not in QUANTIZED]
    for precision in traced:
        written = _lowerings(precision, alone=len(traced) == 1)
        its_storage: WeightsStorage = storage if precision == "fp32" else "fp32"  # halves are stored as they are
        entries += _write_precision(rounded, folder, precision, written, its_storage, mixed.get(precision))
    for precision in QUANTIZED:
        if precision in precisions:
            entries += write_quantized(folder, entries, precision, mixed.get(precision))
    if len(traced) > 1:
        entries += _write_features(checkpoint.features, folder, traced)
    return tuple(entries)


def _contracts(checkpoint: Checkpoint, graphs: Sequence[GraphFile]) -> tuple[GraphSpec, ...]:
    takes_audio = any(entry.graph == FEATURES for entry in graphs)
    return tuple(graph_specs(checkpoint.model, checkpoint.features, takes_audio=takes_audio).values())


def _write_features(features: FeatureSpec, folder: Path, precisions: Sequence[Precision]) -> list[GraphFile]:
    """Write the graph of the features, which is one for all devices and precisions."""
    graph, weights = trace_features(features), WeightsFile(folder / f"weights.{FEATURES}.bin", "fp32")
    try:
        weights.move(graph)
    finally:
        weights.close()
    file = f"{FEATURES}.onnx"
    (folder / file).write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
    lowerings: tuple[LoweringName, ...] = ("tensorrt", "cuda")
    return [
        GraphFile(FEATURES, lowering, precision, file, weights.name)
        for lowering, precision in product(lowerings, precisions)
    ]


def _lowerings(precision: Precision, *, alone: bool) -> dict[LoweringName, Lowering]:
    """Half precision is for devices only; where there is any, CUDA gets fp32 too."""
    plan = PLANS[precision]
    cuda: dict[LoweringName, Lowering] = {"cuda": Cuda(plan)}
    if precision != "fp32":
        return {"tensorrt": TensorRT(plan), **cuda}
    return LOWERINGS if alone else {**LOWERINGS, **cuda}


def _write_precision(
    checkpoint: Checkpoint, folder: Path, precision: Precision, lowerings: Mapping[LoweringName, Lowering],
    storage: WeightsStorage, mixed: MixedPlan | None,
) -> Iterator[GraphFile]:  # fmt: skip
    """Write the graphs of one precision and the file of their weights."""
    specs = graph_specs(checkpoint.model, checkpoint.features)
    weights = WeightsFile(folder / f"weights.{precision}.bin", storage)
    try:
        for lowering, ops in lowerings.items():
            modules = build_modules(checkpoint.model, checkpoint.features, checkpoint.tensors, ops, checkpoint.design)
            for name, spec in specs.items():
                typed = spec.typed(precision)
                graph = trace(modules[name], typed, mixed) if mixed else trace(modules[name], typed)
                if lowering == "cuda":
                    for_cuda(graph)
                weights.move(graph, tables=dict(modules[name].named_buffers(PREFIX)))
                file = f"{name}.{precision}.{lowering}.onnx"
                (folder / file).write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
                yield GraphFile(name, lowering, precision, file, weights.name)
    finally:
        weights.close()
