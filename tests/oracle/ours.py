"""Our side of the comparison: encoder states and forced decode steps, from the graphs and from the torch modules."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from mt3_export.lowering import Eager
from mt3_export.network import build_modules
from mt3_runtime.backends.ort import LOWERING, open_session
from mt3_runtime.bundle import open_bundle
from mt3_runtime.graphs import GRAPH_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mt3_export.checkpoint import Checkpoint
    from mt3_export.lowering import Lowering
    from oracle.authors import Answer

NEAR_TIE = 1e-4  # between the best two logits, whose standard deviation is about 1
UNWRITTEN = 1e4  # fills the cache, so that a step that reads ahead shows


def open_graphs(folder: Path) -> Callable[..., list[np.ndarray]]:
    """A function of a graph's name and its inputs, in order, that gives its outputs."""
    bundle = open_bundle(folder)
    specs = {spec.name: spec for spec in bundle.manifest.contracts}
    entries = {name: bundle.graph(name, LOWERING, "fp32") for name in GRAPH_NAMES}
    sessions = {name: open_session(bundle, entry, threads=2) for name, entry in entries.items()}

    def call(name: str, *inputs: np.ndarray) -> list[np.ndarray]:
        return sessions[name].run(specs[name].output_names, dict(zip(specs[name].input_names, inputs, strict=True)))

    return call


def run_graphs(folder: Path, features: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States [segments, frames, d_model] and logits [steps, segments, vocab] when each step is fed `tokens`."""
    call = open_graphs(folder)
    states = call("encoder", features)[0][:, 0]
    cross = call("cross_kv", states)
    rows, heads, _, width = cross[0].shape
    cache = [np.full((rows, heads, len(tokens), width), UNWRITTEN, np.float32) for _ in cross]
    logits = []
    for step, token in enumerate(shifted(tokens)):
        position = np.full(rows, step, np.int32)
        chosen, _, *cache, found = call("decode_step", token, position, *cross, *cache)
        assert (chosen == found.argmax(-1)).all()
        logits.append(found)
    return states, np.stack(logits)


@torch.inference_mode()
def run_modules(
    checkpoint: Checkpoint, features: np.ndarray, tokens: np.ndarray, ops: Lowering | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `run_graphs`, from the torch modules in plain float32."""
    modules = build_modules(checkpoint.model, checkpoint.features, checkpoint.tensors, ops or Eager())
    states = modules["encoder"](torch.from_numpy(features))[:, 0]
    cross = modules["cross_kv"](states)
    rows, heads, _, width = cross[0].shape
    cache = [torch.full((rows, heads, len(tokens), width), UNWRITTEN) for _ in cross]
    logits = []
    for step, token in enumerate(torch.from_numpy(shifted(tokens))):
        position = torch.full((rows,), step, dtype=torch.int32)
        _, _, *cache, found = modules["decode_step"](token, position, *cross, *cache)
        logits.append(found.numpy())
    return states.numpy(), np.stack(logits)


def shifted(tokens: np.ndarray) -> np.ndarray:
    """What each step reads: the start token 0, then the choice of the step before. [steps, segments] int32."""
    return np.concatenate((np.zeros_like(tokens[:1]), tokens[:-1])).astype(np.int32)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Norm of the difference over norm of `wanted`, along the last axis."""
    difference = found.astype(np.float64) - wanted
    return np.linalg.norm(difference, axis=-1) / np.linalg.norm(wanted.astype(np.float64), axis=-1)


def state_errors(states: np.ndarray, answer: Answer) -> np.ndarray:
    """Relative error of every segment's states: [segments]."""
    assert states.shape == answer.states.shape
    return relative_error(states.reshape(len(states), -1), answer.states.reshape(len(states), -1))


def step_errors(logits: np.ndarray, answer: Answer) -> np.ndarray:
    """Relative error of the logits of every step and segment: [steps, segments]."""
    return relative_error(_kept(logits, answer), answer.logits)


def equal_tokens(logits: np.ndarray, answer: Answer) -> int:
    """How many arg-max tokens are the authors' own; any other fails, but for near-ties, each of which is warned of."""
    differ = logits.argmax(-1) != answer.tokens
    for step, segment in np.argwhere(differ):
        gap = answer.gaps[step, segment]
        what = f"step {step}, segment {segment}: another token, the authors' best two logits are {gap:.1e} apart"
        assert gap <= NEAR_TIE, what
        warnings.warn(f"near-tie at {what}", stacklevel=2)
    return int(np.count_nonzero(~differ))


def _kept(logits: np.ndarray, answer: Answer) -> np.ndarray:
    """The logits that `answer` holds: [steps, segments, kept]."""
    return np.take_along_axis(logits, answer.columns[:, None].astype(np.int64), axis=-1)
