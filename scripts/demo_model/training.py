"""The training loop: takes batches, makes steps, keeps the log, stops in time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from demo_model.clips import TRAINING, make_clip
from demo_model.curriculum import STAGES, Curriculum
from demo_model.examples import SECONDS, ExampleMaker, arrays
from demo_model.initial import initial_weights
from demo_model.losses import (
    LossWeights,
    auxiliary_tensors,
    frame_losses,
    guidance_loss,
    soft_cross_entropy,
    tokens_right,
)
from demo_model.network import Looks, Network
from demo_model.optimiser import Optimiser, schedule
from demo_model.scores import KINDS
from demo_model.settings import SIZES
from demo_model.state import Plan, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from demo_model.examples import Batch
    from demo_model.feeder import Feeder

AHEAD = 3  # batches in the making
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CLIPS = 24  # that the input projection is scaled by
Record = dict[str, float]


def begin(plan: Plan, device: torch.device) -> Progress:
    """A run of which nothing is done yet."""
    maker, names = ExampleMaker(), sorted(KINDS)
    frames = [
        example.features[:: len(names)]
        for index in range(_CLIPS)
        for name in [names[index % len(names)]]
        for example in maker.examples(make_clip(KINDS[name], SECONDS, (TRAINING, plan.seed, index)), name)
    ]
    sample = torch.from_numpy(np.concatenate(frames))
    model = SIZES[plan.size]
    weights = initial_weights(model, sample, plan.seed)
    extra = auxiliary_tensors(model, plan.seed)
    return Progress(
        plan=plan,
        weights={key: tensor.to(device) for key, tensor in weights.items()},
        extra={key: tensor.to(device) for key, tensor in extra.items()},
        optimiser=None,
        curriculum=Curriculum(),
        stages=[],
    )


class Trainer:
    """A run in memory, at `progress`, which is brought up to date by `progress_now`."""

    def __init__(self, progress: Progress, shares: LossWeights | None = None) -> None:
        self.progress, self.shares = progress, shares or LossWeights()
        for tensor in (*progress.weights.values(), *progress.extra.values()):
            tensor.requires_grad_()
        self.optimiser = Optimiser(progress.weights, progress.extra)
        if progress.optimiser is not None:
            self.optimiser.restore(progress.optimiser, progress.step)
        self.model = SIZES[progress.plan.size]
        self.dtype = DTYPES[progress.plan.precision]
        self.device = progress.weights["proj.weight"].device

    def run(self, feeder: Feeder, enough: Callable[[], bool], report: Callable[[Record], None]) -> None:
        """Train until all steps of the plan are made or `enough` says so, which is asked before each step.

        report: called after every step with its losses and accuracies.
        """
        progress = self.progress
        for number, stage in enumerate(progress.stages, start=progress.step):
            self._ask(feeder, number, stage)
        while progress.step < progress.plan.steps and not enough():
            begun = time.monotonic()
            while len(progress.stages) < AHEAD:
                number = progress.step + len(progress.stages)
                progress.stages.append(progress.curriculum.stage)
                self._ask(feeder, number, progress.curriculum.stage)
            record = self.step(feeder.take())
            progress.stages.pop(0)
            progress.seconds += time.monotonic() - begun
            report(record)

    def _ask(self, feeder: Feeder, number: int, stage: int) -> None:
        plan = self.progress.plan
        feeder.ask(plan.seed, number, plan.batch, STAGES[stage])

    def step(self, parts: list[Batch]) -> Record:
        """One step over all parts of a batch."""
        progress = self.progress
        segments = sum(len(part.kinds) for part in parts)
        sums: Record = {}
        right: dict[str, list[float]] = {}
        for part in parts:
            losses, accuracies = self._learn(part, len(part.kinds) / segments)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value * len(part.kinds) / segments
            for kind, accuracy in zip(part.kinds, accuracies, strict=True):
                right.setdefault(kind, []).append(accuracy)
        self.optimiser.step(schedule(progress.step, progress.plan.steps))
        progress.step += 1
        by_kind = {kind: sum(values) / len(values) for kind, values in right.items()}
        progress.curriculum.update(by_kind, progress.step / progress.plan.steps)
        named = {f"accuracy.{kind}": value for kind, value in by_kind.items()}
        return {"step": progress.step, "stage": progress.curriculum.stage, **sums, **named}

    def _learn(self, part: Batch, share: float) -> tuple[Record, list[float]]:
        """Add the gradients of one part; its losses, and the share of right tokens of each of its segments."""
        batch = self.to_tensors(part)
        network = self.network()
        looks = Looks()
        states = network.encode(batch["features"], looks)
        inputs = F.pad(batch["tokens"][:, :-1], (1, 0), value=self.model.start_token)
        learned = batch["learned"]
        logits = network.speak(network.decode(states, inputs, looks)[learned]).float()  # [learned tokens, vocab]
        terms = {
            "tokens": (1.0, soft_cross_entropy(logits, batch["tokens"][learned])),
            **{
                name: (getattr(self.shares, name), loss)
                for name, loss in frame_losses(network, self.progress.extra, states, looks.flags, batch).items()
            },
            **{name: (self.shares.guidance, loss) for name, loss in guidance_loss(looks, inputs, batch).items()},
        }
        total = sum((weight * loss for weight, loss in terms.values()), torch.zeros((), device=self.device))
        (share * total).backward()
        right = torch.zeros_like(learned)
        right[learned] = tokens_right(logits.detach(), batch["tokens"][learned])
        accuracies = (right.sum(1) / learned.sum(1)).tolist()
        return {name: float(loss.detach()) for name, (_, loss) in terms.items()}, accuracies

    def network(self) -> Network:
        """The network with its weights in the precision of the plan."""
        return Network(self.model, {key: tensor.to(self.dtype) for key, tensor in self.progress.weights.items()})

    def to_tensors(self, part: Batch) -> Mapping[str, Tensor]:
        """The arrays of a batch on the device: features in the precision of the plan, whole numbers as indices."""
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in arrays(part).items()}
        return {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
            if name in {"features", "learned", "spoken", "hidden"}
        } | {name: tensors[name].long() for name in ("tokens", "reading", "following", "voices")}

    def progress_now(self) -> Progress:
        """The run, ready to be saved."""
        self.progress.optimiser = self.optimiser.state()
        return self.progress
