"""Silence: segments in which there is nothing to hear. They are neither encoded nor decoded; what they say is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_runtime.errors import OptionError
from mt3_runtime.vocabulary import Event

if TYPE_CHECKING:
    from mt3_runtime.arrays import FloatArray
    from mt3_runtime.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class SilenceRule:
    """Which segments are silent: those whose peak is at most `level`, in dB below full scale (a sample of 1).

    -inf is digital silence, nothing but zeros; None is no rule, and every segment is decoded.

    Raises:
        OptionError: `level` is not negative.
    """

    level: float | None

    def __post_init__(self) -> None:
        if self.level is not None and not self.level < 0:
            raise OptionError(
                f"a level of {self.level} dBFS would call all audio silent: give one below 0, such as -80"
            )

    def __str__(self) -> str:
        if self.level is None:
            return "off"
        return "digital" if self.level == -math.inf else f"{self.level:g} dBFS"

    def is_silent(self, samples: FloatArray) -> bool:
        """Whether there is nothing to hear in `samples` [segment_samples], which are all that its features see."""
        if self.level is None:
            return False
        peak = float(max(samples.max(), -samples.min()))  # NaN is not silent
        return peak <= math.pow(10.0, self.level / 20)


OFF, DIGITAL = SilenceRule(None), SilenceRule(-math.inf)


def silence_rule(asked: str | float, *, strict_upstream: bool = False) -> SilenceRule:
    """The rule of "off", "digital", or a level in dBFS, as a number or its text.

    "auto" is "digital", but "off" where notes are to be those of the authors' code, which decodes silence too.

    Raises:
        OptionError: it is none of these.
    """
    named = {"off": OFF, "digital": DIGITAL, "auto": OFF if strict_upstream else DIGITAL}
    if isinstance(asked, str) and asked in named:
        return named[asked]
    try:
        level = float(asked.removesuffix(" dBFS") if isinstance(asked, str) else asked)
    except (TypeError, ValueError, OverflowError):
        level = math.nan
    if isinstance(asked, bool) or not math.isfinite(level):
        raise OptionError(
            f"skip_silence {asked!r:.40} is no rule: use auto, off, digital, or a level such as -80 (dBFS)"
        )
    return SilenceRule(level)


def silent_tokens(vocabulary: Vocabulary) -> list[int]:
    """What a network says of silence, in every channel: the tie token, which ends all notes that nothing ties.

    MT3 and YourMT3 are trained on it, then the end token, for segments and channels without notes.
    """
    return [vocabulary.encode(Event("tie", 0))]
