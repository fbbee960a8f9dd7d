"""A tiny bundle of random weights, exported once a session, and the network it was made from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from bundle_cases import seal
from memory_cases import CONTEXT, PREFIX_MEMORY, export_with, memory_checkpoint
from mt3_export.bundle_writer import export_bundle
from mt3_export.checkpoint import Checkpoint
from mt3_export.random_weights import random_tensors
from mt3_runtime.bundle import open_bundle
from mt3_runtime.graphs import graph_specs
from mt3_runtime.specs import FeatureSpec, ModelSpec, VocabularySpec

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


@pytest.fixture(scope="session")
def half_folder(tmp_path_factory):
    """Folder of a bundle in fp32, fp16 and bf16, see `half_cases`: read it, never change it."""
    from half_cases import export_half  # noqa: PLC0415 -- it needs this module

    return export_half(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def musical_folder(tiny_folder, tmp_path_factory):
    """The tiny bundle with a vocabulary in which random tokens make notes: few shifts, drums where arg-max often is."""
    folder = tmp_path_factory.mktemp("bundles") / "musical"
    shutil.copytree(tiny_folder, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["vocabulary"] |= {"max_shift_steps": 10, "velocity_bins": 718}
    (folder / "manifest.json").write_bytes(seal(manifest))
    return folder


@pytest.fixture(scope="session")
def context_checkpoint():
    """The tiny network with a memory behind its encoder states."""
    return memory_checkpoint(TINY_MODEL, CONTEXT)


@pytest.fixture(scope="session")
def context_folder(tiny_folder, context_checkpoint, tmp_path_factory):
    return export_with(context_checkpoint, tmp_path_factory.mktemp("bundles") / "context", {"encoder": tiny_folder})


@pytest.fixture(scope="session")
def context_bundle(context_folder):
    return open_bundle(context_folder)


@pytest.fixture(scope="session")
def prefix_checkpoint():
    """The tiny network with a memory before its tokens."""
    return memory_checkpoint(TINY_MODEL, PREFIX_MEMORY)


@pytest.fixture(scope="session")
def prefix_folder(tiny_folder, context_folder, prefix_checkpoint, tmp_path_factory):
    stored = {"memory": context_folder} | dict.fromkeys(("encoder", "cross_kv", "decode_step"), tiny_folder)
    return export_with(prefix_checkpoint, tmp_path_factory.mktemp("bundles") / "prefix", stored)


@pytest.fixture(scope="session")
def prefix_bundle(prefix_folder):
    return open_bundle(prefix_folder)


@pytest.fixture(scope="session")
def channels_bundle(tiny_bundle):
    """What a scripted backend needs of a YourMT3 model with three channels: the manifest, and no graph of its own."""
    manifest = tiny_bundle.manifest
    model = replace(manifest.model, family="yourmt3", name="tiny-channels", channels=3, vocab_size=596)
    features = FeatureSpec("yourmt3_spectrum", mel_norm=False, hop_length=300, bins=1024, segment_samples=32_767)
    contracts = tuple(graph_specs(model, features).values())
    vocabulary = VocabularySpec(max_shift_steps=205)
    return replace(
        tiny_bundle,
        manifest=replace(manifest, model=model, features=features, vocabulary=vocabulary, contracts=contracts),
    )


@pytest.fixture(scope="session")
def audio(tmp_path_factory):
    """A file with three seconds of noise: read it, never change it."""
    path = tmp_path_factory.mktemp("audio") / "a.flac"
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, 3 * 16_000), 16_000)
    return path


@pytest.fixture
def trusted_names():
    """Whatever a test does with a file, torch trusts no more names afterwards than before."""
    before = set(torch.serialization.get_safe_globals())
    yield
    assert set(torch.serialization.get_safe_globals()) == before
