"""Rows on a GPU: which buffers there are, what is asked of the device, and in which order. No CUDA in here.

Slots are rounded up to a bucket (1, 2, 4, ... rows), so that every number of live rows finds its own among a few
shapes; the rows between the two decode nothing in slots that nobody has. Token ids stand in a matrix T: row i is what
step i reads, row i + 1 what it chooses, so that a token is fed back where it was written; the last row of a launch is
copied to row 0, which is what the next one reads. A launch of the same shape as one before is captured, where the
graphs allow that, and then costs one command.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mt3_runtime.backends.device_segments import SegmentsOnDevice, check_memory
from mt3_runtime.backends.gpu import DeviceTensor, aligned, contiguous
from mt3_runtime.backends.gpu_buffers import allocate_caches, copy_slots
from mt3_runtime.errors import DeviceError, DeviceLostError, OptionError
from mt3_runtime.graphs import HALVES

if TYPE_CHECKING:
    from collections.abc import Callable

    from mt3_runtime.arrays import FloatArray, IntArray, RowStates
    from mt3_runtime.backends.gpu import Gpu, Graphs
    from mt3_runtime.backends.gpu_buffers import Caches
    from mt3_runtime.graphs import Precision
    from mt3_runtime.manifest import Manifest

CACHE_LENGTHS = (256, 512)  # positions, besides those of the longest row
UNDER_WAY = 2  # launches
WORD = 4  # bytes of an id, a position or a log-probability


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """How a backend decodes; `chunk` steps a launch at most. `capture`: see `Gpu.capture`."""

    slots: int
    length: int | None = None
    precision: Precision = "fp16"
    chunk: int = 16
    capture: bool = True


@dataclass(frozen=True, slots=True)
class _Launch:
    """One that was not collected: which of the two buffers its results come to, and their shape."""

    half: int
    steps: int
    rows: int


def bucket_of(rows: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (rows - 1).bit_length()


class DeviceRows:
    """A `DeviceBackend` over a `Gpu` and `Graphs`; see `backends/__init__.py` for what its methods promise.

    `device`, `provider`, `gpu_name`: what really runs, and where. `captured`: how many launches were captured so far;
    `capture_problem`: why none are any more.

    Raises:
        OptionError: `slots` is not positive or more than the graphs take, or `length` is not in 1..max_length.
        OutOfMemoryError: the device has no room for so many slots.
    """

    def __init__(
        self, manifest: Manifest, gpu: Gpu, graphs: Graphs, options: DeviceOptions, *, device: str, provider: str
    ) -> None:
        model = manifest.model
        self.slots, self.length = options.slots, model.max_length if options.length is None else options.length
        self.device, self.provider, self.gpu_name = device, provider, gpu.name
        self.precision, self.chunk, self.threads, self.captured = options.precision, options.chunk, 1, 0
        self.capture_problem = ""
        self._gpu, self._graphs, self._capture = gpu, graphs, options.capture and graphs.captures
        self._bound: dict[tuple[int, int, int], Callable[[], None]] = {}  # by rows, length and number of the step
        self._replays: dict[tuple[int, int, int], Callable[[], None] | None] = {}  # by rows, length and steps
        self._closer = weakref.finalize(self, give_back, gpu, graphs, self._bound, self._replays)
        self._prefix, self._memory = model.prefix_length, model.memory
        self._capacity = bucket_of(max(self.slots, 1))
        self._lengths = self._checked_lengths(model.max_length)
        self._contract = next(spec for spec in manifest.contracts if spec.name == "decode_step").typed(self.precision)
        half, layers = HALVES[self.precision], 2 * model.decoder_layers
        heads, width, frames = model.num_heads, model.d_kv, manifest.features.segment_frames + model.extra_context
        self._cross = allocate_caches(gpu, half, (layers, self._capacity, heads, frames, width))
        self._own = {
            length: allocate_caches(gpu, half, (layers, self._capacity, heads, length, width))
            for length in self._lengths
        }
        self._current = self._own[self._lengths[0]]
        self._segments = SegmentsOnDevice(manifest, gpu, graphs, self.precision, self._capacity)
        self._set_up_steps()

    def _checked_lengths(self, most: int) -> list[int]:
        """Cache lengths in positions, rising; the last one holds the longest row."""
        if self.slots < 1 or not 1 <= self.length <= most:
            raise OptionError(
                f"{self.slots} slots of {self.length} tokens: give 1 or more slots, and 1 to {most} tokens"
            )
        if self._graphs.rows is not None and self._capacity > self._graphs.rows:
            raise OptionError(
                f"{self.slots} slots take {self._capacity} rows, but the engines were built for {self._graphs.rows}: "
                "use fewer slots, or build engines with a profile for more rows"
            )
        positions = self._prefix + self.length
        given = self._graphs.lengths
        if given is None:
            return [length for length in CACHE_LENGTHS if length < positions] + [positions]
        enough = [length for length in given if length >= positions]
        if not enough:
            raise OptionError(
                f"rows of {self.length} tokens take {positions} positions, but the engines have at most {max(given)}: "
                "build them for longer caches, or ask for fewer tokens"
            )
        return [length for length in given if length < positions] + enough[:1]

    def _set_up_steps(self) -> None:
        """T [chunk + 1, line], log-probabilities [chunk, line] right behind it, positions [chunk, line].

        A line holds the capacity, and starts where a graph can be bound to it.
        """
        gpu, line = self._gpu, aligned(self._capacity * WORD)
        self._line = line
        self._tokens = gpu.allocate((2 * self.chunk + 1) * line)
        self._log_probs = self._tokens + (self.chunk + 1) * line
        self._positions = gpu.allocate(self.chunk * line)
        for address, lines in ((self._tokens, 2 * self.chunk + 1), (self._positions, self.chunk)):
            gpu.clear(contiguous(address, lines * line))
        self._places = [gpu.pinned(self.chunk * line).view(np.int32).reshape(self.chunk, -1) for _ in range(UNDER_WAY)]
        self._results = [gpu.pinned(2 * self.chunk * line) for _ in range(UNDER_WAY)]
        self._events = [gpu.event() for _ in range(UNDER_WAY)]
        self._launches: deque[_Launch] = deque()
        self._count = 0

    def encode(self, features: FloatArray) -> Any:
        """See `Backend.encode`."""
        return self._segments.encode(features)

    @property
    def takes_audio(self) -> bool:
        """See `AudioBackend.takes_audio`."""
        return self._segments.takes_audio

    def encode_audio(self, samples: FloatArray, frames: IntArray) -> Any:
        """See `AudioBackend.encode_audio`."""
        return self._segments.encode_audio(samples, frames)

    def admit(self, first: int, states: RowStates, memory: IntArray | None = None) -> None:
        """See `Backend.admit`.

        Whatever failed in these slots before, or ran on past its end, is cleared away: zero times NaN is NaN.

        Raises:
            OptionError: `memory` is not what the model asks for.
        """
        count = len(states)
        if not 0 <= first < first + count <= self.slots:
            raise AssertionError(f"{count} rows do not fit from slot {first} of {self.slots}")
        check_memory(self._memory, count, memory)
        self._gpu.clear(self._current.rows(first, count))
        self._segments.fill(self._cross, self._current, first, states, memory)

    def seed(self, first: int, tokens: IntArray) -> None:
        """See `DeviceBackend.seed`."""
        self._segments.uploads.send(np.asarray(tokens, np.int32), self._tokens + first * WORD)

    def move(self, source: int, target: int, length: int) -> None:
        """See `Backend.move`.

        All of a slot goes, not only `length` tokens: that is one command for all layers, and what failed in the target
        before is gone.
        """
        if not (0 <= source < self.slots and 0 <= target < self.slots and source != target and length >= 0):
            raise AssertionError(f"{length} tokens cannot go from slot {source} to slot {target} of {self.slots}")
        for caches in (self._cross, self._current):
            out_of = caches.rows(source, 1)
            self._gpu.copy(caches.rows(target, 1), out_of.address, out_of.pitch)
        self._gpu.copy(contiguous(self._tokens + target * WORD, WORD), self._tokens + source * WORD, WORD)

    def launch(self, positions: IntArray, steps: int) -> None:
        """See `DeviceBackend.launch`."""
        rows = len(positions)
        if not (0 < rows <= self.slots and 0 < steps <= self.chunk and len(self._launches) < UNDER_WAY):
            raise AssertionError(f"{steps} steps of {rows} rows with {len(self._launches)} launches under way")
        half = self._count % UNDER_WAY
        last = self._prefix + self.length - 1
        ahead = self._prefix + np.arange(steps, dtype=np.int32)[:, None]
        places = self._places[half]  # free again: the launch before the last was collected
        places[:steps] = 0
        np.minimum(np.asarray(positions, np.int32) + ahead, last, out=places[:steps, :rows])
        self._fit(int(places[:steps, :rows].max()) + 1, rows)
        self._gpu.upload(self._positions, places[:steps].reshape(-1))
        self._enqueue(bucket_of(rows), steps)
        self._gpu.download(self._results[half], self._tokens + self._line)
        self._gpu.record(self._events[half])
        self._launches.append(_Launch(half, steps, rows))
        self._count += 1

    def collect(self) -> tuple[IntArray, FloatArray]:
        """See `DeviceBackend.collect`."""
        if not self._launches:
            raise AssertionError("there is no launch to collect")
        launch = self._launches.popleft()
        self._gpu.wait(self._events[launch.half])
        words = self._results[launch.half].reshape(2, self.chunk, -1)
        inside = np.s_[: launch.steps, : launch.rows]
        return words[0].view(np.int32)[inside], words[1].view(np.float32)[inside]

    def discard(self) -> None:
        """See `DeviceBackend.discard`."""
        while self._launches:
            self._gpu.wait(self._events[self._launches.popleft().half])  # its buffers are written until then

    def step(self, tokens: IntArray, positions: IntArray) -> tuple[IntArray, FloatArray]:
        """See `Backend.step`."""
        self.seed(0, tokens)
        self.launch(positions, 1)
        found, log_probs = self.collect()
        return found[0].copy(), log_probs[0].copy()  # they outlive the memory that results come to

    @property
    def gpu(self) -> Gpu:
        """The device."""
        return self._gpu

    @property
    def graphs(self) -> Graphs:
        """What runs on it."""
        return self._graphs

    def caches(self) -> tuple[Caches, Caches]:
        """Of cross-attention, and of self-attention as they are now: for checks that look at them or spoil them."""
        return self._cross, self._current

    def synchronize(self) -> None:
        """Wait for everything that was asked for."""
        self._gpu.synchronize()

    def close(self) -> None:
        """Give back what the device holds; without it that is done when nobody holds the backend."""
        self._closer()

    def _fit(self, positions: int, rows: int) -> None:
        """Have the live rows in the shortest caches that hold so many positions."""
        length = next(length for length in self._lengths if length >= positions)
        if (wanted := self._own[length]) is not self._current:
            copy_slots(self._gpu, wanted, self._current, rows)
            self._current = wanted

    def _enqueue(self, rows: int, steps: int) -> None:
        """Ask for the steps: by hand at first, which warms them up, then captured."""
        key = rows, self._current.shape[3], steps
        if not self._capture or key not in self._replays:
            self._run_steps(rows, steps)
            self._replays[key] = None
            return
        replay = self._replays[key] or self._captured(rows, steps)
        if replay is None:
            self._run_steps(rows, steps)
        else:
            self._replays[key] = replay
            replay()

    def _captured(self, rows: int, steps: int) -> Callable[[], None] | None:
        """The steps as one command; None, for ever after, if the device refuses to capture them: it only costs time."""
        try:
            replay = self._gpu.capture(lambda: self._run_steps(rows, steps))
        except DeviceLostError:
            raise
        except DeviceError as error:
            self._capture, self.capture_problem = False, str(error)
            return None
        self.captured += 1
        return replay

    def _run_steps(self, rows: int, steps: int) -> None:
        length = self._current.shape[3]
        for number in range(steps):
            key = rows, length, number
            if key not in self._bound:
                self._bound[key] = self._graphs.bind("decode_step", self._tensors(rows, number))
            self._bound[key]()
        self._gpu.copy(contiguous(self._tokens, rows * WORD), self._tokens + steps * self._line, rows * WORD)

    def _tensors(self, rows: int, number: int) -> list[DeviceTensor]:
        """All inputs and outputs of one step but the logits, which only a check wants."""
        layers, line = self._cross.shape[0], number * self._line
        inputs, outputs = self._contract.input_names, self._contract.output_names
        return [
            DeviceTensor("token", "int32", (rows,), self._tokens + line),
            DeviceTensor("position", "int32", (rows,), self._positions + line),
            *self._cross.tensors(inputs[2 : 2 + layers], 0, rows),
            *self._current.tensors(inputs[2 + layers :], 0, rows),
            DeviceTensor("next_token", "int32", (rows,), self._tokens + line + self._line),
            DeviceTensor("log_prob", "float32", (rows,), self._log_probs + line),
            *self._current.tensors(outputs[2 : 2 + layers], 0, rows),  # in place
        ]


def give_back(gpu: Gpu, graphs: Graphs | None, *bound: dict[Any, Any]) -> None:
    """First what runs on the device, when it is through, then the device."""
    with suppress(DeviceError):  # of one that is lost, the rest is given back all the same
        gpu.synchronize()
    for calls in bound:
        calls.clear()
    if graphs:
        graphs.close()
    gpu.close()
