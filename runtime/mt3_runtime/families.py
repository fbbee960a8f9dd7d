"""What the two families do differently once the network has spoken: how rows end, and how tokens become notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mt3_runtime.decoding import DecodingRules
from mt3_runtime.errors import OptionError
from mt3_runtime.midi_styles import MT3_STYLE, YOURMT3_FINE_STYLE, YOURMT3_STYLE, MidiStyle
from mt3_runtime.note_decoding import DecodingStatistics, NoteDecoder, SegmentTokens
from mt3_runtime.yourmt3_notes import YourMt3NoteDecoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.notes import Note
    from mt3_runtime.specs import ModelSpec
    from mt3_runtime.vocabulary import Vocabulary


class NoteState(Protocol):
    """The decoding state of one piece of audio, whose segments come in order; `warnings` are one line each."""

    @property
    def statistics(self) -> DecodingStatistics:
        """Counts over all segments decoded so far."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was lost or put right, one line each."""

    def decode_segment(self, rows: Sequence[SegmentTokens], end: float | None) -> list[Note]:
        """Decode all channels of one segment, which ends at `end` seconds, None for the last: the notes completed."""

    def flush(self, duration: float) -> list[Note]:
        """Return the notes still held back; the audio lasted `duration` seconds."""


class Mt3Notes:
    """`NoteDecoder` as a `NoteState`: one row a segment."""

    warnings: tuple[str, ...] = ()

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._decoder = NoteDecoder(vocabulary)

    @property
    def statistics(self) -> DecodingStatistics:
        """See `NoteState.statistics`."""
        return self._decoder.statistics

    def decode_segment(self, rows: Sequence[SegmentTokens], end: float | None) -> list[Note]:
        """See `NoteState.decode_segment`."""
        [row] = rows
        return self._decoder.decode_segment(row.tokens, row.log_probs, row.start, end)

    def flush(self, duration: float) -> list[Note]:  # noqa: ARG002 -- MT3 ends notes at the last event
        """See `NoteState.flush`."""
        return self._decoder.flush()


def check_options(model: ModelSpec, *, strict_upstream: bool, fine_programs: bool) -> None:
    """Refuse options that would change nothing.

    Raises:
        OptionError: an option of YourMT3 for another family.
    """
    asked = {
        "strict_upstream (--strict-upstream on)": strict_upstream,
        "fine_programs (--programs fine)": fine_programs,
    }
    if model.family != "yourmt3" and any(asked.values()):
        names = ", ".join(name for name, value in asked.items() if value)
        raise OptionError(f"only YourMT3 models have an option {names}, and {model.name} is none: leave it out")


def decoding_rules(model: ModelSpec) -> DecodingRules:
    """How rows of this model start and end. YourMT3 never takes the first token for an end."""
    return DecodingRules(model.start_token, model.end_token, model.max_length, first_may_end=model.family != "yourmt3")


def new_note_state(model: ModelSpec, vocabulary: Vocabulary, *, strict_upstream: bool) -> NoteState:
    """A fresh state for one piece of audio."""
    if model.family == "yourmt3":
        return YourMt3NoteDecoder(vocabulary, model.channels, strict_upstream=strict_upstream)
    return Mt3Notes(vocabulary)


def midi_style(model: ModelSpec, *, fine_programs: bool) -> MidiStyle:
    """How notes of this model are written as MIDI; `fine_programs` keeps instruments that YourMT3 merges in files."""
    if model.family == "yourmt3":
        return YOURMT3_FINE_STYLE if fine_programs else YOURMT3_STYLE
    return MT3_STYLE
