"""Whole clips through a network in training: greedy decoding in torch, many segments side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from demo_model.settings import EVENTS, VOCABULARY
from mt3_export.lowering import Eager
from mt3_export.network import build_modules
from mt3_runtime.features import LogMel
from mt3_runtime.note_decoding import SegmentTokens, tokens_to_notes
from mt3_runtime.segments import iter_segments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.nn import Module

    from demo_model.clips import Clip
    from mt3_export.checkpoint import Checkpoint
    from mt3_runtime.notes import Note
    from mt3_runtime.specs import ModelSpec

ENCODED_AT_ONCE = 16  # segments
LONGEST = 256  # tokens; the longest target is well below


@torch.no_grad()
def transcribe_clips(checkpoint: Checkpoint, clips: Sequence[Clip], longest: int = LONGEST) -> list[list[Note]]:
    """The notes that a network hears in every clip, in canonical order; `longest`: tokens of a segment at most."""
    device = checkpoint.tensors["proj.weight"].device
    built = build_modules(checkpoint.model, checkpoint.features, checkpoint.tensors, Eager())
    modules = {name: module.to(device) for name, module in built.items()}
    log_mel = LogMel(checkpoint.features)
    cut = [list(iter_segments(clip.audio, checkpoint.features, VOCABULARY)) for clip in clips]
    segments = [segment for pieces in cut for segment in pieces]
    features = log_mel(np.stack([segment.samples for segment in segments]), [segment.frames for segment in segments])
    parts = torch.split(torch.from_numpy(features).to(device), ENCODED_AT_ONCE)
    states = torch.cat([modules["encoder"](part)[:, 0] for part in parts])  # [segments, frames, d_model]
    said = iter(decode_greedily(checkpoint.model, modules, states, longest))
    return [
        tokens_to_notes([SegmentTokens(segment.start, next(said)) for segment in pieces], EVENTS)[0] for pieces in cut
    ]


@torch.no_grad()
def decode_greedily(model: ModelSpec, modules: Mapping[str, Module], states: Tensor, longest: int) -> list[list[int]]:
    """Tokens of every row of states [rows, frames, d_model], up to and without the end token."""
    cross = modules["cross_kv"](states)
    empty = states.new_zeros(len(states), model.num_heads, longest, model.d_kv)
    own = tuple(empty for _ in range(2 * model.decoder_layers))
    token = torch.full((len(states),), model.start_token, dtype=torch.int32, device=states.device)
    rows = torch.arange(len(states), device=states.device)  # that are not finished
    said: list[list[int]] = [[] for _ in range(len(states))]
    for position in range(longest):
        places = torch.full_like(token, position)
        token, _, *rest = modules["decode_step"](token, places, *cross, *own)
        own = tuple(rest[: len(own)])
        live = token != model.end_token
        if not live.all():
            rows, token = rows[live], token[live]
            cross, own = (tuple(tensor[live] for tensor in tensors) for tensors in (cross, own))
        for row, value in zip(rows.tolist(), token.tolist(), strict=True):
            said[row].append(value)
        if not len(rows):
            break
    return said
