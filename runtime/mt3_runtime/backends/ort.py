"""The graphs on ONNX Runtime: one session a graph, caches allocated once, bound once for every number of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.backends.sessions import PROVIDER, import_onnxruntime, open_session, open_sessions
from mt3_runtime.errors import OptionError
from mt3_runtime.graphs import FEATURES, QUANTIZED
from mt3_runtime.machine import default_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.arrays import FloatArray, IntArray, RowStates
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.specs import MemorySpec

__all__ = ["LOWERING", "OrtBackend", "import_onnxruntime", "open_session", "without_fill"]

LOWERING = "ort"
ALONE = "int8"  # rounds by the largest number of a call: nobody else may be in it
MEMORY_STEP = 16  # tokens of a memory are counted in these, so that ONNX Runtime meets few different shapes


class OrtBackend:
    """Runs a bundle on the CPU.

    Every slot has its own stretch of every cache; slots 0..n-1 are one contiguous prefix, so that n live rows are a
    batch of n without a copy, and a step writes its keys and values where they stay.

    Raises:
        BundleError: see `open_sessions`.
        DependencyError: onnxruntime is not installed.
        OptionError: `slots` is not positive, or `length` is not in 1..max_length of the model.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        slots: int,
        length: int | None = None,
        threads: int | None = None,
        precision: str = "fp32",
    ) -> None:
        self._ort = import_onnxruntime()
        model, features = bundle.manifest.model, bundle.manifest.features
        self.slots, self.length = slots, model.max_length if length is None else length
        if slots < 1 or not 1 <= self.length <= model.max_length:
            raise OptionError(
                f"{slots} slots of {self.length} tokens: give 1 or more slots, and 1 to {model.max_length} tokens"
            )
        self.device, self.provider, self.precision = "cpu", PROVIDER, precision
        self.threads = threads or default_threads()
        self._contracts = {spec.name: spec for spec in bundle.manifest.contracts if spec.name != FEATURES}
        entries = [bundle.graph(name, LOWERING, precision) for name in self._contracts]
        self._sessions = open_sessions(bundle, entries, threads=self.threads)
        self._alone = precision == ALONE
        self._memory, self._prefix, layers = model.memory, model.prefix_length, model.decoder_layers
        cross = (slots, model.num_heads, features.segment_frames + model.extra_context, model.d_kv)
        own = (slots, model.num_heads, self._prefix + self.length, model.d_kv)
        try:
            # zeros, not empty: the system hands out zero pages lazily, so unused positions cost no memory
            self._cross = [np.zeros(cross, np.float32) for _ in range(2 * layers)]
            self._own = [np.zeros(own, np.float32) for _ in range(2 * layers)]
        except (MemoryError, ValueError, OverflowError):  # numpy's, of sizes that no memory has
            raise OptionError(f"there is no memory for {slots} slots of {self.length} tokens: give fewer") from None
        self._inputs = {name: np.zeros(slots, np.int32) for name in ("token", "position")}
        self._next_token, self._log_prob = np.zeros(slots, np.int32), np.zeros(slots, np.float32)
        self._bindings: dict[int, tuple[Any, list[Any]]] = {}
        # Rounding to 8 bits makes numbers of what is none: such rows are known by their states alone.
        self._hides, self._broken = precision in QUANTIZED, np.zeros(slots, bool)

    def encode(self, features: FloatArray) -> FloatArray:
        """See `Backend.encode`."""
        run = self._sessions["encoder"].run
        groups = np.split(features, len(features)) if self._alone else [features]
        states = [run(["states"], {"features": group})[0] for group in groups]
        return states[0] if len(states) == 1 else np.concatenate(states)

    def admit(self, first: int, states: RowStates, memory: IntArray | None = None) -> None:
        """See `Backend.admit`.

        Raises:
            OptionError: `memory` is not what the model asks for.
        """
        count, given = len(states), None if memory is None else memory.shape
        asked = (count, self._memory.span) if self._memory else None
        if given != asked:
            fix = f"one of shape {asked}" if asked else "none"
            raise OptionError(f"{count} rows came with a memory of shape {given}: give them {fix}")
        inputs = [np.ascontiguousarray(states, np.float32)]
        if memory is not None and self._memory:
            inputs.append(self._recall(memory, self._memory))
        if self._hides:
            self._broken[first : first + count] = ~np.isfinite(inputs[0]).all((1, 2))
        names = self._contracts["cross_kv"].input_names
        for slot, group in self._groups(first, inputs):
            self._fill_cross(slot, len(group[0]), dict(zip(names, group, strict=False)))  # a prefix goes elsewhere
            if self._prefix:
                self._fill_prefix(slot, group[1])

    def step(self, tokens: IntArray, positions: IntArray) -> tuple[IntArray, FloatArray]:
        """See `Backend.step`."""
        count = len(tokens)
        self._inputs["token"][:count] = tokens
        np.add(positions, self._prefix, out=self._inputs["position"][:count])
        if count not in self._bindings:
            self._bindings[count] = self._bind(count)
        self._sessions["decode_step"].run_with_iobinding(self._bindings[count][0])
        self._log_prob[:count][self._broken[:count]] = np.nan
        return self._next_token[:count], self._log_prob[:count]

    def move(self, source: int, target: int, length: int) -> None:
        """See `Backend.move`."""
        self._broken[target] = self._broken[source]
        for cache in self._cross:
            cache[target] = cache[source]
        for cache in self._own:
            cache[target, :, : self._prefix + length] = cache[source, :, : self._prefix + length]

    def _groups(self, first: int, inputs: Sequence[FloatArray]) -> list[tuple[int, list[FloatArray]]]:
        """What rows from slot `first` on are computed from, together or one by one: the first slot of each group."""
        if not self._alone:
            return [(first, list(inputs))]
        return [(first + i, [array[i : i + 1] for array in inputs]) for i in range(len(inputs[0]))]

    def _recall(self, memory: IntArray, spec: MemorySpec) -> FloatArray:
        """Vectors of memory [rows, length, d_model], row by row: no row is computed differently for its neighbours."""
        run = self._sessions["memory"].run
        return np.concatenate([run(["memory"], {"tokens": without_fill(tokens, spec)[None]})[0] for tokens in memory])

    def _fill_cross(self, first: int, count: int, inputs: dict[str, FloatArray]) -> None:
        session = self._sessions["cross_kv"]
        binding, values = session.io_binding(), []
        for name, array in inputs.items():
            values.append(self._value(array))
            binding.bind_ortvalue_input(name, values[-1])
        for name, cache in zip(self._contracts["cross_kv"].output_names, self._cross, strict=True):
            values.append(self._value(cache[first : first + count]))
            binding.bind_ortvalue_output(name, values[-1])
        session.run_with_iobinding(binding)

    def _fill_prefix(self, first: int, vectors: FloatArray) -> None:
        """Write the first positions of the rows' own caches, a stretch that the graph cannot write in place."""
        spec, rows = self._contracts["prefix"], slice(first, first + len(vectors))
        inputs = [vectors, *(cache[rows] for cache in self._cross)]
        outputs = self._sessions["prefix"].run(spec.output_names, dict(zip(spec.input_names, inputs, strict=True)))
        for cache, array in zip(self._own, outputs, strict=True):
            cache[rows, :, : self._prefix] = array

    def _bind(self, count: int) -> tuple[Any, list[Any]]:
        """Bind every tensor of a step over `count` rows; the list keeps the values alive."""
        binding, values = self._sessions["decode_step"].io_binding(), []

        def bind(names: Sequence[str], arrays: Sequence[np.ndarray], how: Any) -> None:
            for name, array in zip(names, arrays, strict=True):
                values.append(self._value(array[:count]))
                how(name, values[-1])

        spec, layers = self._contracts["decode_step"], len(self._own)
        inputs, outputs = spec.input_names, spec.output_names
        bind(inputs[:2], list(self._inputs.values()), binding.bind_ortvalue_input)
        bind(inputs[2 : 2 + layers], self._cross, binding.bind_ortvalue_input)
        bind(inputs[2 + layers :], self._own, binding.bind_ortvalue_input)
        bind(outputs[:2], [self._next_token, self._log_prob], binding.bind_ortvalue_output)
        bind(outputs[2 : 2 + layers], self._own, binding.bind_ortvalue_output)  # in place
        return binding, values

    def _value(self, array: np.ndarray) -> Any:
        """An OrtValue over the array's own memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(array)


def without_fill(tokens: IntArray, memory: MemorySpec) -> IntArray:
    """A row of memory [span] without most of the fill at its end, which is in the graph: see `memory_spec`."""
    used = np.flatnonzero(tokens != memory.fill_token)
    written = max(memory.length, int(used[-1]) + 1 if used.size else 0)
    return tokens[: -(-written // MEMORY_STEP) * MEMORY_STEP]
