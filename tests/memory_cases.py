"""Tiny models that are told of the segment before: their bundles, and the authors' way of decoding, slowly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import torch

from graph_cases import LOWERINGS
from mt3_export import bundle_writer
from mt3_export.checkpoint import Checkpoint
from mt3_export.onnx_graph import PREFIX, trace
from mt3_export.random_weights import random_tensors
from mt3_runtime.specs import FeatureSpec, MemorySpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mt3_runtime.backends import Backend
    from mt3_runtime.graphs import GraphSpec
    from mt3_runtime.specs import ModelSpec
    from t5_numpy import NumpyT5

TIE, END, SPAN = 1134, 1, 1024
SOME_END = -1.2  # the negative, as what the head sees changes little from token to token, and has a mean
CONTEXT = MemorySpec("context", 32, SPAN, 0, (TIE, END))
PREFIX_MEMORY = MemorySpec("prefix", 32, SPAN, 0, (END,))


def memory_checkpoint(model: ModelSpec, memory: MemorySpec | None, end_row: float = 1.0, seed: int = 7) -> Checkpoint:
    """Random weights, the same for every kind of memory.

    `end_row`: what the end token's row of the head is multiplied by. Among random weights that token hardly ever comes
    out on top; with `SOME_END` it sometimes does.
    """
    model = replace(model, memory=memory)
    tensors = random_tensors(model, seed)
    head = tensors["lm_head.weight"].clone()
    head[END] *= end_row
    features = FeatureSpec("ddsp", mel_norm=False)
    return Checkpoint(model, features, tensors | {"lm_head.weight": head}, f"random:{seed}", None)


def export_with(
    checkpoint: Checkpoint,
    output: Path,
    stored: Mapping[str, Path],
    lowerings: Sequence[str] = LOWERINGS,
    **options: str,
) -> Path:
    """`export_bundle`, but that graphs are taken from bundles in `stored`, by name, and given the weights of this one.

    It writes what `export_bundle` writes, to the byte, if shapes other than those of weights are the same.
    """

    def traced(module: torch.nn.Module, spec: GraphSpec) -> ir.Model:
        if spec.name not in stored:
            return trace(module, spec)
        lowering = module.ops.name if hasattr(module, "ops") else "ort"  # cross_kv is the same in both
        return _with_weights(stored[spec.name] / f"{spec.name}.fp32.{lowering}.onnx", module)

    written = {name: ops for name, ops in bundle_writer.LOWERINGS.items() if name in lowerings}
    with mock.patch.multiple(bundle_writer, trace=traced, LOWERINGS=written):
        return bundle_writer.export_bundle(checkpoint, output, **options)


def _with_weights(path: Path, module: torch.nn.Module) -> ir.Model:
    model = ir.from_proto(onnx.load(path))
    weights = {**dict(module.named_parameters(PREFIX)), **dict(module.named_buffers(PREFIX))}
    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = ir.tensor(weights[name].detach().numpy(), name=name)
            value.shape = value.const_value.shape
    return model


# ---- what the authors' network said once ---------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden" / "mr_mt3.npz"
GOLDEN_LENGTHS = (4, 1, 6, 3, 2, 5)  # tokens of each segment, the end token among them
DESIGNS = {
    "T5SegMemV2WithPrev": CONTEXT,
    "T5SegMemV2": replace(CONTEXT, first_tokens=(END,)),
    "T5SegMem": PREFIX_MEMORY,
}


def golden_checkpoint(model: ModelSpec, name: str, end_row: np.ndarray | None = None) -> Checkpoint:
    """A tiny network of one design, with positions as the authors have them and any row of the end token."""
    checkpoint = memory_checkpoint(replace(model, position_base=256), DESIGNS[name])
    if end_row is None:
        return checkpoint
    head = checkpoint.tensors["lm_head.weight"].clone().numpy()
    head[END] = end_row
    return replace(checkpoint, tensors={**checkpoint.tensors, "lm_head.weight": torch.from_numpy(head)})


def log_mel_song(segments: int) -> np.ndarray:
    """Frames as smooth in time as log-mel, of its range [segments, 256, 512], the same bits everywhere."""
    words = np.random.PCG64(41).random_raw(segments * 256 * 512) >> np.uint64(40)
    noise = words.astype(np.float64).reshape(segments, 256, 512) / 2**24 - 0.5
    return (np.cumsum(noise, axis=1) - 4).astype(np.float32)


# ---- as the authors decode ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Song:
    """Tokens of every segment without start, `gap`: the smallest from a best logit to the second."""

    tokens: list[list[int]]
    gap: float = np.inf


def told_after(memory: MemorySpec, tokens: Sequence[int] | None) -> np.ndarray:
    """What a segment reads of the one before it, whose tokens are given without start; None before the first."""
    ids = list(memory.first_tokens) if tokens is None else [0, *tokens]
    return np.array((ids + [memory.fill_token] * memory.span)[: memory.span], np.int32)


def tell_last(memory: MemorySpec, song: list[list[int]]) -> np.ndarray:
    return told_after(memory, song[-1] if song else None)


def sources(network: NumpyT5, states: np.ndarray, told: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """What cross-attention sees of a segment with states [frames, d_model], and what stands before its tokens."""
    memory = network.model.memory
    if memory is None or told is None:
        return states, None
    vectors = network.remember(told.tolist())[: memory.length]
    return (np.concatenate([states, vectors]), None) if memory.injection == "context" else (states, vectors)


def decode_slowly(network: NumpyT5, states: np.ndarray, limit: int) -> Song:
    """Segment by segment, with everything computed again for every token: states [segments, frames, d_model]."""
    song, tokens = Song([]), None
    memory = network.model.memory
    for segment in states:
        context, before = sources(network, segment, told_after(memory, tokens) if memory else None)
        tokens = []
        while len(tokens) < limit and END not in tokens:
            logits = network.decode([0, *tokens], context, before)[-1]
            song.gap = min(song.gap, float(np.diff(np.sort(logits)[-2:])[0]))
            tokens.append(int(logits.argmax()))
        song.tokens.append(tokens)
    return song


def decode_on(
    backend: Backend,
    memory: MemorySpec | None,
    states: np.ndarray,
    limit: int,
    tell: Callable[[MemorySpec, list[list[int]]], np.ndarray] = tell_last,
) -> list[list[int]]:
    """The same on a backend, by `admit` and `step` alone; `tell` gives what a segment reads after those before it."""
    song: list[list[int]] = []
    for segment in states.astype(np.float32):
        backend.admit(0, segment[None], tell(memory, song)[None] if memory else None)
        song.append(follow(backend, limit))
    return song


def follow(backend: Backend, limit: int) -> list[int]:
    """Tokens of the row in slot 0, from its start to its end."""
    tokens: list[int] = []
    while len(tokens) < limit and END not in tokens:
        read = np.array([tokens[-1] if tokens else 0], np.int32)
        tokens.append(int(backend.step(read, np.array([len(tokens)], np.int32))[0][0]))
    return tokens
