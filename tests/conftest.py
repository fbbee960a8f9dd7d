"""A tiny bundle of random weights, exported once a session, and the network it was made from."""

from __future__ import annotations

import pytest

from mt3_export.bundle_writer import export_bundle
from mt3_export.checkpoint import Checkpoint
from mt3_export.random_weights import random_tensors
from mt3_runtime.bundle import open_bundle
from mt3_runtime.specs import FeatureSpec, ModelSpec

TINY_MODEL = ModelSpec(
    family="mt3",
    name="tiny",
    d_model=32,
    num_heads=2,
    d_kv=16,
    d_ff=48,
    encoder_layers=2,
    decoder_layers=2,
    vocab_size=1536,
    position_base=255,
    max_length=96,
    start_token=0,
    end_token=1,
)
TINY_FEATURES = FeatureSpec("ddsp", mel_norm=False)


@pytest.fixture(scope="session")
def tiny_checkpoint():
    tensors = random_tensors(TINY_MODEL, seed=7)
    return Checkpoint(TINY_MODEL, TINY_FEATURES, tensors, "random:7", None)


@pytest.fixture(scope="session")
def tiny_folder(tiny_checkpoint, tmp_path_factory):
    """Folder of the tiny bundle: read it, never change it."""
    return export_bundle(tiny_checkpoint, tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder):
    return open_bundle(tiny_folder)
