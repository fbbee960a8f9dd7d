"""Which row is in which slot: waiting rows take free ones, and live rows stay contiguous.

A waiting row takes a place the moment one is free: cross-KV costs as much for rows one by one as for a group, so that
waiting for company gains nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from mt3_runtime.rows import DecodedRow, Key, Row, Status
from mt3_runtime.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mt3_runtime.backends import DeviceBackend


KNOWN_AT_ONCE = 64  # rows that are known, taken in one go: an hour of silence is told bit by bit


@dataclass(slots=True, eq=False)
class Live(Generic[Key]):
    """One attempt at a row. `attempt` counts from 1; `seconds` over all attempts.

    `launched` steps were begun, so that this is its next position; `tokens` are those that the host has seen.
    """

    row: Row[Key]
    attempt: int
    seconds: float = 0.0
    launched: int = 0
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    is_over: bool = False

    def decoded(self, status: Status) -> DecodedRow[Key]:
        """The result, now that it is over."""
        tokens, log_probs = np.array(self.tokens, np.int32), np.array(self.log_probs, np.float32)
        return DecodedRow(self.row.key, tokens, log_probs, status, self.seconds)

    def leave(self) -> None:
        """Give up the slot; what was launched for it is nobody's, and nothing here keeps its states."""
        self.is_over, self.row = True, replace(self.row, states=None, encode=None)


@dataclass(slots=True)
class Queue(Generic[Key]):
    """Rows that wait: those to be decoded once more, then those of the source.

    `is_dry`: fewer were there than were asked for; `is_empty`: and the source has ended.
    """

    source: Iterator[Row[Key] | None]
    wanted: Callable[[Key], bool]
    again: list[Live[Key]] = field(default_factory=list)
    is_dry: bool = False
    is_empty: bool = False

    def take(self, count: int) -> list[Live[Key]]:
        """At most `count` rows that are ready now, and those between them that are known."""
        taken = [self.again.pop() for _ in range(min(count, len(self.again)))]
        room, known = count - len(taken), 0
        self.is_dry = room > 0
        for row in self.source if room else ():
            if row is None:
                break
            taken.append(Live(row, attempt=1))
            known += row.known is not None
            room -= row.known is None
            if not room or known == KNOWN_AT_ONCE:
                self.is_dry = False
                break
        else:
            self.is_empty = room > 0
        return [live for live in taken if self.wanted(live.row.key)]  # of those taken first, too: it may change


@contextmanager
def shared_by(rows: Sequence[Live[Any]]) -> Iterator[None]:
    """Divide the time of the block among the rows that are there at its end."""
    clock = Stopwatch()
    with clock.stage("shared"):
        yield
    for live in rows:
        live.seconds += clock.seconds["shared"] / len(rows)


def fill(backend: DeviceBackend, slots: list[Live[Key]], queue: Queue[Key], start_token: int) -> list[DecodedRow[Key]]:
    """Give free slots to waiting rows, and leave no hole before the last live row; returns rows that need no slot."""
    taken = queue.take(backend.slots - sum(not live.is_over for live in slots))
    fresh = [live for live in taken if live.row.known is None]
    for live in slots:
        if not live.is_over and not queue.wanted(live.row.key):
            live.leave()
    holes = [place for place, live in enumerate(slots) if live.is_over]
    with shared_by(fresh):
        _place(backend, slots, holes, fresh, start_token)
    with shared_by(slots):
        _close_holes(backend, slots, holes)
    return [
        DecodedRow(row.key, row.known, np.zeros(len(row.known), np.float32), "ended", seconds=0.0)
        for row in (live.row for live in taken)
        if row.known is not None
    ]


def _place(
    backend: DeviceBackend, slots: list[Live[Key]], holes: list[int], fresh: list[Live[Key]], start_token: int
) -> None:
    """Put fresh rows into holes first, then behind the last row; neighbours are admitted in one call."""
    taken = holes[: len(fresh)]
    del holes[: len(fresh)]
    places = [*taken, *range(len(slots), len(slots) + len(fresh) - len(taken))]
    for place, live in zip(places, fresh, strict=True):
        slots[place : place + 1] = [live]
    for _, run in groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        neighbours = [place for _, place in run]
        rows = [slots[place].row for place in neighbours]
        memories = [row.memory for row in rows if row.memory is not None]
        backend.admit(neighbours[0], [row.states for row in rows], np.stack(memories) if memories else None)
        backend.seed(neighbours[0], np.full(len(rows), start_token, np.int32))


def _close_holes(backend: DeviceBackend, slots: list[Live[Any]], holes: list[int]) -> None:
    """Fill holes that nobody took with rows from the end; highest first, so that the last row is never a hole."""
    for hole in reversed(holes):
        last = slots.pop()
        if hole < len(slots):
            backend.move(len(slots), hole, min(last.launched, backend.length))
            slots[hole] = last
