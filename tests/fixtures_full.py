"""A bundle of full size, exported once a session and deleted at its end; use with `pytest_plugins`."""

from __future__ import annotations

import shutil

import pytest

from mt3_export.bundle_writer import export_bundle
from mt3_export.checkpoint import load_checkpoint


@pytest.fixture(scope="session")
def full_checkpoint():
    """Random weights of full size, position_base 256; with this seed the parity data hold no near-tie."""
    return load_checkpoint("random:4", position_base=256)


@pytest.fixture(scope="session")
def full_folder(full_checkpoint, tmp_path_factory):
    """Folder of the full-size bundle, 200 MB, made in half a minute: read it, never change it."""
    folder = export_bundle(full_checkpoint, tmp_path_factory.mktemp("full") / "full")
    yield folder
    shutil.rmtree(folder)
