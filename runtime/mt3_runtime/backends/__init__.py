"""What computes the graphs. A backend owns the caches; who decodes what and when is `decoding.py`'s business."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mt3_runtime.arrays import FloatArray, IntArray


class Backend(Protocol):
    """Encodes segments and steps rows. Slots 0..n-1 hold the n live rows; nothing else is ever computed.

    `slots` is how many rows fit, `length` how many tokens each may take.
    `device`, `provider`, `precision` and `threads` say what really runs.
    """

    slots: int
    length: int
    device: str
    provider: str
    precision: str
    threads: int

    def encode(self, features: FloatArray) -> FloatArray:
        """Features [segments, frames, bins] -> states [segments, channels, frames, d_model]."""

    def admit(self, first: int, states: FloatArray, memory: IntArray | None = None) -> None:
        """Give slots first, first+1, ... to new rows.

        Args:
            first: the first of the slots, which are neighbours.
            states: of the encoder [rows, frames, d_model].
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
