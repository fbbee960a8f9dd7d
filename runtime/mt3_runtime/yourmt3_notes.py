"""Tokens to notes of YourMT3: one row of tokens for each channel of a segment, one segment at a time.

Source: YourMT3 `utils/event2note.py`, `utils/note2event.py` and `utils/tokenizer.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from mt3_runtime.errors import OptionError
from mt3_runtime.note_decoding import DecodingStatistics
from mt3_runtime.note_mixing import ENDLESS, LONG, OVERRULED, ChannelNotes, Key, NoteEvent, NoteMixer
from mt3_runtime.yourmt3_rows import UNTIED, RowReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.note_decoding import SegmentTokens
    from mt3_runtime.notes import Note
    from mt3_runtime.vocabulary import Vocabulary
    from mt3_runtime.yourmt3_rows import Row

ROUNDING = 1e-6  # seconds by which the start of a segment may differ from the end of the one before
MAX_SECONDS = 1e9  # later, float64 no longer tells 10 ms apart with certainty

_KEPT = {
    UNTIED: "segments without a tie token, read all the same",
    ENDLESS: "notes without an end, held to the end of the audio",
    LONG: "notes longer than 10 s, kept at their length",
    OVERRULED: "ends of notes told by a segment before their own, ignored",
}
_LOST = {
    UNTIED: "segments without a tie token, left out; what sounded ends there",
    ENDLESS: "notes without an end, cut to 10 ms",
    LONG: "notes longer than 10 s, cut to 10 ms",
    OVERRULED: "notes ended by a segment before their own",
}


class YourMt3NoteDecoder:
    """The decoding state of one piece of audio; feed it the segments in order, then flush.

    A segment opens with a tie section that names the notes which go on; all others end at its start. Times are
    absolute within a segment, so that tokens may go back in time, or reach into the next segment. The notes of
    all calls together are those that upstream makes of the whole file, with `strict_upstream` to the letter.
    Without, what upstream loses is kept, and `warnings` counts it:

    - A segment without a tie token before its first shift is read all the same, and notes that sound go on.
      Upstream leaves the segment out and ends them. Until a velocity is read, its pitches are ties.
    - Notes that nothing ends last to the end of the audio, not 10 ms.
    - Notes longer than 10 s keep their length; upstream leaves 10 ms of them.
    - What one segment says never ends a note that began in a later one. Upstream ends untied notes at the exact
      start of a segment, which may lie a few ms after the segment's first onsets, as these are rounded to 10 ms;
      and an offset that reaches into the next segment may meet a new note there.
    - An onset that reaches into the next segment, and is not tied there, lasts 10 ms; upstream lets it sound until
      an event of its pitch comes, which then does not do what it was meant for.

    Every token up to the end is used or counted once: as invalid where it means nothing (upstream's errors, special
    ids, ties of notes that do not sound), as dropped where it is lost with its segment, where its note collapses
    into another that starts at the same time, and where it is an offset of an earlier segment that is overruled.

    All notes have velocity 100. Their confidence is that of `NoteDecoder`.
    """

    def __init__(self, vocabulary: Vocabulary, channels: int, *, strict_upstream: bool = False) -> None:
        if channels < 1:
            raise OptionError(f"{channels} channels cannot be decoded: give 1 or more")
        self._vocabulary = vocabulary
        self._strict = strict_upstream
        self._channels = [ChannelNotes(strict=strict_upstream) for _ in range(channels)]
        self._activity: list[list[Key]] = [[] for _ in range(channels)]
        self._mixer = NoteMixer()
        self._segment = 0
        self._next_start = 0.0
        self._counts: Counter[str] = Counter()

    @property
    def statistics(self) -> DecodingStatistics:
        """Counts over all segments decoded so far."""
        counts = self._total()
        return DecodingStatistics(counts["invalid"], counts["dropped"] + self._mixer.collapsed)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was kept although upstream would lose it, or lost in strict mode, one line each."""
        counts = self._total()
        texts = _LOST if self._strict else _KEPT
        return tuple(f"{text}: {counts[reason]}" for reason, text in texts.items() if counts[reason])

    def decode_segment(self, rows: Sequence[SegmentTokens], end: float | None) -> list[Note]:
        """Decode one segment.

        Args:
            rows: Ids without the start token for each channel, as the network gave them. All have the same start.
            end: Start of the next segment in seconds, None for the last one.

        Returns:
            The notes that no later segment can change, by pitch and program.

        Raises:
            OptionError: the rows are not one segment, it is not in order, or log-probabilities are missing.
        """
        self._check(rows, end)
        read = [self._read(row, before) for row, before in zip(rows, self._activity, strict=True)]
        for index, row in enumerate(read):
            self._take(index, row, float(rows[index].start))
        self._segment += 1
        if end is None:
            self._next_start = math.inf
            return self._advance(math.inf)
        self._next_start = max(end - ROUNDING, 0.0)
        return self._advance(min(self._next_start, self._to_tick(self._next_start) / self._vocabulary.steps_per_second))

    def flush(self, duration: float) -> list[Note]:
        """Return the notes still held back, those that sound ended at `duration`, the length of the audio in seconds.

        Raises:
            OptionError: `duration` is not a time.
        """
        if not 0 <= duration < math.inf:
            raise OptionError(f"audio cannot last {duration} s: give a finite number of 0 or more")
        self._next_start = math.inf
        notes = self._advance(math.inf)
        for index, channel in enumerate(self._channels):
            self._mixer.hold(index, channel.finish(duration, self._activity[index]))
        return notes + self._mixer.release(math.inf, [])

    def _to_tick(self, seconds: float) -> int:
        return round(float(seconds) * self._vocabulary.steps_per_second)

    def _total(self) -> Counter[str]:
        return sum((channel.counts for channel in self._channels), self._counts)

    def _check(self, rows: Sequence[SegmentTokens], end: float | None) -> None:
        starts = {float(row.start) for row in rows}
        if len(rows) != len(self._channels) or len(starts) != 1:
            raise OptionError(
                f"{len(rows)} rows with {len(starts)} starts are no segment of {len(self._channels)} channels: "
                "give one row for each channel, all with the same start"
            )
        [start] = starts
        if not self._next_start <= start < MAX_SECONDS:
            raise OptionError(f"a segment cannot start at {start} s: give times from {self._next_start} s on, in order")
        if end is not None and not start <= end < MAX_SECONDS:
            raise OptionError(
                f"a segment from {start} s cannot end at {end} s: give the start of the next one, or None"
            )

    def _read(self, row: SegmentTokens, before: Sequence[Key]) -> Row:
        reader = RowReader(self._vocabulary, self._to_tick(row.start), self._segment, before)
        return reader.read(row, strict=self._strict)

    def _take(self, index: int, row: Row, start: float) -> None:
        channel, before = self._channels[index], self._activity[index]
        if row.has_tie or self._strict:
            channel.add(
                NoteEvent(start, key, self._segment - 1, is_onset=False, is_forced=True)
                for key in before
                if key not in row.ties
            )
        channel.add(row.events)
        self._activity[index] = row.activity
        self._counts.update(row.counts)

    def _advance(self, horizon: float) -> list[Note]:
        for index, channel in enumerate(self._channels):
            self._mixer.hold(index, channel.advance(horizon))
        return self._mixer.release(horizon, [channel.sounding for channel in self._channels])
