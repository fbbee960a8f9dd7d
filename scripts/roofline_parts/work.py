"""Lets the runtime's own CPU backend do its work, each part for itself: encoding, admission, steps of many sizes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.errors import OptionError
from mt3_runtime.memory import first_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mt3_runtime.bundle import Bundle
    from roofline_parts.watched import Session, Watch

WARM, LEAST, MOST = 2, 3, 30  # runs: not counted, then counted
SETTLE = 0.03  # seconds in which threads that wait for work, spinning, give up
Key = tuple[str, int]  # a graph, and rows or segments


@dataclass(frozen=True, slots=True)
class Part:
    """Something that the backend does, for so many rows or segments; the time around sessions is `graph`'s."""

    graph: str
    count: int
    call: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one run: of the session alone, and of the Python around it."""

    session: float
    outside: float


class Work:
    """A backend with all its caches filled up to `position`.

    Raises:
        OptionError: the model has no such position.
    """

    def __init__(self, bundle: Bundle, watch: Watch, rows: Sequence[int], position: int, **options: Any) -> None:
        model, features = bundle.manifest.model, bundle.manifest.features
        self.backend = OrtBackend(bundle, slots=max(rows), **options)
        if not 0 <= position < self.backend.length:
            raise OptionError(f"--position {position} is not in 0..{self.backend.length - 1}: give one of these")
        self._watch, self._position = watch, position
        graphs = {spec.output_names[0]: spec.name for spec in bundle.manifest.contracts}
        self.sessions: list[tuple[str, Session]] = [
            (graphs[session.get_outputs()[0].name], session) for session in watch.sessions
        ]
        shape = (1, features.segment_frames, features.bins)
        noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        states = self.backend.encode(noise)[0][:1]  # of one row
        told = first_memory(model, 1)
        self._fill(states, told, model.start_token, max(rows))
        self.parts = [
            Part("encoder", 1, lambda: self.backend.encode(noise)),
            Part("cross_kv", 1, lambda: self.backend.admit(0, states, told)),
            *(Part("decode_step", count, self._step(count, model.start_token)) for count in rows),
        ]

    def measure(self, part: Part, seconds: float) -> dict[Key, Timing]:
        """Medians of as many calls as fit `seconds`, by graph."""
        before = [len(session.runs) for _, session in self.sessions]
        sleep(SETTLE)
        walls = self._call(part, seconds)
        times: dict[str, list[float]] = defaultdict(list)
        for (graph, session), first in zip(self.sessions, before, strict=True):
            times[graph] += [run.seconds for run in session.runs[first:] if run.count == part.count]
        medians = {graph: 1e3 * median(found[WARM:]) for graph, found in times.items() if found}
        outside = 1e3 * median(walls[WARM:]) - sum(medians.values())
        return {
            (graph, part.count): Timing(ms, max(0.0, outside) if graph == part.graph else 0.0)
            for graph, ms in medians.items()
        }

    def _call(self, part: Part, seconds: float) -> list[float]:
        walls: list[float] = []
        self._watch.count = part.count
        while len(walls) < WARM + LEAST or (len(walls) < WARM + MOST and sum(walls) < seconds):
            started = perf_counter()
            part.call()
            walls.append(perf_counter() - started)
        self._watch.count = 0
        return walls

    def _fill(self, states: Any, told: Any, start: int, rows: int) -> None:
        """Caches that were never written are all one page of zeros to the system, and fast: write them."""
        self.backend.admit(0, states, told)
        token = np.full(1, start, np.int32)
        for position in range(self._position):
            self.backend.step(token, np.full(1, position, np.int32))
        for row in range(1, rows):
            self.backend.move(0, row, self._position)

    def _step(self, rows: int, start: int) -> Callable[[], Any]:
        tokens, positions = np.full(rows, start, np.int32), np.full(rows, self._position, np.int32)
        return lambda: self.backend.step(tokens, positions)
