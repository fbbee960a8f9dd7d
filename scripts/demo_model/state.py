"""A training run on disk: written whole or not at all, and complete, so that going on is as if it had never stopped."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from demo_model.curriculum import STAGES, Curriculum
from demo_model.losses import auxiliary_tensors
from demo_model.optimiser import Optimiser
from demo_model.settings import FEATURES, SIZES
from mt3_export.state import check_shapes, compare_shapes
from mt3_runtime.errors import CheckpointError, OptionError
from mt3_runtime.files import atomic_write

if TYPE_CHECKING:
    from pathlib import Path

STATE_NAME, LOG_NAME = "state.pt", "log.jsonl"
PRECISIONS = ("bf16", "fp32")
LAST_SEED = 2**64 - 1  # torch takes no larger one, numpy no negative one


@dataclass(frozen=True, slots=True)
class Plan:
    """What decides the outcome of a run. `size` is a key of `SIZES`, `batch` in segments, `precision` of matrices.

    Raises:
        OptionError: a field is out of range.
    """

    seed: int = 0
    size: str = "small"
    steps: int = 6_000
    batch: int = 32
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if type(self.seed) is not int or not 0 <= self.seed <= LAST_SEED:
            raise OptionError(f"{self.seed!r} is no seed: give a whole number from 0 to {LAST_SEED}")
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise OptionError(f"{name} is {value!r}: give a positive whole number")
        for name, known in (("size", tuple(SIZES)), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in known:
                raise OptionError(f"{name} is {value!r}: give {' or '.join(known)}")


@dataclass(slots=True)
class Progress:
    """A run so far.

    `weights` as in `expected_shapes`; `extra`: tensors of the auxiliary losses; `optimiser` as it describes itself;
    `stages`: of batches already asked for; `seconds`: time spent in training.
    """

    plan: Plan
    weights: dict[str, Tensor]
    extra: dict[str, Tensor]
    optimiser: list[dict[str, Any]] | None
    curriculum: Curriculum
    stages: list[int]
    step: int = 0
    seconds: float = 0.0


def save_progress(folder: Path, progress: Progress) -> None:
    """Write the run to `folder`, in place of an earlier state.

    Raises:
        OutputError: it cannot be written; the earlier state is intact.
    """
    stored = {
        "plan": asdict(progress.plan),
        "curriculum": asdict(progress.curriculum),
        **{name: getattr(progress, name) for name in ("optimiser", "stages", "step", "seconds")},
        **{name: {key: t.detach() for key, t in getattr(progress, name).items()} for name in ("weights", "extra")},
    }
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    atomic_write(folder / STATE_NAME, buffer.getvalue())


def load_progress(folder: Path, device: torch.device) -> Progress | None:
    """The run in `folder`, None if there is none yet.

    Raises:
        CheckpointError: there is a state that cannot be read, or that no training leaves.
    """
    path = folder / STATE_NAME
    if not path.exists():
        return None
    try:
        return _read(torch.load(path, map_location=device, weights_only=True))
    except Exception as error:
        raise CheckpointError(f"{path} is no training state of this version: choose another folder") from error


def _read(stored: dict[str, Any]) -> Progress:
    plan, curriculum = stored["plan"], stored["curriculum"]
    for kind, values in ((Progress, stored), (Plan, plan), (Curriculum, curriculum)):
        # Defaults are for new runs: what is missing here has been lost.
        if set(values) != {field.name for field in fields(kind)}:
            raise ValueError(f"a {kind.__name__} of {', '.join(map(str, values))}")
    progress = Progress(**{**stored, "plan": Plan(**plan), "curriculum": Curriculum(**curriculum)})
    _check_place(progress)
    model = SIZES[progress.plan.size]
    check_shapes(model, progress.weights)
    extra = {key: tuple(tensor.shape) for key, tensor in auxiliary_tensors(model, 0).items()}
    compare_shapes(extra, progress.extra, "training")
    if any(tensor.dtype != torch.float32 for tensor in (*progress.weights.values(), *progress.extra.values())):
        raise ValueError("tensors that are not float32")
    if progress.optimiser is None:
        raise ValueError("no optimiser")
    Optimiser(progress.weights, progress.extra).restore(progress.optimiser, progress.step)
    return progress


def _check_place(progress: Progress) -> None:
    """How far the run is: whole steps, known stages, real times and accuracies."""
    curriculum = progress.curriculum
    if type(progress.step) is not int or progress.step < 0:
        raise ValueError(f"step {progress.step!r}")
    if type(progress.stages) is not list:
        raise ValueError(f"stages {progress.stages!r}")
    for stage in (curriculum.stage, *progress.stages):
        if type(stage) is not int or not 0 <= stage < len(STAGES):
            raise ValueError(f"stage {stage!r}")
    for value in (progress.seconds, *curriculum.accuracy.values()):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"a time or an accuracy of {value!r}")


def export_weights(progress: Progress, path: Path) -> None:
    """Write the network as `mt3_export.load_checkpoint` reads it.

    Raises:
        OutputError: the file cannot be written.
    """
    model = SIZES[progress.plan.size]
    metadata = {
        "architecture": "mt3",
        "frontend": FEATURES.frontend,
        "mel_norm": "true" if FEATURES.mel_norm else "false",
        **{name: str(getattr(model, name)) for name in ("num_heads", "d_kv", "position_base", "max_length")},
    }
    tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in progress.weights.items()}
    atomic_write(path, to_safetensors(tensors, metadata))
