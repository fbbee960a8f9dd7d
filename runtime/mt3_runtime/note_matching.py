"""Pairs notes of two sets: the largest matching there is, as `mir_eval` finds it, in groups of one pitch.

Notes of another pitch never pair, nor do drums with pitched notes, so that groups are small. Nearest pairs are made
first; what they leave single is then paired along shortest augmenting paths (J. E. Hopcroft and R. M. Karp, "An
n^5/2 algorithm for maximum matchings in bipartite graphs", 1973).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mt3_runtime.notes import Note

    Agrees = Callable[[Note, Note], bool]
    Neighbours = Mapping[int, Sequence[int]]

ONSET_TOLERANCE = 0.05  # seconds, as in mir_eval
STEPS_PER_SECOND = 1e4  # mir_eval rounds distances so: times on a grid are often exactly 50 ms apart, but for float64


def rounded(seconds: float) -> float:
    """A distance to 0.1 ms, rounded bit for bit as numpy does for mir_eval."""
    return round(seconds * STEPS_PER_SECOND) / STEPS_PER_SECOND


def match_notes(
    reference: Sequence[Note],
    notes: Sequence[Note],
    *,
    onset_tolerance: float = ONSET_TOLERANCE,
    agrees: Agrees = lambda _reference, _note: True,
    start: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """As many pairs as possible of notes of one pitch, both drums or neither, whose onsets are near enough.

    Args:
        reference: Notes in any order.
        notes: Notes in any order.
        onset_tolerance: Seconds; a distance of exactly that much is near enough.
        agrees: What a pair (reference note, note) must fulfil besides.
        start: Pairs to begin with: their notes all stay paired, if perhaps with others.

    Returns:
        For each paired reference note the note, both as indices.
    """
    matched = dict(start or {})
    taken = {note: index for index, note in matched.items()}
    for theirs, ours in _groups(reference, notes):
        edges = list(_near(reference, theirs, notes, ours, onset_tolerance, agrees))
        _pair_nearest(edges, matched, taken)
        _augment(theirs, edges, matched, taken)
    return matched


def _groups(reference: Sequence[Note], notes: Sequence[Note]) -> Iterable[tuple[list[int], list[int]]]:
    """Indices of both, by pitch, in order of onset."""
    groups: defaultdict[tuple[bool, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, among in enumerate((reference, notes)):
        for index in _by_onset(among):
            groups[among[index].is_drum, among[index].pitch][side].append(index)
    return groups.values()


def _by_onset(notes: Sequence[Note]) -> list[int]:
    return sorted(range(len(notes)), key=lambda index: notes[index].onset)


def _near(
    reference: Sequence[Note],
    theirs: Sequence[int],
    notes: Sequence[Note],
    ours: Sequence[int],
    tolerance: float,
    agrees: Agrees,
) -> Iterable[tuple[float, int, int]]:
    """Pairs that may be made: distance in seconds, reference note, note."""
    onsets = [notes[index].onset for index in ours]
    reach = tolerance + 1 / STEPS_PER_SECOND
    for index in theirs:
        wanted = reference[index]
        for other in ours[bisect_left(onsets, wanted.onset - reach) : bisect_right(onsets, wanted.onset + reach)]:
            note = notes[other]
            distance = abs(wanted.onset - note.onset)
            if rounded(distance) <= tolerance and agrees(wanted, note):
                yield distance + abs(wanted.offset - note.offset), index, other


def _pair_nearest(edges: Iterable[tuple[float, int, int]], matched: dict[int, int], taken: dict[int, int]) -> None:
    for _, index, other in sorted(edges):
        if index not in matched and other not in taken:
            matched[index], taken[other] = other, index


def _augment(
    theirs: Sequence[int], edges: Sequence[tuple[float, int, int]], matched: dict[int, int], taken: dict[int, int]
) -> None:
    """Pair the notes left single, as long as there is a way to; changes `matched` and its inverse `taken`."""
    neighbours: defaultdict[int, list[int]] = defaultdict(list)
    for _, index, other in sorted(edges):
        neighbours[index].append(other)
    found = True
    while found:
        single = [index for index in theirs if index not in matched and index in neighbours]
        depths = _depths(single, neighbours, taken)
        found = False
        for index in single if depths else ():
            found |= _follow(index, neighbours, depths, matched, taken)


def _depths(single: Sequence[int], neighbours: Neighbours, taken: Mapping[int, int]) -> dict[int, int]:
    """How many pairs each reference note is from a single one, up to where a single note is reached; else nothing."""
    depths = dict.fromkeys(single, 0)
    layer, reached = list(single), False
    while layer and not reached:
        following = []
        for index in layer:
            for other in neighbours.get(index, ()):
                if other not in taken:
                    reached = True
                elif taken[other] not in depths:
                    depths[taken[other]] = depths[index] + 1
                    following.append(taken[other])
        layer = following
    return depths if reached else {}


def _follow(
    single: int, neighbours: Neighbours, depths: dict[int, int], matched: dict[int, int], taken: dict[int, int]
) -> bool:
    """Pair one single note along a path of growing depth, if there is one; notes that lead nowhere leave `depths`."""
    path = [(single, iter(neighbours[single]))]
    steps: list[int] = []  # the note by which each reference note of the path but the last is left
    while path:
        index, others = path[-1]
        other = next(others, None)
        if other is None:
            del depths[index]
            path.pop()
            if steps:
                steps.pop()
        elif other not in taken:
            for (left, _), note in zip(path, [*steps, other], strict=True):
                matched[left], taken[note] = note, left
                depths.pop(left)
            return True
        elif depths.get(taken[other]) == depths[index] + 1:
            steps.append(other)
            path.append((taken[other], iter(neighbours.get(taken[other], ()))))
    return False
