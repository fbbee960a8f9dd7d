"""Weights to start from: random where much is to be learned, arranged where the answer is known.

What is arranged is the order of reading, the slow part of learning: the first encoder layers look at neighbouring
frames and take the change of level in frequency bands; the last one looks ahead for the next event and notes its time;
the decoder remembers the time of its last shift token and looks at the frame of that time. All of it stays free to
change.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from demo_model.blueprint import Blueprint, draw
from demo_model.registers import codes
from demo_model.settings import PROGRAM_IDS, SHIFTS, TIE, VELOCITY_IDS, frame_of
from mt3_runtime.vocabulary import END_TOKEN

if TYPE_CHECKING:
    from mt3_runtime.specs import ModelSpec

NEIGHBOURS = ((-16, -8, -3, 8), (-5, -2, 2, 5))  # frames, by encoder layer and head
CHANGES = (-8, -16)  # frames over which the change of the first and of the second set of bands is taken
SHARP, NEAR, FLAG = 22.0, 25.0, 42.0  # attention scores: of the very frame, of the latest, of the right kind
CODE = 2.0  # amplitude of time codes in token embeddings
CONSTANT, KIND = 2.0, 3.0  # of the dimensions that all tokens share, and that tokens of one kind share
SPOKEN = 0.35  # amplitude of time codes in output rows
NOTED = 1.5  # amplitude at which the encoder notes the next event
INPUT = 1.2  # root mean square of the projected input, per dimension
QUIETER, LOUDER = 0.7, 1.1  # what norms make of the encoder's and of the decoder's residual stream at first


def initial_weights(model: ModelSpec, frames: Tensor, seed: int) -> dict[str, Tensor]:
    """Float32 tensors of every key of `expected_shapes`.

    frames: [frames, bins], log-mel frames of the training music, whose statistics scale the input projection.
    """
    generator = torch.Generator().manual_seed(seed)
    plan = draw(model, generator)
    _project_input(plan, frames.double(), generator)
    for layer, offsets in enumerate(NEIGHBOURS[: model.encoder_layers - 1]):
        _look_around(plan, layer, offsets)
    _look_ahead(plan)
    _embed(plan)
    _remember(plan)
    _read(plan)
    return plan.tensors


def _project_input(plan: Blueprint, frames: Tensor, generator: torch.Generator) -> None:
    """Into every dimension that holds neither position nor time: band levels, and decorrelated inputs.

    The mean spectrum is taken out of both, and all dimensions have the same power, so that no input drowns another.
    """
    registers, matrix = plan.registers, plan.tensors["proj.weight"]
    bands = torch.cat(registers.bands)
    places = torch.cat((registers.free, registers.now))
    places = places[~torch.isin(places, bands)]
    mean = frames.mean(0)
    centred = frames - mean
    powers, axes = torch.linalg.eigh(centred.T @ centred / len(frames))
    powers, axes = powers.flip(0)[: len(places)], axes.flip(1)[:, : len(places)]
    whitened = axes.T / (powers + powers[len(places) // 2])[:, None].sqrt()  # [places, bins]
    mixing = torch.linalg.qr(torch.randn(len(places), len(places), generator=generator).double())[0]
    centres = torch.linspace(0, frames.shape[1] - 1, len(bands) // 2 + 2).double()
    distance = (torch.arange(frames.shape[1]) - centres[1:-1, None]).abs()
    triangles = (1.0 - distance / centres[1]).clamp(min=0.0)  # [bands, bins]
    for target, rows in ((places, mixing @ whitened), (bands, triangles.repeat(2, 1))):
        flat = rows - torch.outer(rows @ mean, mean) / mean.square().sum()
        level = (centred @ flat.T).square().mean().sqrt()
        matrix[target] = (INPUT / level * flat).float()


def _look_around(plan: Blueprint, layer: int, offsets: tuple[int, ...]) -> None:
    """Each head of an early encoder layer looks at a neighbour; two of the first layer take changes of level."""
    block = f"encoder.block.{layer}.layer.0.SelfAttention"
    for head, offset in enumerate(offsets[: plan.model.num_heads]):
        plan.look_at_place(block, head, offset * plan.registers.frequencies, SHARP, QUIETER)
        if offset in CHANGES:
            pick = plan.pick(plan.registers.bands[CHANGES.index(offset)])
            plan.head(f"{block}.v", head)[: len(pick)] = pick
            plan.head(f"{block}.o", head)[: len(pick)] = -INPUT * pick


def _look_ahead(plan: Blueprint) -> None:
    """The first head of the last encoder layer prefers frames soon after the query's and writes down which it sees.

    Turned by a quarter of pi, a sum over many frequencies falls with the logarithm of the distance, and falls at
    once on the other side. Which frames are events is for training to find.
    """
    registers = plan.registers
    block = f"encoder.block.{plan.model.encoder_layers - 1}.layer.0.SelfAttention"
    plan.look_at_place(block, 0, math.pi / 4 + 4.0 * registers.frequencies, NEAR, QUIETER, slope=-0.5)
    # The sinusoid's slowest cosines are a constant that the query can ask with.
    plan.head(f"{block}.q", 0)[-1, registers.now] = 2.0 / len(registers.now)
    plan.head(f"{block}.k", 0)[-1] = plan.tensors["lm_head.weight"][VELOCITY_IDS[1]]
    plan.head(f"{block}.v", 0).copy_(plan.pick(registers.place))
    plan.head(f"{block}.o", 0).copy_(NOTED / QUIETER * plan.pick(registers.then))


def _embed(plan: Blueprint) -> None:
    """Shift, tie and start tokens carry the code of their frame; kinds of tokens that hold a state are marked."""
    model, registers = plan.model, plan.registers
    embedding, rows = plan.tensors["decoder_embed_tokens.weight"], plan.tensors["lm_head.weight"]
    half = model.d_model // 2
    for register in (registers.place, registers.now, registers.then):
        embedding[:, register] = 0.0
        rows[:, register] = 0.0
    for register in (registers.now, registers.then):
        embedding[:, register[register >= half]] = -1.0  # the slow cosines of the sinusoid, taken out again
    codes_of_shifts = codes(model, registers, torch.tensor([frame_of(steps) for steps in range(len(SHIFTS))]))
    embedding[torch.tensor(SHIFTS)[:, None], registers.now] += CODE * codes_of_shifts
    embedding[torch.tensor((TIE, model.start_token))[:, None], registers.now] += CODE * codes_of_shifts[0]
    embedding[:, registers.free[:4]] = 0.0
    embedding[:, registers.free[0]] = CONSTANT
    for place, tokens in enumerate(((*SHIFTS, TIE, model.start_token), VELOCITY_IDS, PROGRAM_IDS), start=1):
        embedding[torch.tensor(tokens), registers.free[place]] = KIND
    rows[torch.tensor(SHIFTS)[:, None], registers.then] = SPOKEN * codes_of_shifts
    rows[END_TOKEN, registers.then] = SPOKEN * codes_of_shifts[0]


def _remember(plan: Blueprint) -> None:
    """Three heads of the decoder's first layer look at the latest token of a kind; the first copies its time."""
    registers = plan.registers
    block = "decoder.block.0.layer.0.SelfAttention"
    for head in range(3):
        plan.look_at_place(block, head, torch.zeros_like(registers.frequencies), NEAR, LOUDER, slope=-0.5)
        weight = math.sqrt(FLAG / (CONSTANT * KIND)) / LOUDER
        plan.head(f"{block}.q", head)[-1, registers.free[0]] = weight
        plan.head(f"{block}.k", head)[-1, registers.free[1 + head]] = weight
    plan.head(f"{block}.v", 0).copy_(plan.pick(registers.now))
    plan.head(f"{block}.o", 0).copy_(plan.pick(registers.now))


def _read(plan: Blueprint) -> None:
    """Heads of the decoder's cross-attention start at the frame of the last shift; those of the first layer copy it."""
    model, registers = plan.model, plan.registers
    weight = math.sqrt(SHARP / (model.d_kv // 2) / (QUIETER * LOUDER * CODE))
    for layer in range(model.decoder_layers):
        block = f"decoder.block.{layer}.layer.1.EncDecAttention"
        for head in range(model.num_heads if layer == 0 else model.num_heads // 2):
            plan.head(f"{block}.q", head).copy_(weight * plan.pick(registers.now))
            plan.head(f"{block}.k", head).copy_(weight * plan.pick(registers.place))
    block = "decoder.block.0.layer.1.EncDecAttention"
    free = torch.split(registers.free, model.d_kv)[: model.num_heads - 1]
    for head, places in enumerate((*free, registers.then)):
        for name in "vo":
            part = plan.head(f"{block}.{name}", head)
            part.zero_()[: len(places)] = plan.pick(places)
