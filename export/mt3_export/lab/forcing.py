"""Teacher forcing: models are told the same tokens, and their distributions of the next one compared with fp32's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mt3_export.lab.bootstrap import ratio_estimate
from mt3_export.lab.results import Forced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from mt3_export.lab.logits import LogitsBackend
    from mt3_export.lab.material import ForcedRow, Material
    from mt3_runtime.arrays import FloatArray, IntArray
    from mt3_runtime.backends import Backend

    DoubleArray = NDArray[np.float64]
    States = list[FloatArray]  # [frames, d_model] of each row

ENCODED_AT_ONCE = 4  # segments
TAIL = 0.99


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """By row: its clip, steps, and those whose likeliest token is fp32's. `kl`: nats, of steps with finite logits."""

    clips: IntArray
    steps: IntArray
    equal: IntArray
    kl: DoubleArray | None
    non_finite: int

    @property
    def share(self) -> float:
        """Of equal tokens."""
        return float(self.equal.sum() / max(1, self.steps.sum()))

    @property
    def mean_kl(self) -> float:
        """Of steps with finite logits, 0 where there are none."""
        return float(self.kl.mean()) if self.kl is not None and self.kl.size else 0.0

    def summary(self) -> Forced | None:
        """As the report has it; None if nothing was told. Clips are resampled: rows of one clip are alike."""
        equal, steps = (np.bincount(self.clips, weights=counts).tolist() for counts in (self.equal, self.steps))
        estimate = ratio_estimate(equal, steps)
        if estimate is None:
            return None
        kl = self.kl if self.kl is not None and self.kl.size else None
        return Forced(
            segments=len(self.steps),
            tokens=int(self.steps.sum()),
            equal=int(self.equal.sum()),
            agreement=estimate,
            kl_mean=None if kl is None else float(kl.mean()),
            kl_p99=None if kl is None else float(np.quantile(kl, TAIL)),
            kl_max=None if kl is None else float(kl.max()),
            non_finite=self.non_finite,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a model makes of one step of rows 0..n-1; logits [n, vocab] where they can be had."""

    tokens: IntArray
    logits: FloatArray | None
    finite: np.ndarray  # [n]


def divergence(wanted: FloatArray, found: FloatArray) -> DoubleArray:
    """Kullback-Leibler divergence in nats, from distributions `wanted` to `found`, both logits [n, vocab] -> [n]."""
    p, q = (_log_softmax(logits) for logits in (wanted, found))
    total: DoubleArray = (np.exp(p) * (p - q)).sum(-1)
    return np.maximum(total, 0.0)  # rounding makes it negative where both are the same


def _log_softmax(logits: FloatArray) -> DoubleArray:
    exact = logits.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    shifted: DoubleArray = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    return shifted


def groups(material: Material, slots: int) -> list[Sequence[ForcedRow]]:
    """Rows that go side by side: of similar lengths, as they are sorted by them."""
    return [material.rows[first : first + slots] for first in range(0, len(material.rows), slots)]


def states_of(backend: Backend, material: Material, group: Sequence[ForcedRow]) -> States:
    """What the encoder makes of the rows' segments."""
    places = sorted({row.place for row in group})
    encoded: dict[int, FloatArray] = {}
    for first in range(0, len(places), ENCODED_AT_ONCE):
        part = places[first : first + ENCODED_AT_ONCE]
        encoded |= dict(zip(part, backend.encode(material.features[part]), strict=True))
    return [encoded[row.place][row.channel] for row in group]


def memory_of(group: Sequence[ForcedRow]) -> IntArray | None:
    """What rows are told of the segments before theirs, int32 [rows, span]; None of models without a memory."""
    memories = [row.memory for row in group if row.memory is not None]
    return np.stack(memories) if memories else None


def told(backend: Backend, group: Sequence[ForcedRow], states: States) -> Iterator[Step]:
    """Tell rows their tokens, step by step; those that have ended are at the end and leave."""
    backend.admit(0, states, memory_of(group))
    yield from steps(backend, group)


def steps(backend: Backend, group: Sequence[ForcedRow]) -> Iterator[Step]:
    """As `told`, of rows that were admitted."""
    for step in range(len(group[0].inputs)):
        live = [row for row in group if len(row.inputs) > step]
        tokens = np.array([row.inputs[step] for row in live], np.int32)
        chosen, log_probs = backend.step(tokens, np.full(len(live), step, np.int32))
        logits = getattr(backend, "logits", None)
        given = None if logits is None else logits[: len(live)]
        finite = np.isfinite(log_probs) if given is None else np.isfinite(given).all(-1) & np.isfinite(log_probs)
        yield Step(chosen.copy(), None if given is None else given.copy(), finite)


class Forcing:
    """fp32 told the rows of some material; others are compared with it. What it made of them is kept if asked for."""

    def __init__(self, reference: LogitsBackend, material: Material, *, keep: bool = False) -> None:
        self.reference, self.material, self._keep = reference, material, keep
        self._kept: dict[int, list[Step]] = {}

    def run(self, other: Backend, states: Callable[[int, Sequence[ForcedRow]], States] | None = None) -> Agreement:
        """Tell `other` the same; `states` gives what its encoder makes of a group, by number, where that is known."""
        slots = min(self.reference.slots, other.slots)
        counts, equal, divergences, broken = [], [], [], 0
        for number, group in enumerate(groups(self.material, slots)):
            encoded = states(number, group) if states else states_of(other, self.material, group)
            matches = np.zeros(len(group), np.int32)
            for wanted, found in zip(self._wanted(number, group), told(other, group, encoded), strict=True):
                matches[: len(found.tokens)] += (wanted.tokens == found.tokens) & found.finite
                broken += int((~found.finite).sum())
                if wanted.logits is not None and found.logits is not None:
                    divergences.append(divergence(wanted.logits[found.finite], found.logits[found.finite]))
            counts += [len(row.inputs) for row in group]
            equal += matches.tolist()
        kl = np.concatenate(divergences) if divergences else None
        clips = np.array([row.clip for row in self.material.rows], np.int32)
        return Agreement(clips, np.array(counts, np.int32), np.array(equal, np.int32), kl, broken)

    def _wanted(self, number: int, group: Sequence[ForcedRow]) -> Iterator[Step]:
        if number in self._kept:
            return iter(self._kept[number])
        made = told(self.reference, group, states_of(self.reference, self.material, group))
        if not self._keep:
            return made
        self._kept[number] = list(made)
        return iter(self._kept[number])
