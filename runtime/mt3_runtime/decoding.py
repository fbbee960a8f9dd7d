"""Schedules rows over a fixed number of slots: each steps at its own position and leaves when it ends.

A row is one autoregressive sequence: an MT3 segment. Live rows stay contiguous, so a step costs what the live
rows cost; a waiting row takes a place the moment one is free. What a row decodes never depends on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mt3_runtime.arrays import FloatArray, IntArray
    from mt3_runtime.backends import Backend

Status = Literal["ended", "truncated", "failed"]
ATTEMPTS = 2  # a row with a logit that is not finite is decoded once more


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence to decode: who it is, and its encoder states [frames, d_model]."""

    key: int
    states: FloatArray


@dataclass(frozen=True, slots=True)
class DecodedRow:
    """What became of a row.

    `tokens` without start and end token, `log_probs` one for each. "truncated": the end token never came and every
    token is kept. "failed": logits were not finite twice; the tokens before that are kept.
    """

    key: int
    tokens: IntArray
    log_probs: FloatArray
    status: Status


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """How a sequence starts and ends. Without `end_token` every row takes `max_tokens` steps.

    Raises:
        OptionError: `max_tokens` is not positive.
    """

    start_token: int
    end_token: int | None
    max_tokens: int

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise OptionError(f"{self.max_tokens} tokens a row decode nothing: ask for 1 or more")


@dataclass(slots=True)
class _Live:
    """A row in a slot. `attempt` counts from 1."""

    row: Row
    attempt: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def decoded(self, status: Status) -> DecodedRow:
        tokens, log_probs = np.array(self.tokens, np.int32), np.array(self.log_probs, np.float32)
        return DecodedRow(self.row.key, tokens, log_probs, status)


def decode_rows(backend: Backend, rows: Iterable[Row], rules: DecodingRules) -> Iterator[DecodedRow]:
    """Decode `rows`, taking them from the iterable only when a slot is free; yields each as it ends.

    Raises:
        OptionError: `rules` ask for more positions than the backend's cache has.
    """
    if rules.max_tokens > backend.length:
        raise OptionError(f"{rules.max_tokens} tokens a row do not fit a cache of {backend.length}: ask for fewer")
    waiting = iter(rows)
    again: list[_Live] = []
    slots: list[_Live] = []
    holes: list[int] = []
    while True:
        free = backend.slots - len(slots) + len(holes)
        fresh = [again.pop() for _ in range(min(free, len(again)))]
        fresh += [_Live(row, attempt=1) for row in islice(waiting, free - len(fresh))]
        _place(backend, slots, holes, fresh)
        _close_holes(backend, slots, holes)
        if not slots:
            return
        holes = []
        for place, (live, status) in enumerate(zip(slots, _step(backend, slots, rules), strict=True)):
            if status is None:
                continue
            holes.append(place)
            if status == "failed" and live.attempt < ATTEMPTS:
                again.append(_Live(live.row, live.attempt + 1))
            else:
                yield live.decoded(status)


def _step(backend: Backend, slots: Sequence[_Live], rules: DecodingRules) -> list[Status | None]:
    """One token for every live row; says which of them have ended."""
    tokens = np.fromiter((live.tokens[-1] if live.tokens else rules.start_token for live in slots), np.int32)
    positions = np.fromiter((len(live.tokens) for live in slots), np.int32)
    next_tokens, log_probs = backend.step(tokens, positions)
    triples = zip(slots, next_tokens.tolist(), log_probs.tolist(), strict=True)
    return [_append(live, token, log_prob, rules) for live, token, log_prob in triples]


def _append(live: _Live, token: int, log_prob: float, rules: DecodingRules) -> Status | None:
    if not np.isfinite(log_prob):
        return "failed"
    if token == rules.end_token:
        return "ended"
    live.tokens.append(token)
    live.log_probs.append(log_prob)
    return "truncated" if len(live.tokens) >= rules.max_tokens else None


def _place(backend: Backend, slots: list[_Live], holes: list[int], fresh: list[_Live]) -> None:
    """Put fresh rows into holes first, then behind the last row; neighbours are admitted in one call."""
    taken = holes[: len(fresh)]
    del holes[: len(fresh)]
    places = [*taken, *range(len(slots), len(slots) + len(fresh) - len(taken))]
    for place, live in zip(places, fresh, strict=True):
        slots[place : place + 1] = [live]
    for _, run in groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        neighbours = [place for _, place in run]
        backend.admit(neighbours[0], np.stack([slots[place].row.states for place in neighbours]))


def _close_holes(backend: Backend, slots: list[_Live], holes: list[int]) -> None:
    """Fill holes that nobody took with rows from the end; highest first, so that the last row is never a hole."""
    for hole in reversed(holes):
        last = slots.pop()
        if hole < len(slots):
            backend.move(len(slots), hole, len(last.tokens))
            slots[hole] = last
