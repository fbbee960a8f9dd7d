"""A second implementation of YourMT3's notes, from the description: plain, and of whole files only."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

from mt3_runtime.notes import Note, sort_notes

FIRST_IDS = {"shift": 3, "pitch": 209, "velocity": 337, "tie": 339, "program": 340, "drum": 468, "nothing": 596}
SPECIAL = ("pad", "eos", "unk", "nothing")


def marks_of(tokens, log_probs):
    """(kind, value, confidence) of every id."""
    marks, led = [], []
    for number, token in enumerate(tokens):
        kind = {0: "pad", 1: "eos", 2: "unk"}.get(token, "nothing")
        value = 0
        if token >= 3:
            kind = [name for name, first in FIRST_IDS.items() if first <= token][-1]
            value = token - FIRST_IDS[kind]
        confidence = None
        if kind not in SPECIAL:
            led.append(number)
            if log_probs is not None:
                confidence = math.exp(sum(log_probs[i] for i in led) / len(led))
        marks.append((kind, value, confidence))
        if kind in ("pitch", "drum", "tie"):
            led = []
    return marks


class WholeFile:
    """All segments of a stream at once; `keep` adds what upstream loses. Events and notes are dictionaries."""

    def __init__(self, stream, duration, keep):
        self.keep, self.duration, self.seen, self.invalid, self.dropped = keep, duration, Counter(), 0, 0
        everything, begun = [], 0
        for channel in range(len(stream[0][1])):
            notes = self.notes_of(*self.merge([(start, rows[channel]) for start, rows in stream]))
            begun += len(notes)
            notes = self.trim(self.validate(sorted(notes, key=self.order)))
            everything += notes
        everything.sort(key=lambda n: (*self.order(n), n["offset"]))
        self.notes = self.validate(self.trim(everything))
        self.dropped += begun - len(self.notes)
        self.seen["collapsed"] += begun - len(self.notes)

    @staticmethod
    def order(n):
        return n["onset"], n["drum"], n["program"], n["pitch"]

    def merge(self, rows):
        merged, before = [], []
        for number, (start, row) in enumerate(rows):
            marks, has_tie = self.prepare(marks_of(*row), before)
            if marks is None:
                events, ties, activity = [], [], []
            else:
                events, ties, activity = self.read(marks, start, number, before, has_tie)
            force = before if has_tie or not self.keep else []
            for program, pitch in [key for key in force if key not in ties]:
                merged.append({"time": start, "drum": False, "program": program, "velocity": 0, "pitch": pitch,
                               "segment": number - 1, "forced": True, "confidence": None})  # fmt: skip
            merged += events
            before = activity
        return sorted(merged, key=lambda e: (e["time"], e["drum"], e["pitch"], e["velocity"], e["program"])), before

    def prepare(self, marks, before):
        """The marks of a row that has a tie token, or is given one; None for a row that is left out."""
        kinds = [kind for kind, *_ in marks]
        places = [i for i, kind in enumerate(kinds) if kind in ("tie", "shift")]
        if places and kinds[places[0]] == "tie":
            return marks, True
        ends = [i for i, kind in enumerate(kinds) if kind == "eos" and i > 0]
        if ends:
            marks = marks[: ends[0]]
        real = [mark for mark in marks if mark[0] not in SPECIAL]
        self.invalid += len(marks) - len(real)
        if real or before:
            self.seen["no tie"] += 1
        if not self.keep:
            self.dropped += len(real)
            return None, False
        kinds = [kind for kind, *_ in real]
        shift = kinds.index("shift") if "shift" in kinds else len(real)
        velocity = kinds.index("velocity") if "velocity" in kinds[:shift] else shift
        opening = [mark for mark in real[:velocity] if mark[0] != "drum"]
        hits = [mark for mark in real[:velocity] if mark[0] == "drum"]
        return [*opening, ("tie", 0, None), *hits, *real[velocity:]], False

    def read_ties(self, marks, before):
        ties, program = [], None
        for kind, value, _ in marks:
            if kind == "program":
                program = value
            elif kind == "pitch" and program is not None:
                if (program, value) not in before or (program, value) in ties:
                    self.invalid += 1
                    self.seen["idle tie"] += 1
                ties.append((program, value))
            else:
                self.invalid += 1
        return ties, program

    def read(self, marks, start, number, before, has_tie):
        at = [kind for kind, *_ in marks].index("tie")
        ties, program = self.read_ties(marks[:at], before)
        activity = list(ties) if has_tie else before + [key for key in dict.fromkeys(ties) if key not in before]
        velocity, events = None, []
        start_tick = tick = round(start * 100)
        for kind, value, confidence in marks[at + 1 :]:
            event = {"time": tick / 100, "segment": number, "forced": False, "pitch": value, "confidence": confidence}
            if kind == "eos":
                break
            if kind == "shift" and 0 < value <= 1000:
                tick = start_tick + value
            elif kind == "drum":
                events.append({**event, "drum": True, "program": 0, "velocity": 1})
            elif kind == "program":
                program = value
            elif kind == "velocity":
                velocity = value
            elif kind == "pitch" and program is not None and velocity is not None:
                key = (program, value)
                if velocity == 0 and key not in activity:
                    self.invalid += 1
                    self.seen["stray off"] += 1
                    continue
                activity.append(key) if velocity == 1 else activity.remove(key)
                events.append({**event, "drum": False, "program": program, "velocity": velocity})
            else:
                self.invalid += 1
                self.seen["bad " + ("special" if kind in SPECIAL else kind)] += 1
        return events, ties, activity

    def notes_of(self, events, held):
        notes, active, forced = [], {}, {}

        def close(on, offset):
            notes.append({"onset": on["time"], "offset": offset, "drum": on["drum"], "program": on["program"],
                          "pitch": on["pitch"], "confidence": on["confidence"]})  # fmt: skip

        for e in events:
            key = (e["program"], e["pitch"])
            old = None if e["drum"] else active.get(key)
            if self.is_overruled(e, old):
                continue
            if old is not None:
                close(active.pop(key), e["time"])
            elif e["velocity"] == 0:
                self.invalid += not e["forced"]
                self.seen["no onset"] += not e["forced"]
            segment = e["segment"] if old is None else max(e["segment"], old["segment"])
            if e["drum"]:
                close(e, e["time"] + 0.01)
            elif e["velocity"] == 1 and self.keep and segment <= forced.get(key, -1):
                close(e, e["time"] + 0.01)
                self.seen["late onset"] += 1
            elif e["velocity"] == 1:
                active[key] = {**e, "segment": segment}
            elif e["forced"]:
                forced[key] = e["segment"]
        for n in notes:
            if n["offset"] - n["onset"] > 10:
                self.seen["long"] += 1
                n["offset"] = n["offset"] if self.keep else n["onset"] + 0.01
        for key, on in active.items():
            is_held = self.keep and key in held
            self.seen["endless" if is_held or not self.keep else "ends before it starts"] += 1
            close(on, max(self.duration, on["time"] + 0.01) if is_held else on["time"] + 0.01)
        return notes

    def is_overruled(self, e, old):
        if old is None or e["velocity"] == 1 or old["segment"] <= e["segment"]:
            return False
        self.seen["overruled"] += 1
        self.dropped += self.keep and not e["forced"]
        return self.keep

    def validate(self, notes):
        for n in notes:
            if n["onset"] > n["offset"] or (not n["drum"] and n["offset"] - n["onset"] < 0.01):
                n["offset"] = n["onset"] + 0.01
        return notes

    def trim(self, notes):
        kept = []
        for key in {(n["pitch"], n["program"], n["drum"]) for n in notes}:
            same = [n for n in notes if (n["pitch"], n["program"], n["drum"]) == key]
            same.sort(key=lambda n: n["onset"])
            for earlier, later in pairwise(same):
                if earlier["offset"] > later["onset"]:
                    earlier["offset"] = later["onset"]
                    self.seen["trimmed"] += 1
            kept += [n for n in same if n["onset"] < n["offset"]]
        return sorted(kept, key=self.order)

    def as_notes(self):
        return sort_notes(
            Note(n["onset"], n["offset"], n["pitch"], 100, n["program"], n["drum"], n["confidence"]) for n in self.notes
        )
