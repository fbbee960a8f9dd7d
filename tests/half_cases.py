"""A tiny MT3 bundle in every precision, for whoever needs graphs of half precision: see the fixture `half_folder`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from conftest import TINY_FEATURES, TINY_MODEL
from graph_cases import one_thread
from mt3_export.bundle_writer import export_bundle
from mt3_export.checkpoint import Checkpoint
from mt3_export.precision import PLANS
from mt3_export.random_weights import random_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mt3_export.precision import PrecisionPlan
    from mt3_export.reference import Runner
    from mt3_runtime.graphs import Precision

HALF_MODEL = replace(TINY_MODEL, name="tiny-half", encoder_layers=1, decoder_layers=1)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")


def half_checkpoint() -> Checkpoint:
    """What the bundle is made from."""
    return Checkpoint(HALF_MODEL, TINY_FEATURES, random_tensors(HALF_MODEL, seed=7), "random:7", None)


def export_half(folder: Path, precisions: Sequence[Precision] = PRECISIONS) -> Path:
    """The bundle as `folder`/half: read it, never change it."""
    with one_thread():
        return export_bundle(half_checkpoint(), folder / "half", precisions=precisions)


def typed(array: np.ndarray, plan: PrecisionPlan, graph: str) -> torch.Tensor:
    """An input of a graph as a plan has it."""
    tensor = torch.from_numpy(array)
    return tensor if plan.half is None or graph == "encoder" or array.dtype == np.int32 else tensor.to(plan.half)


def emulated(module: torch.nn.Module, graph: str, precision: Precision) -> Runner:
    """A torch module as a function of float32 arrays, in the types of a precision."""

    @torch.inference_mode()
    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        results = module(*(typed(array, PLANS[precision], graph) for array in arrays))
        listed = results if isinstance(results, tuple) else (results,)
        return [tensor.numpy() if tensor.dtype == torch.int32 else tensor.float().numpy() for tensor in listed]

    return run
