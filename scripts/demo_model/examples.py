"""Batches of training examples, each from its own number: the same number gives the same batch on every machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from demo_model.clips import TRAINING, make_clip
from demo_model.labels import FrameLabels, label_frames, reading_frames
from demo_model.mistelling import mistell
from demo_model.scores import KINDS
from demo_model.settings import FEATURES, VOCABULARY
from demo_model.targets import segment_events, write_lesson
from mt3_runtime.features import LogMel
from mt3_runtime.segments import iter_segments
from mt3_runtime.vocabulary import PAD_TOKEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    from demo_model.clips import Clip
    from demo_model.curriculum import Stage

SECONDS = (6.5, 10.2)  # of a training clip: four or five segments, the last one not full
PART = 8  # segments that go through the network at once: little padding, and they fit the caches
Telling = tuple[float, "Generator"]  # share and draws of `mistell`
_TELLING = 1  # ends the seed of what is mistold, which is then no clip's


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One segment: its input and all that should be known of it."""

    kind: str
    features: NDArray[np.float32]  # [frames, bins]
    tokens: NDArray[np.int16]  # [length], with the end token
    learned: NDArray[np.bool_]  # [length], see `write_lesson`
    reading: NDArray[np.int16]  # [length], see `reading_frames`
    labels: FrameLabels


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Segments side by side, in order of length; token rows are padded with PAD_TOKEN.

    `voices` has rows (segment, frame, pitch column, program column).
    """

    kinds: tuple[str, ...]
    features: NDArray[np.float16]  # [segments, frames, bins]
    tokens: NDArray[np.int16]  # [segments, length]
    learned: NDArray[np.bool_]  # [segments, length], False for padding too
    reading: NDArray[np.int16]  # [segments, length]
    spoken: NDArray[np.uint8]  # [segments, frames, SPOKEN_IDS]
    hidden: NDArray[np.uint8]  # [segments, frames, HIDDEN]
    following: NDArray[np.int16]  # [segments, frames]
    voices: NDArray[np.int16]  # [cases, 4]


class ExampleMaker:
    """Clips -> examples -> batches. Holds the mel matrix and nothing else."""

    def __init__(self) -> None:
        self._log_mel = LogMel(FEATURES)

    def examples(self, clip: Clip, kind: str, telling: Telling | None = None) -> list[Example]:
        """Every segment of a clip, told as it was played if `telling` is None."""
        segments = list(iter_segments(clip.audio, FEATURES, VOCABULARY))
        features = self._log_mel(np.stack([s.samples for s in segments]), [s.frames for s in segments])
        examples = []
        for events, inputs in zip(segment_events(clip.notes, len(clip.audio)), features, strict=True):
            tokens, learned = write_lesson(mistell(events, *telling) if telling else events)
            ids, reading = np.array(tokens, np.int16), reading_frames(tokens)
            examples.append(Example(kind, inputs, ids, np.array(learned), reading, label_frames(events)))
        return examples

    def batch(self, seed: int, number: int, size: int, stage: Stage) -> list[Batch]:
        """Batch `number` of a training run: `size` segments of whole clips, in parts of like length."""
        names, weights = zip(*stage.mixture, strict=True)
        draw = np.random.default_rng((TRAINING, seed, number))
        examples: list[Example] = []
        index = 0
        while len(examples) < size:
            name = str(draw.choice(names, p=np.array(weights) / sum(weights)))
            numbers = (TRAINING, seed, number, index)
            telling = (stage.mistold, np.random.default_rng((*numbers, _TELLING))) if stage.mistold else None
            examples += self.examples(make_clip(KINDS[name], SECONDS, numbers), name, telling)
            index += 1
        ordered = sorted(examples[:size], key=lambda example: len(example.tokens))
        return [collate(ordered[first : first + PART]) for first in range(0, size, PART)]


def collate(examples: Sequence[Example]) -> Batch:
    """One batch of examples."""
    longest = max(len(example.tokens) for example in examples)
    tokens = np.full((len(examples), longest), PAD_TOKEN, np.int16)
    learned = np.zeros((len(examples), longest), np.bool_)
    reading = np.zeros((len(examples), longest), np.int16)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        learned[row, : len(example.learned)] = example.learned
        reading[row, : len(example.reading)] = example.reading
    labels = [example.labels for example in examples]
    cases = [np.insert(label.voices, 0, row, axis=1) for row, label in enumerate(labels)]
    return Batch(
        kinds=tuple(example.kind for example in examples),
        features=np.stack([example.features for example in examples]).astype(np.float16),
        tokens=tokens,
        learned=learned,
        reading=reading,
        spoken=np.stack([label.spoken for label in labels]),
        hidden=np.stack([label.hidden for label in labels]),
        following=np.stack([label.following for label in labels]),
        voices=np.concatenate(cases).astype(np.int16),
    )


def arrays(batch: Batch) -> Mapping[str, NDArray[np.generic]]:
    """The arrays of a batch by name."""
    names = ("features", "tokens", "learned", "reading", "spoken", "hidden", "following", "voices")
    return {name: getattr(batch, name) for name in names}
