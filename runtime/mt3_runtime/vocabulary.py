"""Token ids and the MT3 events they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mt3_runtime.errors import OptionError
from mt3_runtime.specs import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_runtime.specs import VocabularySpec

EventKind = Literal["shift", "pitch", "velocity", "tie", "program", "drum"]

PAD_TOKEN = 0
END_TOKEN = 1
UNKNOWN_TOKEN = 2


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    `value` is a number of steps (shift), a MIDI number (pitch, program, drum), a bin (velocity) or 0 (tie).
    """

    kind: EventKind
    value: int


class Vocabulary:
    """The map between token ids and events.

    Source: magenta/mt3 `vocabularies.py` and `event_codec.py`; the special ids come first, then every class
    in the order of `EventKind`. Ids beyond the last class are legal outputs of the network but mean nothing.

    Raises:
        BundleError: the spec leaves no room for the padding and end ids.
    """

    def __init__(self, spec: VocabularySpec) -> None:
        require(
            spec.special_tokens > END_TOKEN,
            f"special_tokens {spec.special_tokens} leaves no id for the end of a segment: export the bundle again",
        )
        self.steps_per_second = spec.steps_per_second
        self._velocity_bins = spec.velocity_bins
        sizes: dict[EventKind, int] = {
            "shift": spec.max_shift_steps + 1,
            "pitch": 128,
            "velocity": spec.velocity_bins + 1,
            "tie": 1,
            "program": 128,
            "drum": 128,
        }
        events = [Event(kind, value) for kind, size in sizes.items() for value in range(size)]
        self._events: tuple[Event | None, ...] = (None,) * spec.special_tokens + tuple(events)
        self._ids = {event: spec.special_tokens + index for index, event in enumerate(events)}

    def __len__(self) -> int:
        """Special ids and event ids together: 1391 for the published models."""
        return len(self._events)

    def decode(self, token_id: int) -> Event | None:
        """Return the event of a token id, or None for special, unused and out-of-range ids."""
        return self._events[token_id] if 0 <= token_id < len(self._events) else None

    def encode(self, event: Event) -> int:
        """Return the token id of an event.

        Raises:
            OptionError: the vocabulary has no such event.
        """
        try:
            return self._ids[event]
        except KeyError:
            raise OptionError(
                f"the vocabulary has no {event.kind} event of value {event.value}: use a value in its range"
            ) from None

    def midi_velocity(self, velocity_bin: int) -> int:
        """Return the MIDI velocity of a bin: 0 is a note-off, the highest bin is 127.

        Source: magenta/mt3 `vocabularies.py`, `bin_to_velocity`.
        """
        return int(127 * velocity_bin / self._velocity_bins)


def until_end(token_ids: Sequence[int]) -> list[int]:
    """Return the ids before the first end token, all of them when there is none.

    Padding and unknown ids inside are kept: they are invalid events, never an end. A segment that ran into
    the length limit keeps all it has (magenta/mt3 `tasks.py`; the PyTorch ports lose such a segment).
    """
    ids = [int(token_id) for token_id in token_ids]
    return ids[: ids.index(END_TOKEN)] if END_TOKEN in ids else ids
