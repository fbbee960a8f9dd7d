"""What becomes of a row, whatever it and its neighbours do; the network is a script."""

from __future__ import annotations

import math

import numpy as np
import pytest

from decoding_cases import (
    END,
    RULES,
    START,
    admissions_of,
    check,
    decode,
    give_up_and_begin_anew,
    positions_of,
    row,
    script,
)
from mt3_runtime.backends.scripted import Admitted, Moved, ScriptedBackend, Stepped
from mt3_runtime.decoding import DecodingRules, Row, decode_rows
from mt3_runtime.errors import OptionError


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_rows_come_back_as_scripted_without_start_and_end_token(slots):
    scripts = {key: script(key, length) for key, length in enumerate([5, 0, 30, 1, 12])}
    backend = ScriptedBackend(scripts, slots=slots)
    for key, decoded in decode(backend).items():
        check(decoded, scripts[key][:-1], "ended")
        assert positions_of(backend, key) == list(range(len(scripts[key])))


def test_a_row_of_nothing_but_its_end_is_an_ended_one():
    decoded = decode(ScriptedBackend({key: [END] for key in range(5)}, slots=2))
    for key in range(5):
        check(decoded[key], [], "ended")


@pytest.mark.parametrize("rows", [[], iter(()), (row(key) for key in ())])
def test_no_rows(rows):
    backend = ScriptedBackend({}, slots=3)
    assert list(decode_rows(backend, rows, RULES)) == []
    assert backend.calls == []


def test_one_row_takes_one_slot_and_never_moves():
    backend = ScriptedBackend({7: script(7, 9)}, slots=8)
    check(decode(backend)[7], script(7, 9)[:-1], "ended")
    assert backend.calls[0] == Admitted(0, (7,))
    assert all(isinstance(call, Stepped) and call.keys == (7,) for call in backend.calls[1:])
    assert len(backend.calls) == 1 + 10


def test_a_place_in_the_middle_is_closed_by_one_move_of_the_last_row():
    backend = ScriptedBackend({0: script(0, 9), 1: script(1, 2), 2: script(2, 9)}, slots=3)
    decode(backend)
    assert [call for call in backend.calls if isinstance(call, Moved)] == [Moved(2, 1, 3)]
    assert [call.keys for call in backend.calls if isinstance(call, Stepped)] == [(0, 1, 2)] * 3 + [(0, 2)] * 7


def test_a_free_place_is_taken_without_a_move():
    backend = ScriptedBackend({0: script(0, 9), 1: script(1, 2), 2: script(2, 4), 3: script(3, 1)}, slots=3)
    decode(backend)
    assert backend.calls[4] == Admitted(1, (3,))
    assert not [call for call in backend.calls[:5] if isinstance(call, Moved)]


# ---- numbers that are not finite ----------------------------------------------------------------------

LENGTH = 30
STEPS = [0, 1, 17, LENGTH]  # the last one is where the end token is due


def poisoned(step, value=math.nan):
    return [*script(2, LENGTH)[:step], value]


