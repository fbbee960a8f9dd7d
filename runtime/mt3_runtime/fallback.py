"""Second attempts on another backend: rows with numbers that are not finite in half precision, in full precision."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, Protocol

from mt3_runtime.rows import DecodedRow, Key, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mt3_runtime.backends import Backend


class Decoder(Protocol[Key]):
    """What is used of a `RowDecoder`."""

    is_idle: bool

    def advance(self) -> list[DecodedRow[Key]]:
        """Go on by one launch."""


class SecondAttempts(Generic[Key]):
    """Rows that failed where they were decoded first, on a backend that is made when there is one.

    Each is encoded there, too. As long as there are any, every call of `advance` takes one step of theirs, so that
    nobody waits for them.

    Args:
        backend: makes it, or gives the one that was made before.
        decoder: makes what decodes the rows of an iterator on it, None where none is ready.
    """

    def __init__(
        self,
        backend: Callable[[], Backend],
        decoder: Callable[[Backend, Iterator[Row[Key] | None]], Decoder[Key]],
    ) -> None:
        self._make, self._make_decoder = backend, decoder
        self._decoder: Decoder[Key] | None = None
        self._waiting: deque[Row[Key]] = deque()
        self._spent: dict[Key, float] = {}  # seconds of the first attempt

    @property
    def is_idle(self) -> bool:
        """Whether there is no such row."""
        return not self._waiting and (self._decoder is None or self._decoder.is_idle)

    def add(self, row: Row[Key], seconds: float) -> None:
        """Take a row that failed after `seconds`."""
        self._waiting.append(row)
        self._spent[row.key] = seconds

    def advance(self) -> list[DecodedRow[Key]]:
        """Go on by one step: the rows that are over now."""
        if self.is_idle:
            return []
        if self._decoder is None:
            backend = self._make()
            self._decoder = self._make_decoder(backend, iter(lambda: self._next(backend), ...))  # without end
        rows = self._decoder.advance()
        if self._decoder.is_idle:
            self._spent.clear()  # of rows that nobody wanted any more
        return [replace(row, seconds=row.seconds + self._spent.pop(row.key), fell_back=True) for row in rows]

    def _next(self, backend: Backend) -> Row[Key] | None:
        if not self._waiting:
            return None
        row = self._waiting.popleft()
        return replace(row, states=row.encode(backend), encode=None) if row.encode else row
