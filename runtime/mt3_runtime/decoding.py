"""Schedules rows over a fixed number of slots: each steps at its own position and leaves when it ends.

A row is one autoregressive sequence: an MT3 segment, or one channel of a YourMT3 segment. Rows of any segments,
channels, files and live streams wait in one queue; a row that must first hear what became of another one joins it
then. Live rows stay contiguous (`slots.py`), so a step costs what the live rows cost. What a row decodes never depends
on its neighbours, nor on how many steps are launched together (`launches.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

from mt3_runtime.errors import OptionError
from mt3_runtime.fallback import SecondAttempts
from mt3_runtime.launches import End, Launches, is_device, launching
from mt3_runtime.rows import DecodedRow, DecodingRules, Key, Row, Status
from mt3_runtime.slots import Live, Queue, fill, shared_by

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mt3_runtime.backends import Backend

__all__ = ["ATTEMPTS", "DecodedRow", "DecodingRules", "Row", "RowDecoder", "Status", "decode_rows"]

ATTEMPTS = 2  # a row with a logit that is not finite is decoded once more


def decode_rows(
    backend: Backend,
    rows: Iterable[Row[Key] | None],
    rules: DecodingRules,
    *,
    wanted: Callable[[Key], bool] = lambda _: True,
    fallback: Callable[[], Backend] | None = None,
) -> Iterator[DecodedRow[Key]]:
    """Decode `rows`, taking them from the iterable only when a slot is free; yields each as it ends.

    Args:
        backend: has the slots.
        rows: the queue; its keys come back with the results. None: the next row waits for one that is being decoded.
        rules: how every row starts and ends.
        wanted: asked for the key of every live row after rows were taken, as it is then that a source may fail; a
            row that is not wanted leaves without a result.
        fallback: gives the backend for the second attempt of rows that know how they are encoded (`Row.encode`);
            without it, and for others, that is made where the first one was.

    Raises:
        OptionError: `rules` ask for more positions than the backend's cache has.
    """
    decoder = RowDecoder(backend, rows, rules, wanted=wanted, fallback=fallback)
    while not decoder.is_finished:
        yield from decoder.advance()
        if decoder.is_idle and not decoder.is_finished:
            raise AssertionError("the next row waits for one that nobody decodes")


class RowDecoder(Generic[Key]):
    """`decode_rows` launch by launch, for whoever has other things to do in between.

    Here the source may say None at any time: no row is ready now. It is asked again before the next launch.
    `is_idle`: in the last call of `advance` no row was live, and none was ready.

    A device never waits for the host: its next launch is made before the last one is read. Where a row waits for the
    end of another one, or audio is awaited, that would only hold up what comes next: there a launch is read first.
    """

    def __init__(
        self,
        backend: Backend,
        rows: Iterable[Row[Key] | None],
        rules: DecodingRules,
        *,
        wanted: Callable[[Key], bool] = lambda _: True,
        fallback: Callable[[], Backend] | None = None,
        attempts: int = ATTEMPTS,
    ) -> None:
        if rules.max_tokens > backend.length:
            raise OptionError(f"{rules.max_tokens} tokens a row do not fit a cache of {backend.length}: ask for fewer")
        self._backend, self._rules, self._attempts = launching(backend), rules, attempts
        self._queue = Queue(iter(rows), wanted)
        self._slots: list[Live[Key]] = []
        self._launches: Launches[Key] = Launches(self._backend, rules)
        self._is_device = is_device(backend)
        self._second = SecondAttempts(fallback, self._second_decoder) if fallback else None
        self.is_idle = False

    @property
    def is_finished(self) -> bool:
        """Whether every row of the source was decoded."""
        return self.is_idle and self._queue.is_empty

    def advance(self) -> list[DecodedRow[Key]]:
        """Give free slots to rows that are ready, launch the next steps of every live row: the rows that ended."""
        known = fill(self._backend, self._slots, self._queue, self._rules.start_token)
        is_idle = not (self._slots or known or self._launches) and self._queue.is_dry
        with shared_by(self._slots):
            ends = self._launch_and_read()
        decoded = known + [row for end in ends if (row := self._leave(end))]
        if self._second:
            decoded += self._second.advance()
            is_idle = is_idle and self._second.is_idle
        self.is_idle = is_idle
        return decoded

    def _launch_and_read(self) -> list[End[Key]]:
        """Begin a launch, and read what has to be read before the next one."""
        ahead = self._launches_ahead()
        begun = len(self._launches) <= ahead and self._launches.begin(self._slots)
        if self._launches and (len(self._launches) > ahead or not begun):
            return self._launches.read()
        return []

    def _launches_ahead(self) -> int:
        """How many launches may be under way while the host goes on."""
        if not self._is_device or (self._queue.is_dry and not self._queue.is_empty):
            return 0
        return int(all(live.row.memory is None for live in self._slots))  # else its next segment waits for it

    def _leave(self, end: End[Key]) -> DecodedRow[Key] | None:
        """Take a row out of its slot: to wait for another attempt, or else for good."""
        live = end.live
        again = end.status == "failed" and live.attempt < self._attempts
        if again and self._second and live.row.encode:
            self._second.add(live.row, live.seconds)
        elif again:
            self._queue.again.append(Live(live.row, live.attempt + 1, live.seconds))
        live.leave()
        return None if again else live.decoded(end.status)

    def _second_decoder(self, backend: Backend, rows: Iterator[Row[Key] | None]) -> RowDecoder[Key]:
        return RowDecoder(backend, rows, self._rules, wanted=self._queue.wanted, attempts=1)
