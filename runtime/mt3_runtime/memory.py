"""What every segment of one piece of audio is told of the segment before it (MR-MT3 `models/t5_segmem*.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from mt3_runtime.arrays import IntArray
    from mt3_runtime.rows import DecodedRow
    from mt3_runtime.specs import MemorySpec, ModelSpec


class SongMemory:
    """The tokens of the last segment that was decoded, for the next one.

    A segment reads start token, tokens and end token of the one before it, or as many of them as fit the span. One that
    was truncated has no end token, and that too is what the authors' code does. One that failed tells nothing that can
    be relied on: the next segment is told what the first one is, as if the audio began there (`has_restarted`).
    """

    def __init__(self, model: ModelSpec, memory: MemorySpec) -> None:
        self._model, self._memory = model, memory
        self._next, self._ids = 0, _filled(memory, memory.first_tokens)
        self.has_restarted = False

    def ids_for(self, segment: int) -> IntArray | None:
        """What `segment` is told, int32 [span]; None while the segment before it is being decoded."""
        return self._ids if segment == self._next else None

    def keep(self, segment: int, row: DecodedRow[Any]) -> None:
        """Take what became of `segment`, which was the next one."""
        self._next, self.has_restarted = segment + 1, row.status == "failed"
        if self.has_restarted:
            self._ids = _filled(self._memory, self._memory.first_tokens)
        else:
            end = [self._model.end_token] if row.status == "ended" else []
            self._ids = _filled(self._memory, [self._model.start_token, *row.tokens.tolist(), *end])


def first_ids(model: ModelSpec) -> IntArray | None:
    """What the first segment of a piece of audio is told, int32 [span]; None without a memory."""
    return _filled(model.memory, model.memory.first_tokens) if model.memory else None


def first_memory(model: ModelSpec, rows: int) -> IntArray | None:
    """The same for the first segments of `rows` pieces, int32 [rows, span]."""
    ids = first_ids(model)
    return None if ids is None else np.tile(ids, (rows, 1))


def _filled(memory: MemorySpec, tokens: Sequence[int]) -> IntArray:
    ids = np.full(memory.span, memory.fill_token, np.int32)
    ids[: len(tokens)] = tokens[: len(ids)]
    return ids
