"""What training minimises: the next token, and help for the encoder and for attention that is dropped afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from demo_model.families import PROGRAMS
from demo_model.labels import HIDDEN, SPOKEN_IDS
from demo_model.network import GUIDED_CROSS, GUIDED_ENCODER, GUIDED_SELF, Looks
from demo_model.settings import PITCHES, PROGRAM_IDS, SHIFTS, TIE, VELOCITY_IDS, frame_of
from mt3_runtime.vocabulary import END_TOKEN, PAD_TOKEN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from demo_model.network import Network
    from mt3_runtime.specs import ModelSpec

SOFT = (0.1, 0.8, 0.1)  # a shift one step early, right, late: steps are 10 ms, frames 8 ms
WINDOW = (0.25, 0.5, 0.25)  # how a guided head may spread over neighbouring frames
RARE = -4.0  # initial logit of anything that is usually absent
FIRST, LAST = SHIFTS[0], SHIFTS[-1]


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Shares of the auxiliary losses; the next token's is 1."""

    frames: float = 0.3
    following: float = 0.3
    voices: float = 0.2
    events: float = 0.5
    guidance: float = 0.2


def auxiliary_tensors(model: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Trainable tensors that only the auxiliary losses use."""
    generator = torch.Generator().manual_seed(seed)
    spread = model.d_model**-0.5
    return {
        "spoken.bias": torch.full((len(SPOKEN_IDS),), RARE),
        "hidden.weight": spread * torch.randn(HIDDEN, model.d_model, generator=generator),
        "hidden.bias": torch.full((HIDDEN,), RARE),
        "events.scale": torch.full((1,), 1.0),
        "events.bias": torch.full((1,), RARE / 2),
        "following.scale": torch.full((1,), 2.0),
        "voices.weight": spread * torch.randn(len(PITCHES), len(PROGRAMS), model.d_model, generator=generator),
    }


def tokens_right(logits: Tensor, tokens: Tensor) -> Tensor:
    """Which tokens are the likeliest, give or take a step of a shift.  # logits [n, vocab], tokens [n] -> [n]"""
    said = logits.argmax(-1)
    near = is_shift(tokens) & is_shift(said) & ((said - tokens).abs() <= 1)
    return (said == tokens) | near


def is_shift(tokens: Tensor) -> Tensor:
    """Which tokens are shifts within a segment."""
    return (tokens >= FIRST) & (tokens <= LAST)


def soft_cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy, with `SOFT` targets for shifts.  # logits [n, vocab], tokens [n]"""
    log_probs = logits.log_softmax(-1)
    shifts = is_shift(tokens)
    near = torch.stack([torch.where(shifts, (tokens + step).clamp(FIRST, LAST), tokens) for step in (-1, 0, 1)], dim=-1)
    return -(log_probs.gather(-1, near) * logits.new_tensor(SOFT)).sum(-1).mean()


def frame_losses(
    network: Network, extra: Mapping[str, Tensor], states: Tensor, flags: Tensor, batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Losses of what each frame should know; states [segments, frames, d_model], flags [segments, frames]."""
    rows = network.weights["lm_head.weight"]
    spoken = F.linear(states, rows[list(SPOKEN_IDS)]).float() + extra["spoken.bias"]
    hidden = F.linear(states, extra["hidden.weight"].to(states.dtype)).float() + extra["hidden.bias"]
    frames = _presence(spoken, batch["spoken"]) + _presence(hidden, batch["hidden"])
    # Shift tokens are consecutive; the end token comes last.
    timed = F.linear(states, torch.cat((rows[FIRST : LAST + 1], rows[END_TOKEN : END_TOKEN + 1]))).float()
    following = batch["following"].flatten()
    columns = torch.where(following == END_TOKEN, len(SHIFTS), following - FIRST)
    later = _soft_columns(timed.flatten(0, 1) * extra["following.scale"], columns)
    segment, frame, pitch, program = batch["voices"].unbind(-1)
    matrices = extra["voices.weight"].to(states.dtype)[pitch]  # [cases, programs, d_model]
    scores = (matrices @ states[segment, frame].unsqueeze(-1)).squeeze(-1).float()
    voices = F.cross_entropy(scores, program, reduction="sum") / max(1, len(program))  # drums alone have none
    happens = batch["spoken"][..., -len(VELOCITY_IDS) :].amax(-1).float()  # every event has a velocity
    events = F.binary_cross_entropy_with_logits(flags * extra["events.scale"] + extra["events.bias"], happens)
    return {"frames": frames, "following": later, "voices": voices, "events": events}


def _presence(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum") / labels[..., 0].numel()


def _soft_columns(logits: Tensor, columns: Tensor) -> Tensor:
    """As `soft_cross_entropy`, where columns 0 to len(SHIFTS) - 1 are shifts."""
    log_probs = logits.log_softmax(-1)
    shifts = columns < len(SHIFTS)
    near = [torch.where(shifts, (columns + step).clamp(0, len(SHIFTS) - 1), columns) for step in (-1, 0, 1)]
    return -(log_probs.gather(-1, torch.stack(near, -1)) * logits.new_tensor(SOFT)).sum(-1).mean()


def guidance_loss(looks: Looks, inputs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How far guided heads look from where the answer is; inputs [segments, length] begin with the start token."""
    real = batch["tokens"] != PAD_TOKEN
    following = batch["following"]
    table = torch.tensor([frame_of(steps) for steps in range(len(SHIFTS))], device=inputs.device)
    ahead = torch.where(following == END_TOKEN, 0, table[(following - FIRST).clamp(min=0)])
    self_log = looks.scores[GUIDED_SELF].log_softmax(-1)  # [segments, 3, length, length]
    latest = latest_of_kinds(inputs).transpose(0, 1).unsqueeze(-1)  # [segments, 3, length, 1]
    remembered = -self_log.gather(-1, latest).squeeze(-1).mean(1)[real].mean()
    return {
        GUIDED_ENCODER: _off_frame(looks.scores[GUIDED_ENCODER], ahead).mean(),
        GUIDED_CROSS: _off_frame(looks.scores[GUIDED_CROSS], batch["reading"])[real].mean(),
        GUIDED_SELF: remembered,
    }


def latest_of_kinds(inputs: Tensor) -> Tensor:
    """Index of the latest token that tells the time, the velocity, the program: [3, segments, length].

    It is 0, the start token, where there is none yet.
    """
    programs = torch.tensor(PROGRAM_IDS, device=inputs.device)
    kinds = (
        is_shift(inputs) | (inputs == TIE),
        (inputs == VELOCITY_IDS[0]) | (inputs == VELOCITY_IDS[1]),
        torch.isin(inputs, programs),
    )
    places = torch.arange(inputs.shape[1], device=inputs.device)
    return torch.stack([torch.where(kind, places, 0).cummax(-1).values for kind in kinds])


def _off_frame(scores: Tensor, frames: Tensor) -> Tensor:
    """Cross-entropy of attention with `WINDOW` around frames [segments, queries], mean over heads."""
    log_probs = scores.log_softmax(-1)  # [segments, heads, queries, frames]
    near = torch.stack([(frames + step).clamp(0, scores.shape[-1] - 1) for step in (-1, 0, 1)], -1)
    picked = log_probs.gather(-1, near.unsqueeze(1).expand(-1, scores.shape[1], -1, -1))
    return -(picked * scores.new_tensor(WINDOW)).sum(-1).mean(1)
