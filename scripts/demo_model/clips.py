"""A clip: random notes and their sound, all of it from one seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from demo_model.drums import DRUMS
from demo_model.families import BY_PROGRAM
from demo_model.room import record
from demo_model.scores import compose
from demo_model.synthesis import RATE, Wave, add, play

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.random import Generator

    from demo_model.families import Timbre
    from demo_model.scores import Kind
    from mt3_runtime.notes import Note

TRAINING, VALIDATION, HELD_OUT = range(3)  # streams of seeds that never meet


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Notes in canonical order, and audio [samples] at 16 kHz."""

    notes: tuple[Note, ...]
    audio: Wave


def make_clip(kind: Kind, seconds: tuple[float, float], seed: Sequence[int]) -> Clip:
    """Compose and render a clip of a random length within `seconds`.

    `seed`: whole numbers, the first of them one of the streams above; equal seeds give equal clips.
    """
    rng = np.random.default_rng(seed)
    length = float(rng.uniform(*seconds))
    notes = compose(kind, length, rng)
    timbres = {
        program: BY_PROGRAM[program].draw(rng) for program in sorted({n.program for n in notes if not n.is_drum})
    }
    gains = {program: 10.0 ** (rng.uniform(-3.0, 3.0) / 20.0) for program in timbres}
    kit = {key: DRUMS[key].hit(rng) for key in sorted({note.pitch for note in notes if note.is_drum})}
    beat = 10.0 ** (rng.uniform(0.0, 6.0) / 20.0)  # a hit is shorter than a note, and peaks higher
    mix = perform(notes, round(length * RATE), {p: (timbres[p], gains[p]) for p in timbres}, (kit, beat), rng)
    return Clip(tuple(notes), record(mix, rng))


def perform(
    notes: Iterable[Note],
    samples: int,
    timbres: Mapping[int, tuple[Timbre, float]],
    kit: tuple[Mapping[int, Wave], float],
    rng: Generator,
) -> Wave:
    """The sound of all notes [samples]. `timbres`: timbre and gain by program; `kit`: hits by key, and their gain."""
    mix = np.zeros(samples, np.float32)
    for note in notes:
        if note.is_drum:
            add(mix, kit[0][note.pitch], note.onset, kit[1] * (note.velocity / 127.0) ** 1.3)
        else:
            timbre, gain = timbres[note.program]
            add(mix, play(note.pitch, note.offset - note.onset, note.velocity, timbre, rng), note.onset, gain)
    return mix
