"""Rows of many owners in one queue: their keys, their memory, their share of the time, and rows nobody wants."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest

from decoding_cases import RULES, admissions_of, decode, positions_of, row, script
from mt3_runtime import stopwatch
from mt3_runtime.backends.scripted import ScriptedBackend, Stepped
from mt3_runtime.decoding import Row, decode_rows


def test_keys_may_be_anything_that_hashes():
    keys = [("song", 3, 1), "a", None, frozenset({2})]
    backend = ScriptedBackend({index: script(index, 3 + index) for index in range(4)}, slots=2)
    rows = [Row(key, row(index).states) for index, key in enumerate(keys)]
    assert {each.key: len(each.tokens) for each in decode_rows(backend, rows, RULES)} == {
        key: 3 + index for index, key in enumerate(keys)
    }


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_states_are_let_go_when_their_row_ends(slots):
    lengths = np.random.default_rng(slots).integers(0, 12, 40).tolist()
    scripts = {key: script(key, length) for key, length in enumerate(lengths)}
    scripts[7] = [5, math.nan]
    backend = ScriptedBackend(scripts, slots=slots)
    alive, most = weakref.WeakSet(), 0

    class States(np.ndarray):
        """An array that can be counted."""

        __hash__ = object.__hash__

    def rows():
        nonlocal most
        for key in scripts:
            states = np.full((2, 3), key, np.float32).view(States)
            alive.add(states)
            most = max(most, len(alive))
            yield Row(key, states)
            del states

    gone = 0
    for _ in decode_rows(backend, rows(), RULES):
        gone += 1
        assert len(alive) <= slots
    assert gone == 40
    assert most == slots
    assert not alive


# ---- rows that nobody wants any more --------------------------------------------------------------------


def families(sizes):
    """Rows (family, member) with scripts of one number for each."""
    members = [(family, member) for family, size in enumerate(sizes) for member in range(size)]
    return {key: script(index, 3 + 5 * index % 17) for index, key in enumerate(members)}


@pytest.mark.parametrize("slots", [1, 2, 4, 9])
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_rows_that_are_not_wanted_leave_without_a_result(slots, bad):
    scripts = families([4, 5, 1, 6])
    backend = ScriptedBackend(dict(enumerate(scripts.values())), slots=slots)
    unwanted, at_failure = set(), {}

    def rows():
        for index, key in enumerate(scripts):
            if key == (bad, 3):
                unwanted.add(bad)
                at_failure["calls"] = len(backend.calls)
            if key[0] != bad or key[1] < 3:
                yield Row(key, row(index).states)

    found = {each.key: each for each in decode_rows(backend, rows(), RULES, wanted=lambda key: key[0] not in unwanted)}
    numbers = {key: index for index, key in enumerate(scripts)}
    assert {key for key in scripts if key[0] != bad} <= set(found)
    for key, decoded in found.items():
        assert decoded.tokens.tolist() == scripts[key][:-1]
    stepped = [call.keys for call in backend.calls[at_failure["calls"] :] if isinstance(call, Stepped)]
    assert not {numbers[bad, member] for member in range(3)} & {key for keys in stepped for key in keys}


def test_when_nobody_is_left_the_rest_of_the_queue_still_comes():
    backend = ScriptedBackend({key: script(key, 9) for key in range(6)}, slots=2)
    unwanted = set()

    def rows():
        yield row(0)
        unwanted.update({0, 1})
        yield row(1)
        yield row(2)

    assert [each.key for each in decode_rows(backend, rows(), RULES, wanted=lambda key: key not in unwanted)] == [2]
    assert positions_of(backend, 0) == positions_of(backend, 1) == []


def test_a_second_attempt_of_an_unwanted_row_is_not_made():
    backend = ScriptedBackend({0: [5, math.nan], 1: script(1, 4)}, slots=1)
    unwanted = set()
    step = backend.step

    def stop_wanting(tokens, positions):
        if len(backend.calls) > 1:
            unwanted.add(0)
        return step(tokens, positions)

    backend.step = stop_wanting
    found = list(decode_rows(backend, map(row, [0, 1]), RULES, wanted=lambda key: key not in unwanted))
    assert [each.key for each in found] == [1]
    assert admissions_of(backend, 0) == 1


# ---- seconds --------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """A scripted backend whose calls take seconds, on a clock that only moves in them."""
    now = 0.0
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now)

    def make(scripts, **options):
        backend = ScriptedBackend(scripts, **options)

        def costs(seconds, call):
            def slow(*arguments):
                nonlocal now
                now += seconds(*arguments)
                return call(*arguments)

            return slow

        backend.step = costs(lambda tokens, _: 1 + len(tokens), backend.step)
        backend.admit = costs(lambda _, states, __: 8 * len(states), backend.admit)
        backend.move = costs(lambda *_: 0.5, backend.move)
        return backend, lambda: now

    return make


def test_a_row_has_its_share_of_the_steps_it_lived_through(timed):
    backend, _ = timed({0: script(0, 5), 1: script(1, 1)}, slots=2)
    decoded = decode(backend)
    assert decoded[0].seconds == 8 + 2 * 3 / 2 + 4 * 2
    assert decoded[1].seconds == 8 + 2 * 3 / 2


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_the_shares_add_up_to_all_seconds(timed, slots):
    lengths = np.random.default_rng(slots).integers(0, 30, 25).tolist()
    scripts = {key: script(key, length) for key, length in enumerate(lengths)}
    scripts |= {3: [7, 8, math.nan], 9: [math.nan]}  # both attempts count
    backend, now = timed(scripts, retries={9: script(9, 6)}, slots=slots)
    decoded = decode(backend)
    assert sum(each.seconds for each in decoded.values()) == pytest.approx(now(), rel=1e-12)
    assert all(each.seconds >= 8 for each in decoded.values())
    assert decoded[9].seconds >= 16


def test_what_the_source_and_the_caller_take_is_nobodys_share(timed, monkeypatch):
    backend, now = timed({key: script(key, 4) for key in range(5)}, slots=2)
    spent, idle = now(), 0.0
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now() + idle)

    def rows():
        nonlocal idle
        for key in range(5):
            idle += 1000
            yield row(key)

    total = 0.0
    for each in decode_rows(backend, rows(), RULES):
        idle += 100
        total += each.seconds
    assert total == now() - spent
