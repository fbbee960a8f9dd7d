"""Segments with notes told for the wrong instrument, so that a network learns to go on after errors of its own.

A network that only ever reads true tokens trusts them: having told a note for one instrument, it still tells it for the
next one, which sounds likelier now that it comes to it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from demo_model.targets import SegmentEvents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator

    from demo_model.targets import Group, Voice


def mistell(segment: SegmentEvents, share: float, rng: Generator) -> SegmentEvents:
    """The segment with some of its onsets, and their offsets, told for another of its instruments.

    Only earlier programs are taken: what comes before a note's own place is what must keep it from being told there.

    Args:
        segment: what was played.
        share: of the onsets that have an earlier program to go to.
        rng: decides which, and where to.
    """
    groups = list(segment.groups)
    told = {*segment.ties, *(voice for group in groups for voice in (*group.offsets, *group.onsets))}
    programs = sorted({program for program, _ in told})
    for index, group in enumerate(segment.groups):
        for voice in group.onsets:
            free = [p for p in programs if p < voice[0] and (p, voice[1]) not in told]
            if not free or rng.random() >= share:
                continue
            wrong = (int(rng.choice(free)), voice[1])
            told.add(wrong)
            onsets = _with(groups[index].onsets, voice, wrong)
            groups[index] = replace(groups[index], onsets=onsets, mistold=groups[index].mistold | {wrong})
            _move_offset(groups, index + 1, voice, wrong)
    return SegmentEvents(segment.ties, tuple(groups))


def _move_offset(groups: list[Group], first: int, voice: Voice, wrong: Voice) -> None:
    for index in range(first, len(groups)):
        if voice in groups[index].offsets:
            groups[index] = replace(groups[index], offsets=_with(groups[index].offsets, voice, wrong))
            return


def _with(voices: Sequence[Voice], old: Voice, new: Voice) -> tuple[Voice, ...]:
    return tuple(sorted(new if voice == old else voice for voice in voices))
