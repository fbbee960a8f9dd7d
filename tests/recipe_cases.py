"""A tiny bundle for every recipe but MT3's, in fp16 and for TensorRT alone, so that it is made quickly."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest import mock

import onnx
import onnx_ir as ir

from conftest import TINY_MODEL
from graph_cases import one_thread
from half_cases import HALF_MODEL
from memory_cases import CONTEXT, PREFIX_MEMORY, memory_checkpoint
from mt3_export import bundle_writer
from mt3_export.checkpoint import Checkpoint
from mt3_export.design import PerceiverDesign
from mt3_export.lowering import TensorRT
from mt3_export.onnx_graph import trace
from mt3_export.precision import PLANS
from mt3_export.random_yourmt3 import random_yourmt3_tensors
from mt3_export.sizes import Sizes
from mt3_export.yourmt3_layout import Layout, PerceiverSizes
from mt3_runtime.bundle import Bundle, open_bundle
from mt3_runtime.specs import FeatureSpec, ModelSpec

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from mt3_runtime.graphs import GraphSpec

SPECTRUM = FeatureSpec("yourmt3_spectrum", mel_norm=False, hop_length=2000, bins=1024, segment_samples=32_767)
MEL = FeatureSpec("yourmt3_mel", mel_norm=False, hop_length=2000, f_min=50.0, f_max=8000.0, segment_samples=32_767)
PRECISION = "fp16"
FRAMES = 17  # of such a segment


def checkpoint_for(recipe: str) -> Checkpoint:
    """A tiny network of the kind that a recipe is for, if that is not MT3's."""
    if recipe == "mr-mt3":
        return memory_checkpoint(HALF_MODEL, CONTEXT)
    if recipe == "mr-mt3-v1":
        return memory_checkpoint(TINY_MODEL, PREFIX_MEMORY)  # with one layer it would attend to nothing
    if recipe == "ymt3plus":
        layout = Layout(Sizes(512, 32, 48, 1, 2, 596), 40)
        return _yourmt3("ymt3plus-tiny", layout, MEL, None)
    channels = 1 if recipe == "yptf-single" else 3
    experts = 4 if "moe" in recipe else 0
    positions, frequencies = (0, 2) if experts else (FRAMES, 0)
    perceiver = PerceiverSizes(8, 128, 6, 32, 32, 1, 1, 1, 64, experts, positions, frequencies, "layer")
    layout = Layout(Sizes(32, 32, 48, 1, 2, 596), 40, channels=channels, shared=channels > 1, perceiver=perceiver)
    design = PerceiverDesign(heads=8, residual=bool(experts), chosen=2 if experts else 0, norm="layer")
    return _yourmt3(f"{recipe}-tiny", layout, SPECTRUM, design)


def _yourmt3(name: str, layout: Layout, features: FeatureSpec, design: PerceiverDesign | None) -> Checkpoint:
    width = layout.sizes.d_model
    model = ModelSpec("yourmt3", name, width, 2, 16, 48, 1, 2, 596, 256, 40, 0, 1, channels=layout.channels)
    return Checkpoint(model, features, random_yourmt3_tensors(layout, 1, 2), "random:1", None, design=design)


class Exporter:
    """Exports tiny bundles in fp16, tracing nothing again that only differs in its weights.

    `mt3`: that of MT3, whose graphs serve others too.
    """

    def __init__(self, folder: Path, mt3: Bundle) -> None:
        self._folder = folder
        self._bundles = {"mt3": mt3}
        self._traced: dict[tuple[GraphSpec, str], onnx.ModelProto] = {}
        for spec in mt3.manifest.contracts:
            file = mt3.verify(mt3.graph(spec.name, "tensorrt", PRECISION).file)
            self._traced[spec.typed(PRECISION), ""] = onnx.load(file)

    def __call__(self, recipe: str) -> Bundle:
        """The bundle of a recipe."""
        if recipe not in self._bundles:
            self._bundles[recipe] = self._export(recipe)
        return self._bundles[recipe]

    def _export(self, recipe: str) -> Bundle:
        checkpoint = checkpoint_for(recipe)
        kind = recipe if recipe.startswith("y") else ""

        def traced(module: torch.nn.Module, spec: GraphSpec) -> ir.Model:
            place = (spec, kind if spec.name == "encoder" else "")
            if place not in self._traced:
                self._traced[place] = ir.to_proto(trace(module, spec))
            return ir.from_proto(self._traced[place])

        with (
            one_thread(),
            mock.patch.multiple(
                bundle_writer,
                trace=traced,
                checked_precisions=lambda _: (PRECISION,),
                _lowerings=lambda *_, **__: {"tensorrt": TensorRT(PLANS[PRECISION])},
            ),
        ):
            return open_bundle(bundle_writer.export_bundle(checkpoint, self._folder / recipe))