def neighbours():
    return {key: script(key, length) for key, length in {0: 3, 1: 40, 3: 17, 4: 29}.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_row_that_fails_once_is_complete(slots, step, value):
    scripts = neighbours() | {2: poisoned(step, value)}
    backend = ScriptedBackend(scripts, retries={2: script(2, LENGTH)}, slots=slots)
    decoded = decode(backend, [0, 1, 2, 3, 4])
    check(decoded[2], script(2, LENGTH)[:-1], "ended")
    assert positions_of(backend, 2) == [*range(step + 1), *range(LENGTH + 1)]
    for key in neighbours():
        check(decoded[key], scripts[key][:-1], "ended")
        assert admissions_of(backend, key) == 1


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_row_that_fails_twice_has_failed_and_keeps_what_it_had(slots, step):
    scripts = neighbours() | {2: poisoned(step)}
    backend = ScriptedBackend(scripts, slots=slots)
    decoded = decode(backend, [0, 1, 2, 3, 4])
    check(decoded[2], script(2, LENGTH)[:step], "failed")
    assert positions_of(backend, 2) == 2 * list(range(step + 1))
    assert admissions_of(backend, 2) == 2
    for key in neighbours():
        check(decoded[key], scripts[key][:-1], "ended")


def test_a_row_may_fail_in_its_very_last_step():
    tokens = script(2, RULES.max_tokens - 1)[:-1]
    backend = ScriptedBackend({2: [*tokens, math.nan]}, retries={2: [*tokens, 9]})
    check(decode(backend)[2], [*tokens, 9], "truncated")
    assert admissions_of(backend, 2) == 2


def test_every_row_may_fail_at_once():
    scripts = {key: [*script(key, key)[:-1], math.nan] for key in range(9)}
    backend = ScriptedBackend(scripts, retries={key: script(key, 5) for key in range(0, 9, 2)}, slots=4)
    for key, decoded in decode(backend).items():
        if key % 2:
            check(decoded, scripts[key][:-1], "failed")
        else:
            check(decoded, script(key, 5)[:-1], "ended")


@pytest.mark.parametrize("place", range(8))
def test_seven_neighbours_of_a_poisoned_row_are_as_if_alone(place):
    lengths = np.random.default_rng(place).integers(0, 50, 8)
    scripts = {key: script(key, length) for key, length in enumerate(lengths.tolist())}
    alone = {key: decode(ScriptedBackend({key: tokens}))[key] for key, tokens in scripts.items()}
    decoded = decode(ScriptedBackend(scripts | {place: [math.nan]}))
    check(decoded.pop(place), [], "failed")
    assert len(decoded) == 7
    for key, other in decoded.items():
        check(other, alone[key].tokens.tolist(), "ended")


# ---- the limit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_row_that_never_ends_stops_at_the_limit_and_keeps_everything(slots):
    scripts = neighbours() | {2: script(2, 1000)}
    backend = ScriptedBackend(scripts, slots=slots)
    decoded = decode(backend, [2, 0, 1, 3, 4])
    check(decoded[2], script(2, 1000)[: RULES.max_tokens], "truncated")
    assert positions_of(backend, 2) == list(range(RULES.max_tokens))
    for key in neighbours():
        check(decoded[key], scripts[key][:-1], "ended")
        assert positions_of(backend, key) == list(range(len(scripts[key])))


def test_the_end_token_counts_towards_the_limit():
    limit = RULES.max_tokens
    scripts = {0: script(0, limit - 1), 1: script(1, limit)}
    backend = ScriptedBackend(scripts)
    decoded = decode(backend)
    check(decoded[0], scripts[0][:-1], "ended")
    check(decoded[1], scripts[1][:-1], "truncated")
    assert positions_of(backend, 0) == positions_of(backend, 1) == list(range(limit))


@pytest.mark.parametrize("limit", [1, 5])
def test_without_an_end_token_every_row_takes_the_same_steps(limit):
    scripts = {key: script(key, key) + script(key, 9) for key in range(5)}
    backend = ScriptedBackend(scripts, slots=2)
    for key, decoded in decode(backend, rules=DecodingRules(START, None, limit)).items():
        check(decoded, scripts[key][:limit], "truncated")


def test_the_cache_bounds_the_limit():
    scripts = {0: script(0, 100)}
    check(decode(ScriptedBackend(scripts, length=64))[0], scripts[0][:64], "truncated")
    backend, rows = ScriptedBackend(scripts, length=63), iter([row(0)])
    with pytest.raises(OptionError, match="64 tokens a row do not fit a cache of 63: ask for fewer"):
        next(decode_rows(backend, rows, RULES))
    assert backend.calls == []
    assert next(rows).key == 0


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_nothing_is_refused(limit):
    with pytest.raises(OptionError, match="ask for 1 or more"):
        DecodingRules(START, END, limit)


def test_a_row_may_have_a_limit_of_its_own():
    scripts = {key: script(key, 20) for key in range(4)}
    backend = ScriptedBackend(scripts, slots=2)
    rows = [Row(key, row(key).states, limit) for key, limit in enumerate([3, None, 1, 1000])]
    decoded = {each.key: each for each in decode_rows(backend, rows, DecodingRules(START, END, 12))}
    for key, length in enumerate([3, 12, 1, 12]):
        check(decoded[key], scripts[key][:length], "truncated")
        assert positions_of(backend, key) == list(range(length))


# ---- an end in the first place --------------------------------------------------------------------------

UPSTREAM = DecodingRules(START, END, max_tokens=64, first_may_end=False)
FIRST_ENDS = {
    "a row goes on after it": ([END, 7, 8, END], [END, 7, 8], "ended"),
    "the next one ends the row": ([END, END], [END], "ended"),
    "only the first place is exempt": ([7, END], [7], "ended"),
    "without another the row is truncated": ([END] + [9] * 63, [END] + [9] * 63, "truncated"),
    "a failure is a failure all the same": ([END, 7, math.nan], [END, 7], "failed"),
    "also in the first place": ([math.nan], [], "failed"),
}


@pytest.mark.parametrize("name", FIRST_ENDS)
@pytest.mark.parametrize("slots", [1, 3])
def test_an_end_in_the_first_place_may_be_a_token_like_any_other(name, slots):
    tokens, expected, status = FIRST_ENDS[name]
    scripts = {key: script(key, length) for key, length in enumerate([4, 0, 9])} | {5: tokens}
    scripts[1] = [END, 5, END]
    decoded = decode(ScriptedBackend(scripts, slots=slots), [0, 5, 1, 2], UPSTREAM)
    check(decoded[5], expected, status)
    check(decoded[0], scripts[0][:-1], "ended")
    check(decoded[1], [END, 5], "ended")
    check(decoded[2], scripts[2][:-1], "ended")


def test_an_end_in_the_first_place_ends_a_row_elsewhere():
    check(decode(ScriptedBackend({5: [END, 7, 8, END]}))[5], [], "ended")


def test_the_first_place_counts_for_every_attempt():
    backend = ScriptedBackend({5: [END, math.nan]}, retries={5: [END, 4, END]})
    check(decode(backend, rules=UPSTREAM)[5], [END, 4], "ended")


# ---- rows come and go ---------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_rows_are_taken_only_when_a_slot_is_free(slots):
    lengths = np.random.default_rng(3).integers(0, 20, 40).tolist()
    scripts = {key: script(key, length) for key, length in enumerate(lengths)}
    scripts[5] = [2, 3, math.nan]
    backend = ScriptedBackend(scripts, retries={5: script(5, 4)}, slots=slots)
    taken, gone = [], 0

    def rows():
        for key in scripts:
            taken.append(key)
            yield row(key)

    def step(tokens, positions, plain=backend.step):
        assert len(tokens) == len(taken) - gone  # taken, not given back: in a slot, none on a heap
        return plain(tokens, positions)

    backend.step = step
    stream = decode_rows(backend, rows(), RULES)
    assert taken == []
    for _ in stream:
        gone += 1
        assert len(taken) <= gone + slots
    assert (len(taken), gone) == (40, 40)


def test_rows_come_back_as_they_end():
    lengths = {0: 9, 1: 2, 2: 5, 3: 0, 4: 7}
    backend = ScriptedBackend({key: script(key, length) for key, length in lengths.items()}, slots=8)
    assert [decoded.key for decoded in decode_rows(backend, map(row, lengths), RULES)] == [3, 1, 2, 4, 0]
    backend = ScriptedBackend({0: script(0, 30), 1: script(1, 2)})
    assert next(decode_rows(backend, map(row, [0, 1]), RULES)).key == 1
    assert len(positions_of(backend, 0)) == 3  # no step beyond the one that ended row 1


def test_what_was_yielded_does_not_change_afterwards():
    scripts = {key: script(key, 3 * key) for key in range(6)}
    backend = ScriptedBackend(scripts, slots=3)
    kept = [(decoded, decoded.tokens.copy()) for decoded in decode_rows(backend, map(row, scripts), RULES)]
    for decoded, tokens in kept:
        assert decoded.tokens.tolist() == tokens.tolist() == scripts[decoded.key][:-1]


@pytest.mark.parametrize("results", range(5))
def test_a_stream_closed_early_leaves_the_backend_usable(results):
    give_up_and_begin_anew(lambda scripts: ScriptedBackend(scripts, slots=4), results)


def test_an_error_in_the_source_of_rows_comes_out_and_leaves_the_backend_usable():
    scripts = {key: script(key, 6) for key in range(4)}
    backend = ScriptedBackend(scripts, slots=2)

    def rows():
        yield row(0)
        yield row(1)
        raise OSError("disk gone")

    stream = decode_rows(backend, rows(), RULES)
    with pytest.raises(OSError, match="disk gone"):
        list(stream)
    for key, decoded in decode(backend).items():
        check(decoded, scripts[key][:-1], "ended")


# ---- the script itself --------------------------------------------------------------------------------


def ints(*values):
    return np.array(values, np.int32)


def states(*keys):
    return np.array(keys, np.float32).reshape(-1, 1, 1)


@pytest.mark.parametrize(("call", "reason"), [
    (lambda backend: backend.admit(2, states(0, 1)), "2 rows do not fit from slot 2"),
    (lambda backend: backend.admit(0, states(8)), "row 8 has no script"),
    (lambda backend: backend.step(ints(5, 7, 0), ints(1, 1, 0)), "slot 2 was stepped before"),
    (lambda backend: backend.step(ints(5), ints(0)), "row 0 in slot 0 was read at position 0, not 1"),
    (lambda backend: backend.step(ints(7), ints(1)), "row 0 in slot 0 read token 7 at 1, not its own 5"),
    (lambda backend: backend.step(ints(5), ints(1, 1)), "1 tokens at 2 positions"),
    (lambda backend: backend.step(ints(), ints()), "0 tokens"),
    (lambda backend: backend.step(np.array([5]), ints(1)), "int64 tokens"),
    (lambda backend: backend.move(1, 3, 1), "cannot go from slot 1 to slot 3"),
    (lambda backend: backend.move(1, 1, 1), "cannot go from slot 1 to slot 1"),
    (lambda backend: backend.move(2, 0, 0), "slot 2 was moved before"),
    (lambda backend: (backend.move(1, 0, 0), backend.step(ints(7), ints(1))), "a cache that is not its own"),
    (lambda backend: (backend.move(1, 0, 1), backend.step(ints(7, 7), ints(1, 1))), "read at position 1, not 2"),
    (lambda backend: [backend.step(ints(t), ints(p)) for t, p in ((5, 1), (1, 2))], "after the end of its script"),
])  # fmt: skip
def test_calls_that_break_the_contract_are_refused(call, reason):
    backend = ScriptedBackend({0: [5, 1], 1: [7, 1]}, slots=3)
    backend.admit(0, states(0, 1))
    backend.step(ints(0, 0), ints(0, 0))
    with pytest.raises(AssertionError, match=reason):
        call(backend)


def test_scripts_and_sizes_that_mean_nothing_are_refused():
    with pytest.raises(OptionError, match="row 3 holds a fraction: give token ids and NaN"):
        ScriptedBackend({3: [2.5]})
    for sizes in ({"slots": 0}, {"length": 0}):
        with pytest.raises(OptionError, match="give 1 or more of each"):
            ScriptedBackend({}, **sizes)
