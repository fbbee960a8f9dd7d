"""Steps on their way: begun for all live rows at once, and read when they are done.

On a device a launch is several steps, each fed by the one before without the host. A row that ends inside one is cut
there; what the rest of that launch, and a launch that was begun before the host knew, compute for it is thrown away.
On the CPU a launch is one step, done when it returns.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, cast

import numpy as np

from mt3_runtime.rows import DecodingRules, Key, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.arrays import FloatArray, IntArray, RowStates
    from mt3_runtime.backends import AudioBackend, Backend, DeviceBackend
    from mt3_runtime.slots import Live


class End(NamedTuple, Generic[Key]):
    """A row that is over, and in which step of its launch that was."""

    step: int
    live: Live[Key]
    status: Status


class Launches(Generic[Key]):
    """The launches of one backend that were begun and not read yet, oldest first."""

    def __init__(self, backend: DeviceBackend, rules: DecodingRules) -> None:
        self._backend, self._rules = backend, rules
        self._under_way: deque[list[Live[Key]]] = deque()  # the row of each slot
        backend.discard()

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, slots: Sequence[Live[Key]]) -> bool:
        """Begin the next steps of every slot; False if no row can need another one.

        A row near its limit does not make them fewer for the others: it runs on and is cut, which costs nothing, as
        its slot is taken by nobody before the launch is read. When all are near theirs, a launch is as long as the
        longest needs, to a power of two: a device prepares every length that it meets.
        """
        needed = max((self._limit(live) - live.launched for live in slots), default=0)
        if needed <= 0:
            return False
        steps = min(self._backend.chunk, 1 << (needed - 1).bit_length())
        last = self._backend.length - 1
        self._backend.launch(np.fromiter((min(live.launched, last) for live in slots), np.int32), steps)
        self._under_way.append(list(slots))
        for live in slots:
            live.launched += steps
        return True

    def read(self) -> list[End[Key]]:
        """Wait for the oldest launch: the rows that are over now, in the order in which they ended."""
        tokens, log_probs = self._backend.collect()  # [steps, rows] each
        rows = self._under_way.popleft()
        stops = self._stops(rows, tokens, log_probs).tolist()
        ends: list[End[Key]] = []
        for live, stop, chosen, scores in zip(rows, stops, tokens.T.tolist(), log_probs.T.tolist(), strict=True):
            if live.is_over:
                continue
            room = self._limit(live) - len(live.tokens)
            kept = min(stop, room)
            live.tokens += chosen[:kept]
            live.log_probs += scores[:kept]
            if stop >= room:
                ends.append(End(room - 1, live, "truncated"))
            elif stop < len(chosen):
                ends.append(End(stop, live, "ended" if np.isfinite(scores[stop]) else "failed"))
        return sorted(ends, key=lambda end: end.step)  # and by slot: sorting is stable

    def _stops(self, rows: Sequence[Live[Key]], tokens: IntArray, log_probs: FloatArray) -> IntArray:
        """The first step of each row whose token is its end or not to be trusted; their number if there is none."""
        broken = ~np.isfinite(log_probs)
        ends = np.zeros_like(broken) if self._rules.end_token is None else tokens == self._rules.end_token
        if not self._rules.first_may_end:
            ends[0, [not live.tokens for live in rows]] = False
        stops: IntArray = np.concatenate([broken | ends, np.ones_like(broken[:1])]).argmax(0)
        return stops

    def _limit(self, live: Live[Key]) -> int:
        limit = live.row.limit
        return self._rules.max_tokens if limit is None else min(limit, self._rules.max_tokens)


class SteppedBackend:
    """A backend whose every step is fed by the host, as one that takes launches of one step."""

    chunk = 1

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.slots, self.length = backend.slots, backend.length
        self.device, self.provider = backend.device, backend.provider
        self.precision, self.threads = backend.precision, backend.threads
        self._next = np.zeros(backend.slots, np.int32)  # what each slot reads next
        self._result: tuple[IntArray, FloatArray] | None = None

    def encode(self, features: FloatArray) -> Any:
        """See `Backend.encode`."""
        return self._backend.encode(features)

    def admit(self, first: int, states: RowStates, memory: IntArray | None = None) -> None:
        """See `Backend.admit`."""
        self._backend.admit(first, states, memory)

    def step(self, tokens: IntArray, positions: IntArray) -> tuple[IntArray, FloatArray]:
        """See `Backend.step`."""
        return self._backend.step(tokens, positions)

    def seed(self, first: int, tokens: IntArray) -> None:
        """See `DeviceBackend.seed`."""
        self._next[first : first + len(tokens)] = tokens

    def move(self, source: int, target: int, length: int) -> None:
        """See `Backend.move`."""
        self._backend.move(source, target, length)
        self._next[target] = self._next[source]

    def launch(self, positions: IntArray, steps: int) -> None:
        """See `DeviceBackend.launch`; of one step, and done when this returns."""
        if steps != 1 or self._result is not None:
            raise AssertionError(f"{steps} steps were begun on a backend that takes them one at a time")
        count = len(positions)
        tokens, log_probs = self._backend.step(self._next[:count], positions)
        self._next[:count] = tokens
        self._result = tokens[None], log_probs[None]

    def collect(self) -> tuple[IntArray, FloatArray]:
        """See `DeviceBackend.collect`."""
        if self._result is None:
            raise AssertionError("nothing was begun")
        result, self._result = self._result, None
        return result

    def discard(self) -> None:
        """See `DeviceBackend.discard`."""
        self._result = None


def is_device(backend: Backend) -> bool:
    """Whether a backend takes launches by itself."""
    return hasattr(backend, "launch")


def audio_device(backend: Backend) -> AudioBackend | None:
    """The backend, if it computes features itself."""
    return cast("AudioBackend", backend) if getattr(backend, "takes_audio", False) else None


def launching(backend: Backend) -> DeviceBackend:
    """The backend as one that takes launches."""
    return cast("DeviceBackend", backend) if is_device(backend) else SteppedBackend(backend)
