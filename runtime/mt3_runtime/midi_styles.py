"""How notes are laid out in a MIDI file: resolution, instruments and their names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

BEATS_PER_MINUTE = 120
MAX_TICKS_PER_QUARTER = 0x7FFF  # 15 bits of the file's header
SINGING, CHORUS = 100, 101  # YourMT3's own use of two General MIDI programs


@dataclass(frozen=True, slots=True)
class MidiStyle:
    """A layout of MIDI files.

    Notes are grouped into tracks by program after `merged` has renamed it (programs outside stay). `names` are the
    tracks' names, `written` the General MIDI programs that stand in the file, where they are not the program's own.

    Raises:
        OptionError: a resolution or a program that MIDI does not have.
    """

    ticks_per_quarter: int
    merged: Mapping[int, int] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    written: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.ticks_per_quarter <= MAX_TICKS_PER_QUARTER:
            raise OptionError(f"{self.ticks_per_quarter} ticks per quarter do not fit into MIDI: give 1 to 32767")
        programs = {*self.merged, *self.merged.values(), *self.names, *self.written, *self.written.values()}
        if wrong := sorted(program for program in programs if not 0 <= program <= 127):
            raise OptionError(f"{wrong[0]} is no MIDI program: give 0 to 127")

    @property
    def ticks_per_second(self) -> float:
        """At 120 beats per minute."""
        return self.ticks_per_quarter * BEATS_PER_MINUTE / 60

    def program_of(self, program: int) -> int:
        """The program whose track holds the notes of `program`."""
        return self.merged.get(program, program)

    def name_of(self, program: int) -> str:
        """The track's name, General MIDI's where the style has none."""
        import pretty_midi  # noqa: PLC0415 -- slow to import, and nothing before the last note needs it

        return self.names.get(program) or str(pretty_midi.program_to_instrument_name(program))


def _classes(*rows: tuple[str, Iterable[int]]) -> tuple[dict[int, int], dict[int, str]]:
    """Each program's first of its class, and each first one's name."""
    classes = {name: tuple(programs) for name, programs in rows}
    firsts = {program: programs[0] for programs in classes.values() for program in programs}
    return firsts, {programs[0]: name for name, programs in classes.items()}


# YourMT3 `config/vocabulary.py`: the classes it writes (`GM_INSTR_EXT_CLASS_PLUS`) ...
_MERGED, _COARSE_NAMES = _classes(
    ("Acoustic Piano", (0, 1, 3, 6, 7)),
    ("Electric Piano", (2, 4, 5)),
    ("Chromatic Percussion", range(8, 16)),
    ("Organ", range(16, 24)),
    ("Guitar (clean)", range(24, 28)),
    ("Guitar (distortion)", (30, 28, 29, 31)),
    ("Bass", (33, 32, *range(34, 40))),
    ("Strings", (48, *range(40, 48), *range(49, 56))),
    ("Brass", range(56, 64)),
    ("Reed", range(64, 72)),
    ("Pipe", range(72, 80)),
    ("Synth Lead", range(80, 88)),
    ("Synth Pad", range(88, 96)),
    ("Singing Voice", (SINGING,)),
    ("Singing Voice (chorus)", (CHORUS,)),
)
# ... and the first program of each class it was trained with (`MT3_FULL_PLUS`).
_FINE_NAMES = {
    0: "Acoustic Piano",
    2: "Electric Piano",
    8: "Chromatic Percussion",
    16: "Organ",
    24: "Acoustic Guitar",
    26: "Clean Electric Guitar",
    29: "Distorted Electric Guitar",
    32: "Acoustic Bass",
    33: "Electric Bass",
    40: "Violin",
    41: "Viola",
    42: "Cello",
    43: "Contrabass",
    46: "Orchestral Harp",
    47: "Timpani",
    48: "String Ensemble",
    50: "Synth Strings",
    52: "Choir and Voice",
    55: "Orchestra Hit",
    56: "Trumpet",
    57: "Trombone",
    58: "Tuba",
    60: "French Horn",
    61: "Brass Section",
    64: "Soprano/Alto Sax",
    66: "Tenor Sax",
    67: "Baritone Sax",
    68: "Oboe",
    69: "English Horn",
    70: "Bassoon",
    71: "Clarinet",
    73: "Pipe",
    80: "Synth Lead",
    88: "Synth Pad",
    SINGING: "Singing Voice",
    CHORUS: "Singing Voice (chorus)",
}
_VOICES = {SINGING: 65, CHORUS: 53}  # alto sax and voice oohs: General MIDI's 100 and 101 are sound effects

MT3_STYLE = MidiStyle(ticks_per_quarter=220)
YOURMT3_STYLE = MidiStyle(ticks_per_quarter=480, merged=_MERGED, names=_COARSE_NAMES, written=_VOICES)
YOURMT3_FINE_STYLE = MidiStyle(ticks_per_quarter=480, names=_FINE_NAMES, written=_VOICES)
