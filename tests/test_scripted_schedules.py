"""What a row decodes never depends on slots, order, neighbours or steps a launch: on scripts, with planted faults."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from mt3_runtime import launches, slots
from mt3_runtime.backends.scripted import ScriptedBackend, Stepped
from mt3_runtime.backends.scripted_device import Launched, ScriptedDevice
from mt3_runtime.decoding import DecodingRules, Row, RowDecoder

LIMIT = 40
RULES = DecodingRules(start_token=0, end_token=1, max_tokens=LIMIT)
NAN = math.nan


@dataclass(frozen=True)
class Schedule:
    """Rows in their order, what each replays, and what has to come of it."""

    slots: int
    order: list[int]
    scripts: dict[int, list[float]]
    retries: dict[int, list[float]]
    expected: dict[int, tuple[str, list[int]]]

    def backend(self, chunk=None):
        """Steps for None, else launches of so many steps."""
        options = {"retries": self.retries, "slots": self.slots, "length": LIMIT}
        if chunk is None:
            return ScriptedBackend(self.scripts, **options)
        return ScriptedDevice(self.scripts, **options, chunk=chunk)

    def run(self, backend):
        """Decode the rows under keys of file, segment and channel."""
        names = {key: (key // 20, key // 4 % 5, key % 4) for key in self.order}
        numbers = {name: key for key, name in names.items()}
        rows = (Row(names[key], np.full((1, 1), key, np.float32)) for key in self.order)
        decoder, found = RowDecoder(backend, rows, RULES), {}
        for _ in range(2 * LIMIT * len(self.order) + 10):
            found |= {numbers[row.key]: (row.status, row.tokens.tolist()) for row in decoder.advance()}
            if decoder.is_finished:
                return found
        raise AssertionError("it never ends")

    def live_rows(self):
        """Which rows every step has to cover: a queue in front of a few counters, retries going first."""
        passes = self._passes()
        queue, left = list(self.order), {}
        while queue or left:
            while queue and len(left) < self.slots:
                key = queue.pop(0)
                left[key] = passes[key].pop(0)[0]
            yield set(left)
            left = {key: steps - 1 for key, steps in left.items()}
            for key in [key for key, steps in left.items() if steps == 0]:
                del left[key]
                if passes[key]:
                    left[key] = passes[key].pop(0)[0]

    def passes(self):
        """How long each pass of each row takes."""
        return (steps for passes in self._passes().values() for steps, _ in passes)

    def _passes(self):
        passes = {key: [self._steps(self.scripts[key])] for key in self.order}
        for key in self.order:
            if passes[key][0][1]:
                passes[key].append(self._steps(self.retries.get(key, self.scripts[key])))
        return passes

    @staticmethod
    def _steps(script):
        """How long a pass takes, and whether it ends in a number that is not finite."""
        for index, value in enumerate(script[:LIMIT], start=1):
            if value == 1 or math.isnan(value):
                return index, math.isnan(value)
        return LIMIT, False


def random_schedule(seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(100)[: rng.integers(1, 16)].tolist()
    lengths = [0, 5, 20] if seed % 2 else range(LIMIT)  # few, so that rows end together
    scripts, retries, expected = {}, {}, {}
    for key in order:
        tokens = rng.integers(2, 1536, rng.choice(lengths)).tolist()
        whole = [*tokens, 1]
        broken = [*tokens[: rng.integers(0, len(tokens) + 1)], NAN]
        endless = rng.integers(2, 1536, LIMIT + 5).tolist()
        scripts[key], expected[key] = {
            "whole": (whole, ("ended", tokens)),
            "once": (broken, ("ended", tokens)),
            "twice": (broken, ("failed", broken[:-1])),
            "endless": (endless, ("truncated", endless[:LIMIT])),
        }[(kind := rng.choice(["whole", "once", "twice", "endless"], p=[0.7, 0.1, 0.1, 0.1]))]
        if kind == "once":
            retries[key] = whole
    return Schedule(int(rng.integers(1, 10)), order, scripts, retries, expected)


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_schedules_on_scripts(first):
    for seed in range(first, first + 20):
        schedule = random_schedule(seed)
        backend = schedule.backend()
        assert schedule.run(backend) == schedule.expected
        steps = [call.keys for call in backend.calls if isinstance(call, Stepped)]
        assert all(len(set(keys)) == len(keys) for keys in steps)
        assert list(map(set, steps)) == list(schedule.live_rows())


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_random_schedules_in_launches(chunk):
    """What steps give, and a slot waits for its next row no longer than the launch-ahead takes."""
    ahead = 0
    for schedule in map(random_schedule, range(200)):
        backend = schedule.backend(chunk)
        assert schedule.run(backend) == schedule.expected
        launches = [call for call in backend.launches if isinstance(call, Launched)]
        assert all(len(set(call.keys)) == len(call.keys) for call in launches)
        ahead += sum(call.ahead for call in launches)
        passes = list(schedule.passes())
        most = sum(-(-steps // chunk) * chunk + chunk for steps in passes)
        assert sum(passes) <= sum(len(call.keys) * call.steps for call in launches) <= most
    assert ahead > 1000


def test_the_schedules_are_as_different_as_they_should_be():
    schedules = [random_schedule(seed) for seed in range(200)]
    assert {schedule.slots for schedule in schedules} == set(range(1, 10))
    ends = Counter(status for schedule in schedules for status, _ in schedule.expected.values())
    assert min(ends[status] for status in ("ended", "truncated", "failed")) > 100
    assert sum(bool(schedule.retries) for schedule in schedules) > 50


# ---- faults that the scripts must find ------------------------------------------------------------------


def close_from_the_front(backend, live, holes):
    for hole in holes:
        last = live.pop()
        if hole < len(live):
            backend.move(len(live), hole, last.launched)
            live[hole] = last


def forget_the_copy(backend, live, holes):
    for hole in reversed(holes):
        last = live.pop()
        if hole < len(live):
            live[hole] = last


def copy_too_little(backend, live, holes):
    for hole in reversed(holes):
        last = live.pop()
        if hole < len(live):
            backend.move(len(live), hole, last.launched - 1)
            live[hole] = last


def copy_what_the_host_has_seen(backend, live, holes):
    for hole in reversed(holes):
        last = live.pop()
        if hole < len(live):
            backend.move(len(live), hole, len(last.tokens))
            live[hole] = last


def leave_the_hole(backend, live, holes):
    """Step a row that has ended, until its place is taken."""


class Changed:
    """Admits rows in another way than it is told to."""

    def __init__(self, backend):
        self.seed, self._admit = backend.seed, backend.admit


def admit_one_slot_off(backend, live, holes, fresh, start, place=slots._place):
    class Shifted(Changed):
        def admit(self, first, states, memory):
            self._admit(first - 1 if first else first, states, memory)

    place(Shifted(backend), live, holes, fresh, start)


def admit_in_reverse(backend, live, holes, fresh, start, place=slots._place):
    class Reversed(Changed):
        def admit(self, first, states, memory):
            self._admit(first, states[::-1], memory)

    place(Reversed(backend), live, holes, fresh, start)


def seed_nothing(backend, live, holes, fresh, start, place=slots._place):
    class Unseeded(Changed):
        def __init__(self, backend):
            self.admit, self.seed = backend.admit, lambda first, tokens: None

    place(Unseeded(backend), live, holes, fresh, start)


PLACING = [admit_one_slot_off, admit_in_reverse]
CLOSING = [close_from_the_front, forget_the_copy, copy_too_little, leave_the_hole]


def caught(chunk, most=80):
    """In how many schedules a fault shows."""
    count = 0
    for schedule in map(random_schedule, range(most)):
        try:
            assert schedule.run(schedule.backend(chunk)) == schedule.expected
        except (AssertionError, IndexError):
            count += 1
    return count


@pytest.mark.parametrize(("fault", "chunk"), [
    *((fault, chunk) for fault in (*PLACING, *CLOSING) for chunk in (None, 1, 4)),
    (seed_nothing, 4), (copy_what_the_host_has_seen, 4),
])  # fmt: skip
def test_a_faulty_scheduler_is_found_out(fault, chunk, monkeypatch):
    name = "_close_holes" if fault in (*CLOSING, copy_what_the_host_has_seen) else "_place"
    monkeypatch.setattr(slots, name, fault)
    assert caught(chunk) > 5


def believe_all_that_comes(live):
    """A row that has left is still told what was launched for it."""
    live.row = slots.replace(live.row, states=None)


def fewer_steps_than_were_begun(self, rows, begin=launches.Launches.begin):
    begun = begin(self, rows)
    for live in rows:
        live.launched -= begun
    return begun


@pytest.mark.parametrize(("owner", "name", "fault"), [
    (slots.Live, "leave", believe_all_that_comes),
    (launches.Launches, "begin", fewer_steps_than_were_begun),
])  # fmt: skip
def test_launches_that_are_misread_are_found_out(owner, name, fault, monkeypatch):
    monkeypatch.setattr(owner, name, fault)
    assert caught(4) > 5
