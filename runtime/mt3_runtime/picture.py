"""A piano roll as a PNG picture, with a reference to compare with if there is one."""

from __future__ import annotations

import importlib
import math
from bisect import bisect
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pretty_midi

from mt3_runtime.errors import DependencyError, OptionError
from mt3_runtime.notes import sort_notes
from mt3_runtime.scoring import match_onsets

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from mt3_runtime.note_diff import NoteDiff, Pair
    from mt3_runtime.notes import Note

PIXELS_PER_SECOND = 120
MIN_ROLL_WIDTH = 900
MAX_ROLL_WIDTH = 8000

# One colour for each General MIDI family of eight programs; red is kept for missed notes.
FAMILY_COLOURS = (
    "#4e79a7", "#76b7b2", "#9c755f", "#f28e2b", "#59a14f", "#e3bd2c", "#b07aa1", "#a8892a",
    "#ff9da7", "#8cbfe6", "#d37295", "#f0b6cb", "#8cd17d", "#2f8f89", "#79706e", "#b5aba7",
)  # fmt: skip
DRUM_COLOUR = "#454b54"
MISSED_COLOUR = "#d62728"
ONLY_A_COLOUR, ONLY_B_COLOUR = MISSED_COLOUR, "#1f6fd6"
SAME_COLOUR, CHANGED_COLOUR, OTHER_PROGRAM_COLOUR = "#9aa3ad", "#f2a516", "#b65fd3"
INK, FAINT_INK, GRID, BLACK_KEY, PAPER = "#22262b", "#6b737c", "#dde1e6", "#f3f5f7", "#ffffff"

ROW = 8  # pixels of one semitone
DRUM_ROW = 15
MIN_SEMITONES = 30
MARGIN = 16
LINE = 20
TIME_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 18000)
TIME_LABEL_GAP = 90  # pixels between time labels, at least
BLACK_KEYS = frozenset({1, 3, 6, 8, 10})


def draw_piano_roll(
    notes: Iterable[Note],
    *,
    reference: Iterable[Note] | None = None,
    duration: float | None = None,
    title: str = "",
) -> bytes:
    """Draw notes as bars coloured by instrument family, drums in a strip of their own below.

    With a reference, its notes are outlines over the bars: an outlined bar was found, an empty red outline
    was missed, a pale bar without outline is extra. Found means the same pitch (and both drums or neither)
    with onsets within 50 ms; the instrument is not compared. The roll is 120 pixels a second wide, at least
    900 and at most 8000 pixels: longer audio is drawn denser.

    Args:
        notes: What was transcribed.
        reference: What should have been.
        duration: Seconds of the time axis; by default, and at least, up to the last offset.
        title: Written above; shortened to fit.

    Returns:
        The PNG file.

    Raises:
        DependencyError: Pillow is not installed.
        OptionError: `duration` is negative or not finite.
    """
    if duration is not None and not 0 <= duration < math.inf:
        raise OptionError(f"the duration is {duration} s: give a finite number of 0 or more")
    drawn = sort_notes(notes)
    if reference is None:
        summary = "" if drawn else "no notes"
        sheet = _Sheet(drawn, duration or 0.0, title, summary)
        sheet.draw_bars(drawn, range(len(drawn)))
        return sheet.png()
    expected = sort_notes(reference)
    found, met = match_onsets(drawn, expected)
    summary = (
        f"{len(expected)} reference notes: {len(met)} found (outlined), {len(expected) - len(met)} missed (red), "
        f"{len(drawn) - len(found)} extra (pale)"
    )
    sheet = _Sheet([*drawn, *expected], duration or 0.0, title, summary)
    sheet.draw_bars(drawn, found)
    sheet.draw_outlines(expected, met)
    return sheet.png()


