"""Exports the tiny bundle to the folder named on the command line, as the fixture of the tests does."""

from __future__ import annotations

import sys
from pathlib import Path

from conftest import TINY_FEATURES, TINY_MODEL
from mt3_export.bundle_writer import export_bundle
from mt3_export.checkpoint import Checkpoint
from mt3_export.random_weights import random_tensors

export_bundle(
    Checkpoint(TINY_MODEL, TINY_FEATURES, random_tensors(TINY_MODEL, seed=7), "random:7", None), Path(sys.argv[1])
)
