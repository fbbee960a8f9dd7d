"""From numbers to coordinates, and labels to places where they do not overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LETTER = 0.64  # of the font's size: wider than most letters of any common font


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers from `low` to `high` at coordinates from `start` to `end`; what is beyond stands at the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The coordinate of a number."""
        inside = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> tuple[float, ...]:
        """Round numbers, about as many as asked for."""
        return _powers(self.low, self.high, most) if self.log else _steps(self.low, self.high, most)


def decimals(ticks: Sequence[float]) -> int:
    """Digits behind the point that tell all ticks of an axis apart from others."""
    return max((len(f"{tick:.9f}".rstrip("0").partition(".")[2]) for tick in ticks), default=0)


def linear(values: Iterable[float], start: float, end: float, margin: float = 0.08, least: float = 1e-9) -> Scale:
    """A scale over all values with room around them; `least`: the smallest range that makes sense."""
    found = list(values)
    low, high = min(found), max(found)
    missing = max(0.0, least - (high - low)) / 2
    room = margin * (high - low + 2 * missing) + missing
    return Scale(low - room, high + room, start, end)


def logarithmic(values: Iterable[float], start: float, end: float, margin: float = 0.06) -> Scale:
    """A logarithmic scale over all positive values, at least from half to twice of one alone."""
    found = [math.log(value) for value in values if value > 0] or [0.0]
    low, high = min(found), max(found)
    room = margin * (high - low) if high - low > math.log(2) else math.log(2)
    return Scale(math.exp(low - room), math.exp(high + room), start, end, log=True)


def _steps(low: float, high: float, most: int) -> tuple[float, ...]:
    rough = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(round(count * step, 12) for count in range(first, last + 1))


def _powers(low: float, high: float, most: int) -> tuple[float, ...]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [10.0**power for power in exponents if low <= 10.0**power <= high]
    if len(inside) > most:
        return tuple(inside[:: math.ceil(len(inside) / most)])
    if len(inside) >= 3:
        return tuple(inside)
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        finer = [digit * 10.0**power for power in exponents for digit in digits]
        shown = [round(tick, 12 - math.floor(math.log10(tick))) for tick in finer if low <= tick <= high]
        if len(shown) >= 3:
            break
    return tuple(shown[:: max(1, math.ceil(len(shown) / most))])


def text_width(text: str, size: float) -> float:
    """About how wide a text is, rather too wide."""
    return LETTER * size * len(text)


def shortened(text: str, size: float, room: float) -> str:
    """A text cut in the middle to fit a width."""
    most = max(3, int(room / (LETTER * size)))
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}\u2026{text[len(text) - (most - 1 - head) :]}"


def spread(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Centres as near to the wanted ones as they can be without overlapping, between two ends if they fit.

    Args:
        wanted: Centres.
        sizes: Of what stands there, with the gap that it needs.
        low: Where the first may begin.
        high: Where the last may end.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    centres = list(wanted)
    edge = low
    for index in order:
        centres[index] = max(wanted[index], edge + sizes[index] / 2)
        edge = centres[index] + sizes[index] / 2
    edge = max(high, low + sum(sizes))
    for index in reversed(order):
        centres[index] = min(centres[index], edge - sizes[index] / 2)
        edge = centres[index] - sizes[index] / 2
    return centres


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether two overlap."""
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)

    def within(self, frame: Box) -> bool:
        """Whether it is inside another."""
        sides = self.left >= frame.left and self.right <= frame.right
        return sides and self.top >= frame.top and self.bottom <= frame.bottom


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    texts: Sequence[Box],
    marks: Sequence[Box],
) -> list[Box]:
    """Boxes for labels beside their points that meet no other label and no text, and no mark if that can be.

    Every label is tried around its point, then further and further away, then wherever there is room.
    """
    placed: list[Box] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        near = [_box(x, y, width, height, way, distance) for distance in range(11, 200, 7) for way in range(12)]
        found = _free(near, frame, (*placed, *texts, *marks))
        if found is None:
            far = _everywhere(x, y, width, height, frame)
            found = _free(far, frame, (*placed, *texts, *marks)) or _free(far, frame, (*placed, *texts)) or near[0]
        placed.append(found)
    return placed


def _free(candidates: Sequence[Box], frame: Box, taken: Sequence[Box]) -> Box | None:
    """The first inside the frame that meets nothing."""
    inside = (box for box in candidates if box.within(frame))
    return next((box for box in inside if not any(box.meets(other) for other in taken)), None)


def _everywhere(x: float, y: float, width: float, height: float, frame: Box) -> list[Box]:
    """Boxes all over the frame, the nearest first."""
    across, down = int((frame.right - frame.left - width) / 8), int((frame.bottom - frame.top - height) / 4)
    corners = [(frame.left + 8 * i, frame.top + 4 * j) for i in range(across + 1) for j in range(down + 1)]
    corners.sort(key=lambda at: math.hypot(at[0] + width / 2 - x, at[1] + height / 2 - y))
    return [Box(left, top, left + width, top + height) for left, top in corners]


def _box(x: float, y: float, width: float, height: float, way: int, distance: float) -> Box:
    """A box that begins at a distance from a point, in one of twelve directions: right, left, above, below first."""
    turns = (0, 6, 9, 3, 11, 1, 7, 5, 10, 2, 8, 4)
    angle = turns[way] * math.pi / 6
    across, down = math.cos(angle), math.sin(angle)
    centre_x = x + across * (distance + width / 2)
    centre_y = y + down * (distance + height / 2)
    return Box(centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
