"""Replays given token ids in launches of several steps, as a device would, and checks every call."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mt3_runtime.backends.scripted import Pass, ScriptedBackend, insist
from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from mt3_runtime.arrays import FloatArray, IntArray, RowStates

UNDER_WAY = 2  # launches at most
GARBAGE_TOKENS = (0, 1, 2, 1535, -1, 2**31 - 1)
GARBAGE_LOG_PROBS = (np.nan, np.inf, -np.inf, 0.0, -1.0)


@dataclass(frozen=True, slots=True)
class Launched:
    """So many steps of slots 0..n-1: the rows they held, and where they began; `ahead`: another one was under way."""

    keys: tuple[int, ...]
    positions: tuple[int, ...]
    steps: int
    ahead: bool


@dataclass(frozen=True, slots=True)
class Collected:
    """The oldest launch was read."""


class _UnderWay(NamedTuple):
    """What a launch will give, and the rows whose scripts it brought to their end."""

    tokens: IntArray  # [steps, n]
    log_probs: FloatArray  # [steps, n]
    over: list[Pass]


class ScriptedDevice(ScriptedBackend):
    """A `DeviceBackend` without a network; see `ScriptedBackend`.

    A row whose script is used up goes on with garbage, numbers that are not finite among it, until it leaves its slot;
    it is a fault to launch it once more when the end of its script was collected.

    Raises:
        AssertionError: a call that breaks the contract of `DeviceBackend`, a fault of the code under test.
    """

    def __init__(self, *arguments: Any, chunk: int = 4, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if chunk < 1:
            raise OptionError(f"launches of {chunk} steps do nothing: give 1 or more")
        self.chunk = chunk
        self.launches: list[Launched | Collected] = []
        self._garbage = np.random.default_rng(0)
        self._seeded: list[bool] = [False] * self.slots
        self._known_over: set[Pass] = set()
        self._under_way: deque[_UnderWay] = deque()
        shape = (chunk, self.slots)
        self._results = [(np.zeros(shape, np.int32), np.zeros(shape, np.float32)) for _ in range(UNDER_WAY)]

    def admit(self, first: int, states: RowStates, memory: IntArray | None = None) -> None:
        """See `Backend.admit`."""
        super().admit(first, states, memory)
        self._seeded[first : first + len(states)] = [False] * len(states)

    def seed(self, first: int, tokens: IntArray) -> None:
        """See `DeviceBackend.seed`."""
        insist(tokens.dtype == np.int32, f"{tokens.dtype} tokens")
        for slot, token in enumerate(tokens.tolist(), start=first):
            row = self._row(slot)
            insist(
                not row.read and token == row.due, f"row {row.key} was seeded with {token} after {len(row.read)} steps"
            )
            self._seeded[slot] = True

    def step(self, tokens: IntArray, positions: IntArray) -> tuple[IntArray, FloatArray]:
        """See `Backend.step`; nobody who can launch should."""
        raise AssertionError(f"{len(tokens)} rows were stepped from the host at {positions}")

    def move(self, source: int, target: int, length: int) -> None:
        """See `Backend.move`."""
        super().move(source, target, length)
        self._seeded[target] = self._seeded[source]

    def launch(self, positions: IntArray, steps: int) -> None:
        """See `DeviceBackend.launch`."""
        count = len(positions)
        insist(0 < count <= self.slots and positions.dtype == np.int32, f"{positions.dtype} positions of {count} rows")
        insist(1 <= steps <= self.chunk, f"{steps} steps, but a launch takes 1 to {self.chunk}")
        insist(len(self._under_way) < UNDER_WAY, f"{UNDER_WAY} launches are under way already")
        rows = [self._row(slot) for slot in range(count)]
        for slot, row in enumerate(rows):
            insist(self._seeded[slot], f"row {row.key} in slot {slot} was launched before it was seeded")
            insist(row not in self._known_over, f"row {row.key} was launched after its end had been collected")
        before = {row for row in rows if self._is_over(row)}
        # the launch before the last one was collected, or this one could not begin: its arrays may be overwritten
        self._results.append(self._results.pop(0))
        all_tokens, all_log_probs = self._results[-1]
        all_tokens.fill(-(2**31))
        all_log_probs.fill(np.nan)
        tokens, log_probs = all_tokens[:steps, :count], all_log_probs[:steps, :count]
        for step in range(steps):
            for slot, position in enumerate(np.minimum(positions + step, self.length - 1).tolist()):
                tokens[step, slot], log_probs[step, slot] = self._next(slot, position)
        self.launches.append(Launched(self._keys(count), tuple(positions.tolist()), steps, bool(self._under_way)))
        over = [row for row in rows if row not in before and self._is_over(row)]
        self._under_way.append(_UnderWay(tokens, log_probs, over))

    def collect(self) -> tuple[IntArray, FloatArray]:
        """See `DeviceBackend.collect`."""
        insist(bool(self._under_way), "a launch was collected, but none is under way")
        launch = self._under_way.popleft()
        self._known_over.update(launch.over)
        self.launches.append(Collected())
        return launch.tokens, launch.log_probs

    def discard(self) -> None:
        """See `DeviceBackend.discard`."""
        self._under_way.clear()

    def _next(self, slot: int, position: int) -> tuple[int, float]:
        """Let the row of a slot read what it chose last."""
        row = self._row(slot)
        if not self._is_over(row):
            return self._choose(self._read(slot, row.due, position), position)
        due = min(len(row.read), self.length - 1)
        insist(position == due, f"row {row.key} in slot {slot} was read at position {position}, not {due}")
        row.read.append(row.due)
        return int(self._garbage.choice(GARBAGE_TOKENS)), float(self._garbage.choice(GARBAGE_LOG_PROBS))

    def _row(self, slot: int) -> Pass:
        row = self._cross[slot] if slot < self.slots else None
        if row is None:
            raise AssertionError(f"slot {slot} was used before a row was admitted to it")
        return row

    def _is_over(self, row: Pass) -> bool:
        return len(row.read) >= min(len(row.script), self.length)
