"""The backend of the CPU with its logits to be seen, and its graphs one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.backends.ort import OrtBackend

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mt3_runtime.arrays import FloatArray, IntArray
    from mt3_runtime.bundle import Bundle

SLOTS = 16  # rows told side by side


class LogitsBackend(OrtBackend):
    """As `OrtBackend`; `logits` [slots, vocab] are those of the last step."""

    def __init__(self, bundle: Bundle, *, slots: int, threads: int | None, precision: str, length: int) -> None:
        super().__init__(bundle, slots=slots, length=length, threads=threads, precision=precision)
        self.logits: FloatArray = np.zeros((slots, bundle.manifest.model.vocab_size), np.float32)

    def _bind(self, count: int) -> tuple[Any, list[Any]]:
        binding, values = super()._bind(count)
        values.append(self._value(self.logits[:count]))
        binding.bind_ortvalue_output("logits", values[-1])
        return binding, values

    def run(self, graph: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All outputs of one graph; rows go through it as in use, alone or together."""
        spec = self._contracts[graph]
        groups = [[array[i : i + 1] for array in inputs] for i in range(len(inputs[0]))] if self._alone else [inputs]
        found = [
            self._sessions[graph].run(spec.output_names, dict(zip(spec.input_names, group, strict=True)))
            for group in groups
        ]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def inputs_of(self, sources: Sequence[np.ndarray]) -> Iterator[tuple[str, list[np.ndarray]]]:
        """Graphs between encoder and decoder with their inputs; `sources`: states of rows, and vectors of memory."""
        wanted = len(self._contracts["cross_kv"].inputs)
        inputs = list(sources[:wanted])
        yield "cross_kv", inputs
        if self._prefix:
            yield "prefix", [sources[-1], *self.run("cross_kv", inputs)]

    def remember(self, memory: IntArray) -> FloatArray:
        """Vectors of memory [rows, length, d_model] of what rows are told, int32 [rows, span]."""
        if self._memory is None:
            raise TypeError("this model has no memory")
        return self._recall(memory, self._memory)

    def put(self, cross: Sequence[np.ndarray], prefix: Sequence[np.ndarray]) -> None:
        """Give slots 0..n-1 what another backend made: keys and values of cross-attention, and of a prefix."""
        for cache, array in zip(self._cross, cross, strict=True):
            cache[: len(array)] = array
        for cache, array in zip(self._own, prefix, strict=False):  # of most models there is none
            cache[: len(array), :, : self._prefix] = array
        self._broken[:] = False

    def held(self, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Copies of what slots 0..count-1 hold: for `put`."""
        prefix = [cache[:count, :, : self._prefix].copy() for cache in self._own] if self._prefix else []
        return [cache[:count].copy() for cache in self._cross], prefix


def open_backend(bundle: Bundle, precision: str, length: int, threads: int) -> LogitsBackend:
    """With room for so many steps; `threads`: of the CPU, 0 for all."""
    return LogitsBackend(bundle, slots=SLOTS, threads=threads or None, precision=precision, length=length)
