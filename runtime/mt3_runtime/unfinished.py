"""Rows that did not end well: which segments they belong to, and how to say so."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mt3_runtime.rows import Status


class Unfinished:
    """The truncated and the failed rows of one piece of audio."""

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._rows: dict[Status, set[tuple[int, int]]] = {"truncated": set(), "failed": set()}  # (channel, segment)

    def note(self, segment: int, channel: int, status: Status) -> None:
        """Take down a row, unless it ended as it should."""
        if status != "ended":
            self._rows[status].add((channel, segment))

    def segments(self, status: Status) -> tuple[int, ...]:
        """Segments of which a row has this status, ascending."""
        return tuple(sorted({segment for _, segment in self._rows[status]}))

    def warnings(self, max_tokens: int) -> list[str]:
        """One line for every status that occurred; of several channels it says which."""
        told: dict[Status, str] = {
            "truncated": f"reached {max_tokens} tokens without end: later notes may be missing",
            "failed": "gave numbers that are not finite, twice: only the notes before that are kept",
        }
        return [f"{self._where(status)} {text}" for status, text in told.items() if self._rows[status]]

    def _where(self, status: Status) -> str:
        if self._channels == 1:
            return f"segments {ranges(self.segments(status))}"
        alike: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # channels by their segments
        for channel, rows in groupby(sorted(self._rows[status]), key=lambda row: row[0]):
            alike[tuple(segment for _, segment in rows)].append(channel)
        return "; ".join(f"channels {ranges(those)} of segments {ranges(rows)}" for rows, those in alike.items())


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs written short: 0-2, 5."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
