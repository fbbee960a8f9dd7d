"""Schedules rows over a fixed number of slots: each steps at its own position and leaves when it ends.

A row is one autoregressive sequence: an MT3 segment, or one channel of a YourMT3 segment. Rows of any segments,
channels, files and live streams wait in one queue; a row that must first hear what became of another one joins it
then. Live rows stay contiguous, so a step costs what the live rows cost; a waiting
row takes a place the moment one is free: cross-KV costs as much for rows one by one as for a group, so that waiting
for company gains nothing. What a row decodes never depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np

from mt3_runtime.errors import OptionError
from mt3_runtime.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mt3_runtime.arrays import FloatArray, IntArray
    from mt3_runtime.backends import Backend

Key = TypeVar("Key", bound=Hashable)
Status = Literal["ended", "truncated", "failed"]
ATTEMPTS = 2  # a row with a logit that is not finite is decoded once more


@dataclass(frozen=True, slots=True, eq=False)
class Row(Generic[Key]):
    """A sequence to decode: who it is, and its encoder states [frames, d_model].

    The states are kept until the row ends: give an array of its own, not a view that keeps a whole group alive.
    `limit` stops this row earlier than `DecodingRules.max_tokens` does. `memory`: what the row is told of the segment
    before it, int32 [span], for models that have one; of all rows or of none.
    """

    key: Key
    states: FloatArray
    limit: int | None = None
    memory: IntArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DecodedRow(Generic[Key]):
    """What became of a row.

    `tokens` without start and end token, `log_probs` one for each. "truncated": the end token never came and every
    token is kept. "failed": logits were not finite twice; the tokens before that are kept.
    `seconds`: this row's share of the time, which is the time of every call divided by the rows that it served. The
    shares of all rows add up to the whole time, and that of rows decoded together can be told apart.
    """

    key: Key
    tokens: IntArray
    log_probs: FloatArray
    status: Status
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """How a sequence starts and ends. Without `end_token` every row takes `max_tokens` steps.

    Without `first_may_end` an end token in the first place is a token like any other (YourMT3 `t5mod_helper.py`).

    Raises:
        OptionError: `max_tokens` is not positive.
    """

    start_token: int
    end_token: int | None
    max_tokens: int
    first_may_end: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise OptionError(f"{self.max_tokens} tokens a row decode nothing: ask for 1 or more")


@dataclass(slots=True, eq=False)
class _Live(Generic[Key]):
    """A row in a slot. `attempt` counts from 1; `seconds` over all attempts."""

    row: Row[Key]
    attempt: int
    seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def decoded(self, status: Status) -> DecodedRow[Key]:
        tokens, log_probs = np.array(self.tokens, np.int32), np.array(self.log_probs, np.float32)
        return DecodedRow(self.row.key, tokens, log_probs, status, self.seconds)


def decode_rows(
    backend: Backend,
    rows: Iterable[Row[Key] | None],
    rules: DecodingRules,
    *,
    wanted: Callable[[Key], bool] = lambda _: True,
) -> Iterator[DecodedRow[Key]]:
    """Decode `rows`, taking them from the iterable only when a slot is free; yields each as it ends.

    Args:
        backend: has the slots.
        rows: the queue; its keys come back with the results. None: the next row waits for one that is being decoded.
        rules: how every row starts and ends.
        wanted: asked for the key of every live row after rows were taken, as it is then that a source may fail; a
            row that is not wanted leaves without a result.

    Raises:
        OptionError: `rules` ask for more positions than the backend's cache has.
    """
    decoder = RowDecoder(backend, rows, rules, wanted=wanted)
    while not decoder.is_finished:
        yield from decoder.advance()
        if decoder.is_idle and not decoder.is_finished:
            raise AssertionError("the next row waits for one that nobody decodes")


class RowDecoder(Generic[Key]):
    """`decode_rows` step by step, for whoever has other things to do in between.

    Here the source may say None at any time: no row is ready now. It is asked again before the next step.
    `is_idle`: in the last step no row was live, and none was ready.
    """

    def __init__(
        self,
        backend: Backend,
        rows: Iterable[Row[Key] | None],
        rules: DecodingRules,
        *,
        wanted: Callable[[Key], bool] = lambda _: True,
    ) -> None:
        if rules.max_tokens > backend.length:
            raise OptionError(f"{rules.max_tokens} tokens a row do not fit a cache of {backend.length}: ask for fewer")
        self._backend, self._rules = backend, rules
        self._queue = _Queue(iter(rows), wanted)
        self._slots: list[_Live[Key]] = []
        self._holes: list[int] = []  # places of rows that ended in the last step
        self.is_idle = False

    @property
    def is_finished(self) -> bool:
        """Whether every row of the source was decoded."""
        return self.is_idle and self._queue.is_empty

    def advance(self) -> list[DecodedRow[Key]]:
        """Give free slots to rows that are ready, then decode one token of every live row: the rows that ended."""
        _fill(self._backend, self._slots, self._holes, self._queue)
        self.is_idle = not self._slots and self._queue.is_dry
        self._holes = []
        with _shared_by(self._slots):
            ends = _step(self._backend, self._slots, self._rules) if self._slots else []
        decoded = []
        for place, status in enumerate(ends):
            if status is not None:
                self._holes.append(place)
                if row := _leave(self._slots, place, status, self._queue):
                    decoded.append(row)
        return decoded


_GONE: _Live[Any] = _Live(Row(None, np.empty(0, np.float32)), attempt=0)


@dataclass(slots=True)
class _Queue(Generic[Key]):
    """Rows that wait: those to be decoded once more, then those of the source.

    `is_dry`: fewer were there than were asked for; `is_empty`: and the source has ended.
    """

    source: Iterator[Row[Key] | None]
    wanted: Callable[[Key], bool]
    again: list[_Live[Key]] = field(default_factory=list)
    is_dry: bool = False
    is_empty: bool = False

    def take(self, count: int) -> list[_Live[Key]]:
        taken = [self.again.pop() for _ in range(min(count, len(self.again)))]
        rows = [] if len(taken) == count else self.source
        for row in rows:
            if row is None:
                break
            taken.append(_Live(row, attempt=1))
            if len(taken) == count:
                break
        else:
            self.is_empty = len(taken) < count
        self.is_dry = len(taken) < count
        return [live for live in taken if self.wanted(live.row.key)]  # of those taken first, too: it may change


@contextmanager
def _shared_by(rows: Sequence[_Live[Any]]) -> Iterator[None]:
    """Divide the time of the block among the rows that are there at its end."""
    clock = Stopwatch()
    with clock.stage("shared"):
        yield
    for live in rows:
        live.seconds += clock.seconds["shared"] / len(rows)


def _fill(backend: Backend, slots: list[_Live[Key]], holes: list[int], queue: _Queue[Key]) -> None:
    """Give free slots to waiting rows, and leave no hole before the last live row."""
    fresh = queue.take(backend.slots - len(slots) + len(holes))
    ended = set(holes)
    holes = [place for place, live in enumerate(slots) if place in ended or not queue.wanted(live.row.key)]
    with _shared_by(fresh):
        _place(backend, slots, holes, fresh)
    with _shared_by(slots):
        _close_holes(backend, slots, holes)


def _step(backend: Backend, slots: Sequence[_Live[Any]], rules: DecodingRules) -> list[Status | None]:
    """One token for every live row; says which of them have ended."""
    tokens = np.fromiter((live.tokens[-1] if live.tokens else rules.start_token for live in slots), np.int32)
    positions = np.fromiter((len(live.tokens) for live in slots), np.int32)
    next_tokens, log_probs = backend.step(tokens, positions)
    triples = zip(slots, next_tokens.tolist(), log_probs.tolist(), strict=True)
    return [_append(live, token, log_prob, rules) for live, token, log_prob in triples]


def _leave(slots: list[_Live[Key]], place: int, status: Status, queue: _Queue[Key]) -> DecodedRow[Key] | None:
    """Take a row out of its slot: to wait for another attempt, or else for good, and nothing here keeps it."""
    live, slots[place] = slots[place], _GONE
    if status == "failed" and live.attempt < ATTEMPTS:
        queue.again.append(_Live(live.row, live.attempt + 1, live.seconds))
        return None
    return live.decoded(status)


def _append(live: _Live[Any], token: int, log_prob: float, rules: DecodingRules) -> Status | None:
    if not np.isfinite(log_prob):
        return "failed"
    if token == rules.end_token and (live.tokens or rules.first_may_end):
        return "ended"
    live.tokens.append(token)
    live.log_probs.append(log_prob)
    limit = rules.max_tokens if live.row.limit is None else min(live.row.limit, rules.max_tokens)
    return "truncated" if len(live.tokens) >= limit else None


def _place(backend: Backend, slots: list[_Live[Key]], holes: list[int], fresh: list[_Live[Key]]) -> None:
    """Put fresh rows into holes first, then behind the last row; neighbours are admitted in one call."""
    taken = holes[: len(fresh)]
    del holes[: len(fresh)]
    places = [*taken, *range(len(slots), len(slots) + len(fresh) - len(taken))]
    for place, live in zip(places, fresh, strict=True):
        slots[place : place + 1] = [live]
    for _, run in groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        neighbours = [place for _, place in run]
        _admit(backend, neighbours[0], [slots[place].row for place in neighbours])


def _admit(backend: Backend, first: int, rows: Sequence[Row[Any]]) -> None:
    memories = [row.memory for row in rows if row.memory is not None]
    backend.admit(first, np.stack([row.states for row in rows]), np.stack(memories) if memories else None)


def _close_holes(backend: Backend, slots: list[_Live[Any]], holes: list[int]) -> None:
    """Fill holes that nobody took with rows from the end; highest first, so that the last row is never a hole."""
    for hole in reversed(holes):
        last = slots.pop()
        if hole < len(slots):
            backend.move(len(slots), hole, len(last.tokens))
            slots[hole] = last
