"""What computes the graphs. A backend owns the caches; who decodes what and when is `decoding.py`'s business."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mt3_runtime.arrays import FloatArray, IntArray, RowStates


class Backend(Protocol):
    """Encodes segments and steps rows. Slots 0..n-1 hold the n live rows; nothing else is ever computed.

    `slots` is how many rows fit, `length` how many tokens each may take.
    `device`, `provider`, `precision` and `threads` say what really runs.
    """

    slots: int
    length: int
    device: str
    provider: str
    threads: int

    @property
    def precision(self) -> str:
        """Of the graphs that run."""

    def encode(self, features: FloatArray) -> Any:
        """Features [segments, frames, bins] -> states, indexed [segment][channel]; each means something to `admit`.

        On the CPU an array [segments, channels, frames, d_model]. On a device they stay there, as long as somebody
        holds them.
        """

    def admit(self, first: int, states: RowStates, memory: IntArray | None = None) -> None:
        """Give slots first, first+1, ... to new rows.

        Args:
            first: the first of the slots, which are neighbours.
            states: what `encode` gave for each row [rows].
            memory: what each row is told of the segment before it, int32 [rows, span of the memory], for models that
                have one (see `MemorySpec`).
        """

    def step(self, tokens: IntArray, positions: IntArray) -> tuple[IntArray, FloatArray]:
        """Decode one token of slots 0..n-1.

        Args:
            tokens: int32 [n], what each row reads.
            positions: int32 [n], how many tokens it has read before.

        Returns:
            Next tokens int32 [n] and their log-probabilities float32 [n], NaN where a logit was not finite.
            Both are overwritten by the next call.
        """

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the row in slot `source`, `length` tokens long, to slot `target`."""


class DeviceBackend(Backend, Protocol):
    """Steps rows several tokens at a time, each fed back where it was computed; the host reads results afterwards.

    Calls are carried out in the order in which they are made, `launch` without waiting: at most two launches are under
    way. A row that has ended goes on in the launches that were made before the host knew; what comes of that is
    nobody's, and never reaches beyond the row's own slot.
    `chunk` is how many steps a launch takes best.
    """

    chunk: int

    def seed(self, first: int, tokens: IntArray) -> None:
        """Say what slots first, first+1, ... read in their next step, int32 [rows]: their rows were just admitted."""

    def launch(self, positions: IntArray, steps: int) -> None:
        """Begin `steps` steps of slots 0..n-1, each of which reads what its last step chose, or its seed.

        Args:
            positions: int32 [n], how many tokens each has read before the first of these steps. They go up by one with
                every step, and stop at the last place of the cache.
            steps: 1 to `chunk`.
        """

    def collect(self) -> tuple[IntArray, FloatArray]:
        """Wait for the oldest launch that was not collected.

        Returns:
            What every step chose, int32 [steps, n], and its log-probabilities, float32 [steps, n], NaN where a logit
            was not finite. Both are overwritten by the launch after the next.
        """

    def discard(self) -> None:
        """Forget every launch that was not collected: whoever made them was stopped in between."""


class AudioBackend(Protocol):
    """What a `DeviceBackend` may be besides: one that computes features itself."""

    @property
    def takes_audio(self) -> bool:
        """Whether there is `encode_audio`."""

    def encode_audio(self, samples: FloatArray, frames: IntArray) -> Any:
        """`encode` from samples, so that only audio is sent to the device.

        Args:
            samples: float32 [segments, segment_samples], which the host's front end would take.
            frames: int32 [segments], how many frames of each are real.
        """
