"""One row of YourMT3's tokens to note events: one channel of one segment.

Source: YourMT3 `utils/event2note.py`, `event2note_event`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_runtime.note_decoding import mean_probability, token_scores
from mt3_runtime.note_mixing import Key, NoteEvent
from mt3_runtime.vocabulary import END_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.note_decoding import SegmentTokens
    from mt3_runtime.vocabulary import Event, Vocabulary

MAX_SHIFT = 1000  # steps
UNTIED = "untied"


@dataclass(frozen=True, slots=True)
class Row:
    """What one channel of a segment says; `activity`: what sounds at its end, in the order of the tokens."""

    has_tie: bool
    ties: list[Key]
    activity: list[Key]
    events: list[NoteEvent]
    counts: Counter[str]


class RowReader:
    """Reads one row; `before` sounded at the end of the row before it, in the order of the tokens."""

    def __init__(self, vocabulary: Vocabulary, first_tick: int, segment: int, before: Sequence[Key]) -> None:
        self._vocabulary = vocabulary
        self._segment = segment
        self._first_tick = self._tick = first_tick
        self._before = before
        self._program: int | None = None
        self._velocity: int | None = None
        self._evidence: list[float] = []
        self._has_tie = False
        self._ties: list[Key] = []
        self._activity: list[Key] = []
        self._events: list[NoteEvent] = []

    def read(self, row: SegmentTokens, *, strict: bool) -> Row:
        """Read the row up to its end; strict, one without a tie token says nothing.

        Raises:
            OptionError: there are fewer log-probabilities than tokens.
        """
        ids = [int(token) for token in row.tokens]
        scores = token_scores(row.log_probs, len(ids))
        events = [self._vocabulary.decode(token) for token in ids]
        kinds = [event.kind if event else None for event in events]
        first = next((index for index, kind in enumerate(kinds) if kind in {"tie", "shift"}), len(ids))
        self._has_tie = "tie" in kinds[first : first + 1]
        # The network's loop does not take the first token for an end, and the search for the tie token takes none.
        opening = first + self._has_tie
        first_end = opening if self._has_tie else 1
        stop = ids.index(END_TOKEN, first_end) if END_TOKEN in ids[first_end:] else len(ids)
        counts: Counter[str] = Counter()
        if not self._has_tie:
            counts[UNTIED] += bool(self._before or any(events[:stop]))
            self._activity = [] if strict else list(self._before)
        for index, event in enumerate(events[:stop]):
            if event is None:
                counts["invalid"] += 1
            elif strict and not self._has_tie:
                counts["dropped"] += 1
            else:
                self._evidence.append(scores[index])
                counts["invalid"] += not self._apply(event, is_opening=index < opening)
        return Row(self._has_tie, self._ties, self._activity, self._events, counts)

    def _apply(self, event: Event, *, is_opening: bool) -> bool:
        """Change the state by one event, up to the tie (the first shift without one) or after it; False if invalid."""
        accepted = self._open(event) if is_opening else self._play(event)
        if event.kind in {"pitch", "drum", "tie"}:
            self._evidence.clear()
        return accepted

    def _open(self, event: Event) -> bool:
        match event.kind:
            case "program":
                self._program = event.value
            case "pitch" if self._velocity is None:
                return self._tie(event.value)
            case "tie":
                pass
            case _:
                return not self._has_tie and self._play(event)
        return True

    def _tie(self, pitch: int) -> bool:
        if self._program is None:
            return False
        key = Key(pitch, self._program)
        continues = key in self._before and key not in self._ties
        self._ties.append(key)
        if self._has_tie or key not in self._activity:
            self._activity.append(key)
        return continues

    def _play(self, event: Event) -> bool:
        match event.kind:
            case "shift":
                if not 0 < event.value <= MAX_SHIFT:
                    return False
                self._tick = self._first_tick + event.value
            case "program":
                self._program = event.value
            case "velocity":
                self._velocity = event.value
            case "drum":
                self._emit(Key(event.value, 0, is_drum=True), is_onset=True)
            case "pitch":
                return self._sound(event.value)
            case _:
                return False
        return True

    def _sound(self, pitch: int) -> bool:
        if self._program is None or self._velocity is None:
            return False
        key = Key(pitch, self._program)
        if self._velocity:
            self._activity.append(key)
        elif key in self._activity:
            self._activity.remove(key)
        else:
            return False
        self._emit(key, is_onset=self._velocity > 0)
        return True

    def _emit(self, key: Key, *, is_onset: bool) -> None:
        time = self._tick / self._vocabulary.steps_per_second
        self._events.append(NoteEvent(time, key, self._segment, is_onset, mean_probability(self._evidence)))
