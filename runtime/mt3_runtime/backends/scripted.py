"""Replays given token ids in place of a network, and checks every call: for tests of who decodes what, and when."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mt3_runtime.errors import OptionError
from mt3_runtime.vocabulary import END_TOKEN, PAD_TOKEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mt3_runtime.arrays import FloatArray, IntArray, RowStates

    Script: TypeAlias = Sequence[int | float]

LOG_PROB_STEPS = 1024  # the log-probability of token t is -t / 1024, exact in float32


@dataclass(frozen=True, slots=True)
class Admitted:
    """Rows with these keys took the slots from `first` on, each told of these tokens, if of any."""

    first: int
    keys: tuple[int, ...]
    memories: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Stepped:
    """One token of slots 0..n-1: the rows they held, what each read and where."""

    keys: tuple[int, ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """A row went from one slot to another."""

    source: int
    target: int
    length: int


@dataclass(slots=True, eq=False)
class Pass:
    """A row from one admission on: what it replays, what it has to read next, and all it has read."""

    key: int
    script: Script
    due: int
    read: list[int] = field(default_factory=list)


class ScriptedBackend:
    """A `Backend` without a network.

    A row's key is the first number of its states; `encode` makes such states and numbers the channels of all segments
    0, 1, 2, ... in the order in which they come, over all calls. A row replays `scripts[key]`, and `retries[key]`,
    where given, from its second admission on. A value that is not finite comes out as the log-probability of an end
    token: what arg-max makes of such logits is arbitrary, and an end is the worst.

    Caches are simulated, stale entries included: a step is refused unless each slot holds exactly what its row has
    read. Every call that was accepted stands in `calls`.

    Raises:
        OptionError: `slots` or `length` is not positive, or a finite number of a script is not whole.
        AssertionError: a call that breaks the contract of `Backend`, a fault of the code under test.
    """

    def __init__(
        self,
        scripts: Mapping[int, Script],
        *,
        retries: Mapping[int, Script] | None = None,
        slots: int = 8,
        length: int = 1024,
        start_token: int = PAD_TOKEN,
        channels: int = 1,
    ) -> None:
        if slots < 1 or length < 1:
            raise OptionError(f"{slots} slots of {length} positions hold no row: give 1 or more of each")
        self.slots, self.length = slots, length
        self.device, self.provider, self.precision, self.threads = "scripted", "ScriptedBackend", "fp32", 1
        self.calls: list[Admitted | Stepped | Moved] = []
        self._scripts, self._retries = dict(scripts), dict(retries or {})
        for key, script in (*self._scripts.items(), *self._retries.items()):
            if not all(value == int(value) for value in script if math.isfinite(value)):
                raise OptionError(f"the script of row {key} holds a fraction: give token ids and NaN")
        self._start_token, self._channels, self._encoded, self._admissions = start_token, channels, 0, Counter[int]()
        self._cross: list[Pass | None] = [None] * slots
        self._own: list[list[tuple[Pass, int] | None]] = [[None] * length for _ in range(slots)]
        self._next_token, self._log_prob = np.zeros(slots, np.int32), np.zeros(slots, np.float32)

    def encode(self, features: FloatArray) -> FloatArray:
        """See `Backend.encode`; the states are the keys alone [segments, channels, 1, 1]."""
        keys = self._encoded + np.arange(len(features) * self._channels, dtype=np.float32)
        self._encoded += len(keys)
        return keys.reshape(len(features), self._channels, 1, 1)

    def admit(self, first: int, states: RowStates, memory: IntArray | None = None) -> None:
        """See `Backend.admit`."""
        keys = tuple(int(key) for key in np.asarray(states)[:, 0, 0])
        insist(memory is None or (len(memory) == len(keys) and memory.dtype == np.int32), "memory of other rows")
        insist(bool(keys) and 0 <= first <= self.slots - len(keys), f"{len(keys)} rows do not fit from slot {first}")
        for slot, key in enumerate(keys, start=first):
            insist(key in self._scripts, f"row {key} has no script")
            scripts = self._retries if self._admissions[key] and key in self._retries else self._scripts
            self._admissions[key] += 1
            self._cross[slot] = Pass(key, scripts[key], due=self._start_token)
        self.calls.append(Admitted(first, keys, () if memory is None else tuple(map(tuple, memory.tolist()))))

    def step(self, tokens: IntArray, positions: IntArray) -> tuple[IntArray, FloatArray]:
        """See `Backend.step`."""
        count = len(tokens)
        insist(0 < count == len(positions) <= self.slots, f"{count} tokens at {len(positions)} positions")
        insist(tokens.dtype == positions.dtype == np.int32, f"{tokens.dtype} tokens at {positions.dtype} positions")
        self._next_token.fill(-1)
        self._log_prob.fill(np.nan)
        for slot, (token, position) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            self._next_token[slot], self._log_prob[slot] = self._choose(self._read(slot, token, position), position)
        self.calls.append(Stepped(self._keys(count), tuple(tokens.tolist()), tuple(positions.tolist())))
        return self._next_token[:count], self._log_prob[:count]

    def move(self, source: int, target: int, length: int) -> None:
        """See `Backend.move`."""
        inside = 0 <= source < self.slots and 0 <= target < self.slots and 0 <= length <= self.length
        insist(inside and source != target, f"{length} positions cannot go from slot {source} to slot {target}")
        insist(self._cross[source] is not None, f"slot {source} was moved before a row was admitted to it")
        self._cross[target] = self._cross[source]
        self._own[target][:length] = self._own[source][:length]
        self.calls.append(Moved(source, target, length))

    def _keys(self, count: int) -> tuple[int, ...]:
        """The rows in slots 0..n-1."""
        return tuple(row.key for row in self._cross[:count] if row is not None)

    @staticmethod
    def _choose(row: Pass, position: int) -> tuple[int, float]:
        """The next token of a row's script, and its log-probability."""
        value = row.script[position]
        row.due = int(value) if math.isfinite(value) else END_TOKEN
        return row.due, -row.due / LOG_PROB_STEPS if math.isfinite(value) else value

    def _read(self, slot: int, token: int, position: int) -> Pass:
        """Let the row of a slot read one token, as attention would: everything up to `position`."""
        row = self._cross[slot]
        if row is None:
            raise AssertionError(f"slot {slot} was stepped before a row was admitted to it")
        where = f"row {row.key} in slot {slot}"
        insist(position == len(row.read), f"{where} was read at position {position}, not {len(row.read)}")
        insist(token == row.due, f"{where} read token {token} at {position}, not its own {row.due}")
        insist(position < min(len(row.script), self.length), f"{where} was stepped after the end of its script")
        row.read.append(token)
        self._own[slot][position] = (row, token)
        seen = self._own[slot][: position + 1]
        insist(seen == [(row, own) for own in row.read], f"{where} sees a cache that is not its own")
        return row


def insist(condition: bool, broken: str) -> None:
    """Raise AssertionError with `broken` unless `condition` holds."""
    if not condition:
        raise AssertionError(broken)
