"""Sees every session that a backend opens and every run of it: the runtime itself is measured, not a copy of it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any
from unittest import mock

import onnx
import onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a session: for how many rows or segments, and how long."""

    count: int
    seconds: float


class Session:
    """An onnxruntime.InferenceSession that notes its runs."""

    def __init__(self, session: Any, model: bytes | str | Path, watch: Watch) -> None:
        self._session, self._watch = session, watch
        self._model = model
        self.runs: list[Run] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *arguments: Any, **options: Any) -> Any:
        """As InferenceSession's."""
        return self._timed(self._session.run, arguments, options)

    def run_with_iobinding(self, *arguments: Any, **options: Any) -> Any:
        """As InferenceSession's."""
        return self._timed(self._session.run_with_iobinding, arguments, options)

    def model(self) -> onnx.ModelProto:
        """The graph that it was given, large weights left where they are."""
        if isinstance(self._model, bytes):
            return onnx.load_from_string(self._model)
        return onnx.load(self._model, load_external_data=False)

    def _timed(self, run: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        started = perf_counter()
        result = run(*arguments, **options)
        self.runs.append(Run(self._watch.count, perf_counter() - started))
        return result


@dataclass(slots=True)
class Watch:
    """The sessions opened, in order; `count` is what runs are noted with: rows or segments, 0 for what is not meant."""

    count: int = 0
    sessions: list[Session] = field(default_factory=list)


@contextmanager
def watching(profiles: Path | None = None) -> Iterator[Watch]:
    """Watch every session opened inside; with `profiles` each one profiles its nodes into that folder."""
    make, watch, lock = onnxruntime.InferenceSession, Watch(), Lock()

    def opened(model: Any, sess_options: Any = None, *arguments: Any, **others: Any) -> Session:
        with lock:  # sessions made side by side would write to the same profile
            options = onnxruntime.SessionOptions() if sess_options is None else sess_options
            if profiles is not None:
                options.enable_profiling = True
                options.profile_file_prefix = str(profiles / f"session-{len(watch.sessions)}")
            watch.sessions.append(Session(make(model, options, *arguments, **others), model, watch))
            return watch.sessions[-1]

    with mock.patch.object(onnxruntime, "InferenceSession", opened):
        yield watch
