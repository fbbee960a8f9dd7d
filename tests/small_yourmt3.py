"""A small YourMT3 network: PerceiverTF with experts, three channels."""

from __future__ import annotations

from mt3_export.checkpoint import Checkpoint
from mt3_export.design import PerceiverDesign
from mt3_export.random_yourmt3 import random_yourmt3_tensors
from mt3_export.sizes import Sizes
from mt3_export.yourmt3_layout import Layout, PerceiverSizes
from mt3_runtime.specs import FeatureSpec, ModelSpec


def channel_checkpoint() -> Checkpoint:
    """A small PerceiverTF network with three channels and experts."""
    perceiver = PerceiverSizes(8, 128, 6, 32, 32, 1, 1, 1, 64, 4, 0, 2, "layer")
    layout = Layout(Sizes(32, 32, 48, 1, 2, 596), 40, channels=3, shared=True, perceiver=perceiver)
    spec = ModelSpec("yourmt3", "small", 32, 2, 16, 48, 1, 2, 596, 256, 40, 0, 1, channels=3)
    features = FeatureSpec("yourmt3_spectrum", mel_norm=False, hop_length=2000, bins=1024, segment_samples=32_767)
    design = PerceiverDesign(heads=8, residual=True, chosen=2, norm="layer")
    return Checkpoint(spec, features, random_yourmt3_tensors(layout, 1, 2), "random:1", None, design=design)