def draw_differences(diff: NoteDiff, *, title: str = "") -> bytes:
    """Draw two sets of notes over each other, coloured by what differs between them.

    Grey notes are in both and agree. Amber ones (violet ones, if the program is another) are B's and differ from
    A's, which are outlined. Red notes are only in A, blue ones only in B. Where two that are not the same sound at
    one pitch, the later one fills the lower half.

    Returns:
        The PNG file.

    Raises:
        DependencyError: Pillow is not installed.
    """
    changed = diff.changed
    colours = [_pair_colour(pair) for pair in diff.pairs]
    bars = [(pair.b if pair.differs else pair.a, colour) for pair, colour in zip(diff.pairs, colours, strict=True)]
    bars += [(single.note, ONLY_A_COLOUR) for single in diff.only_a]
    bars += [(single.note, ONLY_B_COLOUR) for single in diff.only_b]
    bars.sort(key=lambda bar: (bar[0].onset, bar[0].pitch, bar[1]))
    legend = [
        (f"same in A and B: {colours.count(SAME_COLOUR)}", SAME_COLOUR),
        (f"another program: {colours.count(OTHER_PROGRAM_COLOUR)}", OTHER_PROGRAM_COLOUR),
        (f"another offset or velocity: {colours.count(CHANGED_COLOUR)}", CHANGED_COLOUR),
        (f"only in A: {len(diff.only_a)}", ONLY_A_COLOUR),
        (f"only in B: {len(diff.only_b)}", ONLY_B_COLOUR),
    ]
    summary = ("outlines: A's note where B's is another" if changed else "") if bars else "no notes"
    outlined = [pair.a for pair in changed]
    sheet = _Sheet([*(note for note, _ in bars), *outlined], 0.0, title, summary, legend)
    sheet.fill_bars((note, colour, colour) for note, colour in bars)
    sheet.draw_outlines(outlined, range(len(outlined)))
    return sheet.png()


def _pair_colour(pair: Pair) -> str:
    if "program" in pair.differs:
        return OTHER_PROGRAM_COLOUR
    return CHANGED_COLOUR if pair.differs else SAME_COLOUR


@dataclass(frozen=True)
class _Layout:
    """Where things are, in pixels. `pitches` and `drums` are the rows, from top to bottom."""

    left: int
    top: int
    roll_width: int
    seconds: float
    pitches: range
    drums: tuple[int, ...]

    @property
    def right(self) -> int:
        return self.left + self.roll_width

    @property
    def roll_bottom(self) -> int:
        return self.top + ROW * len(self.pitches)

    @property
    def drums_top(self) -> int:
        return self.roll_bottom + (MARGIN if self.pitches else 0)

    @property
    def bottom(self) -> int:
        return self.drums_top + DRUM_ROW * len(self.drums) if self.drums else self.roll_bottom

    @cached_property
    def rows(self) -> dict[tuple[bool, int], int]:
        """Upper edge of each row, by (is_drum, pitch)."""
        pitched = {(False, pitch): self.top + ROW * row for row, pitch in enumerate(self.pitches)}
        return pitched | {(True, drum): self.drums_top + DRUM_ROW * row for row, drum in enumerate(self.drums)}

    def x(self, time: float) -> int:
        return self.left + round(time / self.seconds * self.roll_width)

    def box(self, note: Note) -> tuple[int, int, int, int]:
        """Corners of a note's bar, both inside; wide enough to be seen however short the note."""
        narrowest = max(2, round(min(5.0, self.roll_width / self.seconds / 24))) if note.is_drum else 2
        left = min(self.x(note.onset), self.right - narrowest)
        right = max(self.x(note.offset) - 2, left + narrowest - 1)  # a gap before a note that follows at once
        top = self.rows[note.is_drum, note.pitch]
        return (left, top + 2, right, top + DRUM_ROW - 3) if note.is_drum else (left, top + 1, right, top + ROW - 1)


