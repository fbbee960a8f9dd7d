"""Tokens to notes: the state machine of the MT3 family, one segment at a time.

Source: magenta/mt3 `run_length_encoding.py`, `note_sequences.py`, `metrics_utils.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_runtime.errors import OptionError
from mt3_runtime.notes import Note, sort_notes
from mt3_runtime.vocabulary import until_end

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.vocabulary import Event, Vocabulary

MIN_NOTE_SECONDS = 0.01
INITIAL_VELOCITY = 100  # until the first velocity token


@dataclass(frozen=True, slots=True)
class SegmentTokens:
    """What the network said about one segment.

    `start` in seconds. `log_probs` are natural logarithms, one for each token (more are ignored), None when
    they were not recorded.
    """

    start: float
    tokens: Sequence[int]  # [length]
    log_probs: Sequence[float] | None = None  # [length]


@dataclass(frozen=True, slots=True)
class DecodingStatistics:
    """Tokens that made no sense where they stood, and tokens that made sense and were lost.

    Lost are those cut off by the start of the next segment (MT3), or what `YourMt3NoteDecoder` lists (YourMT3).
    """

    invalid_events: int
    dropped_events: int


@dataclass(frozen=True, slots=True)
class _Sounding:
    onset: float
    velocity: int
    confidence: float | None


class NoteDecoder:
    """The decoding state of one piece of audio; feed it the segments in order, then flush.

    Velocity, program and sounding notes carry over from segment to segment. A segment opens with a tie
    section that names the notes which go on; the tie token ends all others. A segment without a tie token
    leaves them sounding.

    A note's confidence is the geometric mean of the probabilities of the tokens that made its onset: its
    pitch or drum token, and every shift, program and velocity token read since the pitch, drum or tie token
    before it, or since the start of the segment. It is None where log-probabilities are missing or NaN.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._time = 0.0
        self._velocity = INITIAL_VELOCITY
        self._program = 0
        self._active: dict[tuple[int, int], _Sounding] = {}  # by (pitch, program)
        self._tied: set[tuple[int, int]] = set()
        self._in_tie_section = False
        self._evidence: list[float] = []
        self._invalid = 0
        self._dropped = 0

    @property
    def statistics(self) -> DecodingStatistics:
        """Counts over all segments decoded so far."""
        return DecodingStatistics(self._invalid, self._dropped)

    def decode_segment(
        self,
        tokens: Sequence[int],
        log_probs: Sequence[float] | None,
        start: float,
        max_time: float | None,
    ) -> list[Note]:
        """Decode one segment.

        Args:
            tokens: Ids without the start token; read up to the first end token.
            log_probs: One natural logarithm for each token, or None.
            start: Start of the segment in seconds.
            max_time: Start of the next segment in seconds; events after it (not at it) are dropped. None or
                0 means no limit.

        Returns:
            The notes completed by this segment, in the order of their completion: at their note-off, at
            a new onset of the same pitch and program, at the tie token; drum notes at once.

        Raises:
            OptionError: `start` is not a time, or there are fewer log-probabilities than tokens.
        """
        ids = until_end(tokens)
        scores = token_scores(log_probs, len(ids))
        if not 0 <= start < math.inf:
            raise OptionError(f"a segment cannot start at {start} s: give a time of 0 or later")
        self._tied.clear()
        self._in_tie_section = True
        self._evidence.clear()
        notes: list[Note] = []
        steps, time = 0, start
        for index, token in enumerate(ids):
            event = self._vocabulary.decode(token)
            if event is None:
                self._invalid += 1
                continue
            self._evidence.append(scores[index])
            if event.kind == "shift":
                steps += event.value
                time = start + steps / self._vocabulary.steps_per_second
                if max_time and time > max_time:
                    self._dropped += len(ids) - index
                    break
            else:
                steps = 0
                self._invalid += not self._apply(event, time, notes)
        return notes

    def flush(self) -> list[Note]:
        """Return the notes still sounding, ended at the last event or 10 ms after the last onset."""
        shortest = [note.onset + MIN_NOTE_SECONDS for note in self._active.values()]
        self._time = max([self._time, *shortest])
        notes = [self._end(key, self._time) for key in list(self._active)]
        self._tied.clear()
        return notes

    def _apply(self, event: Event, time: float, notes: list[Note]) -> bool:
        """Change the state by one event; False if the event is not possible here."""
        accepted = time >= self._time
        if accepted:
            self._time = time
            match event.kind:
                case "pitch":
                    accepted = self._tie(event) if self._in_tie_section else self._play(event, notes)
                case "drum":
                    accepted = self._hit(event, notes)
                case "tie":
                    accepted = self._close_tie_section(notes)
                case "velocity":
                    self._velocity = self._vocabulary.midi_velocity(event.value)
                case "program":
                    self._program = event.value
        if event.kind in {"pitch", "drum", "tie"}:
            self._evidence.clear()
        return accepted

    def _tie(self, event: Event) -> bool:
        key = (event.value, self._program)
        if key not in self._active or key in self._tied:
            return False
        self._tied.add(key)
        return True

    def _play(self, event: Event, notes: list[Note]) -> bool:
        key = (event.value, self._program)
        if key in self._active:
            notes.append(self._end(key, self._time))
        elif self._velocity == 0:
            return False
        if self._velocity > 0:
            self._active[key] = _Sounding(self._time, self._velocity, mean_probability(self._evidence))
        return True

    def _hit(self, event: Event, notes: list[Note]) -> bool:
        if self._velocity == 0:
            return False
        offset = self._time + MIN_NOTE_SECONDS
        confidence = mean_probability(self._evidence)
        notes.append(Note(self._time, offset, event.value, self._velocity, 0, is_drum=True, confidence=confidence))
        return True

    def _close_tie_section(self, notes: list[Note]) -> bool:
        if not self._in_tie_section:
            return False
        notes.extend(self._end(key, self._time) for key in list(self._active) if key not in self._tied)
        self._in_tie_section = False
        return True

    def _end(self, key: tuple[int, int], time: float) -> Note:
        pitch, program = key
        note = self._active.pop(key)
        offset = max(time, note.onset + MIN_NOTE_SECONDS)
        return Note(note.onset, offset, pitch, note.velocity, program, is_drum=False, confidence=note.confidence)


