"""Numbers as people read them: units, no more digits than mean something, and nothing rounded to what it is not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mt3_export.lab.results import Estimate

TIMES, MINUS, DASH, NONE = "\u00d7", "\u2212", "\u2013", "\u2013"
NARROW_SPACE = "\u202f"
SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
_DAY = 86_400


def signed(text: str) -> str:
    """A formatted number with a real minus sign, and none before zero."""
    if text.startswith("-"):
        return text[1:] if not text.strip("-0.,%") else MINUS + text[1:]
    return text


def significant(value: float, digits: int = 3) -> str:
    """About three digits; powers of ten where there would be many zeros."""
    if not value:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
        return signed(text.rstrip("0").rstrip(".") if "." in text else text)
    mantissa, _, power = f"{value:.{min(1, digits - 1)}e}".partition("e")
    return signed(mantissa) + f"{NARROW_SPACE}{TIMES}{NARROW_SPACE}10" + str(int(power)).translate(SUPERSCRIPTS)


def f1(value: float) -> str:
    """An F1 in 0..1, in thousandths."""
    return f"{value:.3f}"


def f1_range(value: Estimate) -> str:
    """An interval of an F1."""
    return f"{f1(value.low)}{DASH}{f1(value.high)}"


def points(value: float) -> str:
    """A difference of F1s in points, of which F1 = 1 is 100."""
    return signed(f"{value * 100:.{1 if abs(value) >= 0.1 else 2}f}")


def points_range(value: Estimate) -> str:
    """The interval of a difference of F1s in points."""
    return f"[{points(value.low)}, {points(value.high)}]"


def allowance(value: float) -> str:
    """A limit in points, as it was given."""
    return f"{value * 100:.6g}"


def percent(value: float) -> str:
    """A share; one that is not quite all, or not quite none, keeps the digits that say so."""
    if 0 < value < 1e-5:
        return f"under 0.001{NARROW_SPACE}%"
    for digits in range(1, 6):
        text = f"{value * 100:.{digits}f}"
        if float(text) not in {0.0, 100.0} or value in {0, 1}:
            break
    return f"{text.removesuffix('.0')}{NARROW_SPACE}%"


def size(number: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{significant(number / factor)} {unit}"
    return f"{number:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds in whatever unit keeps them short."""
    if seconds < 1:
        return f"{significant(seconds * 1e3, 2 if seconds < 1e-2 else 3)} ms"
    if seconds < 120:
        return f"{significant(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if seconds < 2 * _DAY else f"{round(seconds / 3600):,} h"


def factor(value: float) -> str:
    """How many times."""
    return f"{significant(value, 2 if value < 10 else 3)}{NARROW_SPACE}{TIMES}"


def counted(number: int, noun: str) -> str:
    """A number of things, in singular or plural."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
