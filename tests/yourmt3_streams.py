"""Random token streams in the vocabulary of YourMT3: what a good network says, and what a bad one might."""

from __future__ import annotations

import numpy as np

END, SHIFT, PITCH, VELOCITY, TIE, PROGRAM, DRUM, SIZE = 1, 3, 209, 337, 339, 340, 468, 596
SEGMENT_SECONDS = 32767 / 16000
PROGRAMS, PITCHES, HITS = (0, 33), (60, 61, 62), (36, 42)


class Dice:
    """Seeded random numbers."""

    def __init__(self, seed):
        self._generator = np.random.default_rng(seed)

    def chance(self, probability):
        return self._generator.random() < probability

    def below(self, limit):
        return int(self._generator.random() * limit)

    def choice(self, options):
        return options[self.below(len(options))]

    def uniform(self, low, high):
        return float(self._generator.uniform(low, high))


def starts_of(segments):
    return [32767 * index / 16000 for index in range(segments)]


def wild_tokens(dice, known):
    """One row of ids, mostly sensible ones; the others are drawn from `known`."""
    if dice.chance(0.06):
        return [dice.choice(known) for _ in range(dice.below(30))]
    tokens = [END] * dice.chance(0.05)
    for _ in range(dice.below(4)):
        tokens += [PROGRAM + dice.choice(PROGRAMS)] * dice.chance(0.7) + [PITCH + dice.choice(PITCHES)]
    tokens += [VELOCITY + dice.below(2)] * dice.chance(0.05) + [DRUM + dice.choice(HITS)] * dice.chance(0.05)
    tokens += [TIE] * dice.chance(0.85)
    step = 0
    for _ in range(dice.below(9)):
        if dice.chance(0.75):
            step = dice.below(206) if dice.chance(0.15) else min(step + dice.choice((0, 1, 1, 5, 30, 100)), 205)
            tokens.append(SHIFT + step)
        tokens += [PROGRAM + dice.choice(PROGRAMS)] * dice.chance(0.4)
        tokens += [VELOCITY + dice.chance(0.55)] * dice.chance(0.6)
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            tokens.append(PITCH + dice.choice(PITCHES) if dice.chance(0.8) else DRUM + dice.choice(HITS))
        if dice.chance(0.06):
            tokens.append(dice.choice((0, 2, TIE, SHIFT, dice.choice(known))))
    return tokens + [END, 0, PITCH + 60] * dice.chance(0.7)


def wild_stream(dice, known=range(SIZE)):
    """Segments of one piece: (start, rows of ids)."""
    channels = 1 + dice.below(3)
    starts = starts_of(1 + dice.below(6))
    if dice.chance(0.3):  # so short that events reach over several
        starts = sorted(dice.choice((dice.uniform(0, 4), dice.below(400) / 100)) for _ in starts)
    if dice.chance(0.1):
        return long_stream(dice, known)
    return [(start, [wild_tokens(dice, known) for _ in range(channels)]) for start in starts]


def long_stream(dice, known):
    """As `wild_stream`, with a note that may last for more than 10 s."""
    held = [PROGRAM, PITCH + 70]
    rows = [[TIE, VELOCITY + 1, *held, *wild_tokens(dice, known)]]
    rows += [held + wild_tokens(dice, known) for _ in range(5 + dice.below(3))]
    rows.append([*held, TIE, VELOCITY, *held])
    return [(start, [row]) for start, row in zip(starts_of(len(rows)), rows, strict=True)]


def good_notes(dice, bounds):
    """(onset, offset, pitch, program, is_untied), times in ticks.

    No two of a key meet, none lasts 10 s or goes on at the end. An untied one ends at a segment's start, one of
    `bounds`, without an offset.
    """
    notes = []
    for program in PROGRAMS:
        for pitch in PITCHES:
            now = dice.below(300)
            while now + 2 < bounds[-1]:
                end = min(now + 1 + dice.below(dice.choice((20, 200, 900))), bounds[-1] - 1)
                ahead = [bound for bound in bounds[:-1] if bound > now]
                is_untied = bool(ahead) and dice.chance(0.3)
                end = ahead[0] if is_untied else end
                notes.append((now, end, pitch, program, is_untied))
                now = end + dice.choice((2 * is_untied, 2, 40, 300))
    return [note for note in notes if dice.chance(0.7)]


def good_row(dice, notes, hits, first, last):
    """Ids that say all that happens from tick `first` on and before tick `last`."""
    events = {hit: [] for hit in hits}
    for onset, offset, pitch, program, is_untied in notes:
        if first <= onset < last:
            events.setdefault(onset, []).append((1, program, pitch))
        if first <= offset < last and not is_untied:
            events.setdefault(offset, []).append((0, program, pitch))
    tokens = []
    for onset, offset, pitch, program, is_untied in notes:
        if onset < first <= offset - is_untied:
            tokens += [PROGRAM + program, PITCH + pitch]
    tokens.append(TIE)
    for tick in sorted(events):
        tokens += [SHIFT + tick - first] * (tick > first)
        for velocity, program, pitch in sorted(events[tick]):
            tokens += [PROGRAM + program, VELOCITY + velocity, PITCH + pitch]
        tokens += [DRUM + dice.choice(HITS)] * (tick in hits)
    return [*tokens, END]


def good_stream(dice):
    """As `wild_stream`, without a flaw; its notes (onset, offset, pitch, program) and its drum hits, in seconds."""
    starts = starts_of(1 + dice.below(6))
    bounds = [round(100 * start) for start in [*starts, starts[-1] + SEGMENT_SECONDS]]
    notes = good_notes(dice, bounds)
    hits = sorted({dice.below(bounds[-1]) for _ in range(dice.below(10))})
    stream = []
    for start, first, last in zip(starts, bounds, bounds[1:], strict=False):
        parts = [[note for note in notes if note[3] == program] for program in PROGRAMS]
        own = [hit for hit in hits if first <= hit < last]
        stream.append((start, [good_row(dice, parts[0], [], first, last), good_row(dice, parts[1], own, first, last)]))
    exact = dict(zip(bounds, starts, strict=False))
    said = [
        (onset / 100, max(exact[end], (onset + 1) / 100) if is_untied else end / 100, pitch, program)
        for onset, end, pitch, program, is_untied in notes
    ]
    return stream, said, [hit / 100 for hit in hits]