def tokens_to_notes(segments: Sequence[SegmentTokens], vocabulary: Vocabulary) -> tuple[list[Note], DecodingStatistics]:
    """Decode all segments of one piece of audio.

    Returns:
        The notes in canonical order (`sort_notes`) and the counts of what could not be used.

    Raises:
        OptionError: a segment's start is not a time, or it has fewer log-probabilities than tokens.
    """
    decoder = NoteDecoder(vocabulary)
    ordered = sorted(segments, key=lambda segment: segment.start)
    bounds: list[float | None] = [segment.start for segment in ordered] + [None]
    notes: list[Note] = []
    for segment, end in zip(ordered, bounds[1:], strict=True):
        notes += decoder.decode_segment(segment.tokens, segment.log_probs, segment.start, end)
    notes += decoder.flush()
    return sort_notes(notes), decoder.statistics


def token_scores(log_probs: Sequence[float] | None, length: int) -> list[float]:
    """Return one log-probability for each token, NaN where it is not known.

    Raises:
        OptionError: there are fewer than `length`.
    """
    if log_probs is None:
        return [math.nan] * length
    if len(log_probs) < length:
        raise OptionError(f"{len(log_probs)} log-probabilities for {length} tokens: give one for each token, or None")
    return [float(log_prob) for log_prob in log_probs[:length]]


def mean_probability(log_probs: Sequence[float]) -> float | None:
    """Return the geometric mean of the probabilities, None where one is not known (NaN)."""
    mean = sum(log_probs) / len(log_probs)
    return None if math.isnan(mean) else math.exp(min(mean, 0.0))  # rounding may give more than 1