class _Sheet:
    """The picture while it is drawn; grid, labels and legend come first."""

    def __init__(
        self,
        notes: Sequence[Note],
        duration: float,
        title: str,
        summary: str,
        legend: Sequence[tuple[str, str]] | None = None,  # names and colours; by default those of the instruments
    ) -> None:
        image_module, draw_module, font_module = _pillow()
        self._title_font, self._font = font_module.load_default(18), font_module.load_default(12)
        drums = tuple(sorted({note.pitch for note in notes if note.is_drum}, reverse=True))
        seconds = max([1.0, duration, *(note.offset for note in notes)])
        roll_width = round(min(max(seconds * PIXELS_PER_SECOND, MIN_ROLL_WIDTH), MAX_ROLL_WIDTH))
        names = [*map(_drum_name, drums), "C-1"]
        left = MARGIN + math.ceil(max(map(self._font.getlength, names))) + 8
        lines = self._wrap(_families(notes) if legend is None else legend, left + roll_width - MARGIN)
        heading = (LINE + 4) * bool(title) + LINE * (len(lines) + bool(summary))
        self._at = _Layout(left, MARGIN + heading + 6, roll_width, seconds, _pitch_rows(notes), drums)
        self._image = image_module.new("RGB", (self._at.right + MARGIN, self._at.bottom + 34), PAPER)
        self._draw = draw_module.Draw(self._image, "RGBA")
        self._draw_rows()
        self._draw_times()
        self._draw_heading(title, lines, summary)

    def draw_bars(self, notes: Sequence[Note], solid: Collection[int]) -> None:
        """Fill a bar for each note; those whose index is not in `solid` are pale."""
        colours = [DRUM_COLOUR if note.is_drum else FAMILY_COLOURS[note.program // 8] for note in notes]
        self.fill_bars(
            (note, colour if index in solid else colour + "60", None if note.is_drum else note.program)
            for index, (note, colour) in enumerate(zip(notes, colours, strict=True))
        )

    def fill_bars(self, bars: Iterable[tuple[Note, str, object]]) -> None:
        """Fill a bar for each note, in the order of onsets, with a colour.

        Where a note of another kind already sounds at the same pitch, only the lower half is filled.

        Args:
            bars: Note, colour, and kind.
        """
        sounding: dict[tuple[bool, int], tuple[float, object]] = {}
        for note, colour, kind in bars:
            left, top, right, bottom = self._at.box(note)
            until, other = sounding.setdefault((note.is_drum, note.pitch), (note.offset, kind))
            if until > note.onset and other != kind:
                top = (top + bottom + 1) // 2
            else:
                sounding[note.is_drum, note.pitch] = note.offset, kind
            self._draw.rectangle((left, top, right, bottom), fill=colour)

    def draw_outlines(self, reference: Sequence[Note], met: Collection[int]) -> None:
        """Outline each reference note, red with a tint where its index is not in `met`."""
        for index, note in enumerate(reference):
            left, top, right, bottom = self._at.box(note)
            box = (left - 1, top - 1, right + 1, bottom + 1)
            if index in met:
                self._draw.rectangle(box, outline=INK + "d0")
            else:
                self._draw.rectangle(box, outline=MISSED_COLOUR, fill=MISSED_COLOUR + "28")

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        buffer = BytesIO()
        self._image.save(buffer, "PNG")
        return buffer.getvalue()

    def _draw_rows(self) -> None:
        at = self._at
        for (is_drum, pitch), top in at.rows.items():
            height = DRUM_ROW if is_drum else ROW
            if at.drums.index(pitch) % 2 if is_drum else pitch % 12 in BLACK_KEYS:
                self._draw.rectangle((at.left, top, at.right, top + height - 1), fill=BLACK_KEY)
            if is_drum:
                self._label(at.left - 8, top + height // 2, _drum_name(pitch), "rm")
            elif pitch % 12 == 0:
                self._draw.line((at.left, top + height, at.right, top + height), fill=GRID)
                self._label(at.left - 8, top + height // 2, f"C{pitch // 12 - 1}", "rm")

    def _draw_times(self) -> None:
        at = self._at
        least = TIME_LABEL_GAP / at.roll_width * at.seconds
        step = next((step for step in TIME_STEPS if step >= least), least)
        for count in range(math.floor(at.seconds / step + 1e-9) + 1):
            x = at.x(count * step)
            for top, bottom in ((at.top, at.roll_bottom), (at.drums_top, at.bottom)):
                if bottom > top:
                    self._draw.line((x, top, x, bottom), fill=GRID)
            self._label(x, at.bottom + 6, _time_label(count * step, at.seconds), "mt")
        for top, bottom in ((at.top, at.roll_bottom), (at.drums_top, at.bottom)):
            if bottom > top:
                self._draw.rectangle((at.left, top, at.right, bottom), outline=FAINT_INK)

    def _draw_heading(self, title: str, legend: Sequence[Sequence[tuple[str, str]]], summary: str) -> None:
        y = MARGIN
        if title:
            self._draw.text((MARGIN, y), self._fit(title), fill=INK, font=self._title_font)
            y += LINE + 4
        for line in legend:
            x = MARGIN
            for name, colour in line:
                self._draw.rectangle((x, y + 2, x + 11, y + 12), fill=colour)
                self._label(x + 17, y + 8, name, "lm")
                x += self._legend_width(name)
            y += LINE
        if summary:
            self._label(MARGIN, y + 8, summary, "lm")

    def _label(self, x: int, y: int, text: str, anchor: str) -> None:
        self._draw.text((x, y), text, fill=FAINT_INK, font=self._font, anchor=anchor)

    def _legend_width(self, name: str) -> int:
        return 35 + math.ceil(float(self._font.getlength(name)))

    def _wrap(self, entries: Iterable[tuple[str, str]], width: int) -> list[list[tuple[str, str]]]:
        lines: list[list[tuple[str, str]]] = []
        room = 0
        for entry in entries:
            needed = self._legend_width(entry[0])
            if needed > room:
                lines.append([])
                room = width
            lines[-1].append(entry)
            room -= needed
        return lines

    def _fit(self, title: str) -> str:
        """Shorten a title to the width of the picture, on one line."""
        width = self._at.right - MARGIN
        text = " ".join(title.encode("utf-8", "replace").decode().split())[:2000]
        if self._title_font.getlength(text) <= width:
            return text
        lengths = range(len(text))
        return text[: bisect(lengths, width, key=lambda n: self._title_font.getlength(text[:n] + "…")) - 1] + "…"


def _pitch_rows(notes: Sequence[Note]) -> range:
    """Pitches from high to low, with some room around; none when there are only drums."""
    pitches = [note.pitch for note in notes if not note.is_drum]
    if notes and not pitches:
        return range(0)
    lowest, highest = (min(pitches) - 2, max(pitches) + 2) if pitches else (48, 77)
    missing = max(0, MIN_SEMITONES - (highest - lowest + 1))
    lowest, highest = lowest - missing // 2, highest + (missing + 1) // 2
    return range(min(highest, 127), max(lowest, 0) - 1, -1)


def _families(notes: Sequence[Note]) -> list[tuple[str, str]]:
    """Names and colours of the instrument families present."""
    present = sorted({note.program // 8 for note in notes if not note.is_drum})
    families = [(pretty_midi.INSTRUMENT_CLASSES[family], FAMILY_COLOURS[family]) for family in present]
    return families + [("Drums", DRUM_COLOUR)] * any(note.is_drum for note in notes)


def _drum_name(pitch: int) -> str:
    return pretty_midi.note_number_to_drum_name(pitch) or f"Drum {pitch}"


def _time_label(time: float, seconds: float) -> str:
    if seconds <= 120:
        return f"{time:g} s"
    minutes, rest = divmod(round(time), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if seconds >= 3600 else f"{minutes}:{rest:02}"


def check_pillow() -> None:
    """Say before the work that no picture can be drawn.

    Raises:
        DependencyError: Pillow is not installed.
    """
    _pillow()


def _pillow() -> tuple[Any, Any, Any]:
    try:
        image, draw, font = (importlib.import_module(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont"))
    except ImportError as error:
        raise DependencyError("pictures need Pillow: pip install 'mt3-runtime[picture]'") from error
    return image, draw, font
