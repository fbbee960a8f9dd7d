"""Which clips to train on: harder ones are added when the present ones are learned, or when their time has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


Mixture = tuple[tuple[str, float], ...]  # kinds of clips and how often they are taken


@dataclass(frozen=True, slots=True)
class Stage:
    """A mixture of clips; it ends when `kind` reaches `accuracy`, or after `deadline` of all steps.

    `accuracy`: smoothed share of right tokens, teacher-forced, a shift by one step counted as right. `mistold`: share
    of the onsets that are told for the wrong instrument.
    """

    mixture: Mixture
    kind: str
    accuracy: float
    deadline: float
    mistold: float = 0.0


# Easier clips stay in, so that they are not forgotten; richer ones are in from the start, for the encoder.
STAGES = (
    Stage((("line", 0.5), ("one", 0.3), ("band", 0.2)), "line", 0.75, 0.05),
    Stage((("one", 0.6), ("two", 0.15), ("beat", 0.1), ("band", 0.15)), "one", 0.82, 0.15),
    Stage((("one", 0.3), ("two", 0.35), ("beat", 0.1), ("band", 0.25)), "two", 0.82, 0.35),
    Stage(
        (("one", 0.15), ("two", 0.3), ("beat", 0.1), ("trio", 0.1), ("band", 0.3), ("drums", 0.05)), "band", 1.1, 0.7
    ),
    # Two voices are what comes closest to what is asked of them, and last; notes told twice are an error of theirs.
    Stage(
        (("one", 0.1), ("two", 0.45), ("beat", 0.05), ("trio", 0.1), ("band", 0.25), ("drums", 0.05)),
        "band",
        1.1,
        1.0,
        mistold=0.2,
    ),
)
MEMORY = 0.97  # of the smoothed accuracy, per batch with clips of the kind


@dataclass(slots=True)
class Curriculum:
    """Where a training run stands: its stage and the smoothed accuracy of every kind of clip."""

    stage: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)

    def update(self, accuracy: Mapping[str, float], progress: float) -> bool:
        """Take in the accuracy of one batch by kind; True when a new stage begins. `progress`: share of all steps."""
        for kind, value in accuracy.items():
            # Starting from 0 keeps a lucky first batch from ending a stage.
            self.accuracy[kind] = MEMORY * self.accuracy.get(kind, 0.0) + (1.0 - MEMORY) * value
        stage = STAGES[self.stage]
        if self.accuracy.get(stage.kind, 0.0) < stage.accuracy and progress < stage.deadline:
            return False
        if self.stage == len(STAGES) - 1:
            return False
        self.stage += 1
        return True
