"""Decoding in launches of several steps gives what decoding step by step gives; a fake device checks every call."""

from __future__ import annotations

import math

import numpy as np
import pytest

from decoding_cases import END, RULES, START, check, decode, give_up_and_begin_anew, row, script
from mt3_runtime.backends.scripted import Admitted, ScriptedBackend
from mt3_runtime.backends.scripted_device import Collected, Launched, ScriptedDevice
from mt3_runtime.decoding import DecodingRules, Row, RowDecoder, decode_rows
from mt3_runtime.errors import OptionError

CHUNKS = [1, 4, 16]
LENGTH = 30


def launches_of(backend):
    return [call for call in backend.launches if isinstance(call, Launched)]


def ints(*values):
    return np.array(values, np.int32)


def states(*keys):
    return np.array(keys, np.float32).reshape(-1, 1, 1)


# ---- what becomes of rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("slots", [1, 2, 8])
def test_rows_come_back_as_scripted(chunk, slots):
    scripts = {key: script(key, length) for key, length in enumerate([5, 0, 30, 1, 12, 3, 4, 15, 16, 17])}
    decoded = decode(ScriptedDevice(scripts, slots=slots, chunk=chunk))
    for key, found in decoded.items():
        check(found, scripts[key][:-1], "ended")


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("step", [0, 1, 17, LENGTH])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_fails_is_decoded_once_more(chunk, slots, step, value):
    scripts = {key: script(key, length) for key, length in {0: 3, 1: 40, 3: 17, 4: 29}.items()}
    bad = [*script(2, LENGTH)[:step], value]
    once = ScriptedDevice(scripts | {2: bad}, retries={2: script(2, LENGTH)}, slots=slots, chunk=chunk)
    check(decode(once, [0, 1, 2, 3, 4])[2], script(2, LENGTH)[:-1], "ended")
    found = decode(ScriptedDevice(scripts | {2: bad}, slots=slots, chunk=chunk), [0, 1, 2, 3, 4])
    check(found.pop(2), script(2, LENGTH)[:step], "failed")
    for key, other in found.items():
        check(other, scripts[key][:-1], "ended")


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("limit", [1, 3, 4, 5, 64])
def test_rows_stop_at_their_limits(chunk, limit):
    """Also at the last place of the cache, which is where a row that runs on stays."""
    scripts = {key: script(key, 1000) for key in range(5)} | {5: script(5, limit - 1), 6: script(6, limit)}
    rules = DecodingRules(START, END, limit)
    backend = ScriptedDevice(scripts, slots=3, length=64, chunk=chunk)
    found = decode(backend, rules=rules)
    for key in (0, 1, 2, 3, 4, 6):
        check(found[key], scripts[key][:limit], "truncated")
    check(found[5], scripts[5][:-1], "ended")
    own = [Row(key, row(key).states, own) for key, own in enumerate([3, None, 1, 1000])]
    backend = ScriptedDevice(scripts, slots=2, length=64, chunk=chunk)
    for decoded in decode_rows(backend, own, rules):
        most = min(limit, {0: 3, 2: 1}.get(decoded.key, 1000))
        check(decoded, scripts[decoded.key][:most], "truncated")


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("tokens", "expected", "status"),
    [
        ([END, 7, 8, END], [END, 7, 8], "ended"),
        ([END, END], [END], "ended"),
        ([7, END], [7], "ended"),
        ([END] + [9] * 63, [END] + [9] * 63, "truncated"),
        ([END, 7, math.nan], [END, 7], "failed"),
        ([math.nan], [], "failed"),
    ],
)
def test_an_end_in_the_first_place_may_be_a_token_like_any_other(chunk, tokens, expected, status):
    rules = DecodingRules(START, END, max_tokens=64, first_may_end=False)
    scripts = {0: script(0, 4), 5: tokens, 1: [END, 5, END], 2: script(2, 9)}
    found = decode(ScriptedDevice(scripts, slots=3, length=64, chunk=chunk), rules=rules)
    check(found[5], expected, status)
    check(found[1], [END, 5], "ended")


def test_rows_come_back_as_they_end():
    lengths = {0: 9, 1: 2, 2: 5, 3: 0, 4: 7}
    backend = ScriptedDevice({key: script(key, length) for key, length in lengths.items()}, chunk=16)
    assert [found.key for found in decode_rows(backend, map(row, lengths), RULES)] == [3, 1, 2, 4, 0]


@pytest.mark.parametrize("results", range(5))
@pytest.mark.parametrize("chunk", CHUNKS)
def test_decoding_that_was_given_up_leaves_the_device_usable(results, chunk):
    give_up_and_begin_anew(lambda scripts: ScriptedDevice(scripts, slots=4, chunk=chunk), results)


# ---- what it costs ----------------------------------------------------------------------------------------


def test_the_next_launch_is_made_before_the_last_is_read():
    backend = ScriptedDevice({key: script(key, 39) for key in range(3)}, slots=3, chunk=4)
    decode(backend)
    kinds = [type(call) for call in backend.launches]
    assert kinds[:5] == [Launched, Launched, Collected, Launched, Collected]
    assert [call.ahead for call in launches_of(backend)] == [False] + [True] * (len(launches_of(backend)) - 1)
    assert len(launches_of(backend)) == 10 + 1


def test_nothing_is_launched_that_no_row_can_need():
    """Rows of a length that is known: launches of 16, and a last one of what is left, to a power of two."""
    backend = ScriptedDevice({key: script(key, 100) for key in range(3)}, slots=3, chunk=16)
    decode(backend, rules=DecodingRules(START, None, 37))
    assert [call.steps for call in launches_of(backend)] == [16, 16, 8]


class Chain:
    """Rows that wait for each other, as those of a song with memory do."""

    def __init__(self, count, with_memory):
        self.count, self.with_memory, self.next, self.ready = count, with_memory, 0, True

    def __iter__(self):
        while self.next < self.count:
            if not self.ready:
                yield None
                continue
            self.ready = False
            self.next += 1
            memory = np.zeros(4, np.int32) if self.with_memory else None
            yield Row(self.next - 1, row(self.next - 1).states, memory=memory)


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("slots", [1, 4])
def test_a_chain_pays_for_no_launch_that_it_cannot_use(slots, with_memory):
    lengths = [5, 0, 13, 3, 4, 8]
    backend = ScriptedDevice(dict(enumerate(map(script, range(6), lengths))), slots=slots, chunk=4)
    rows = Chain(6, with_memory)
    for decoded in decode_rows(backend, rows, RULES):
        check(decoded, script(decoded.key, lengths[decoded.key])[:-1], "ended")
        rows.ready = True
    steps = [-(-(length + 1) // 4) for length in lengths]
    # without memory: nobody waits for the last one, and a full backend does not ask whether anybody does
    extra = 0 if with_memory else 1 if slots > 1 else len(lengths)
    assert sum(steps) <= len(launches_of(backend)) <= sum(steps) + extra


def test_a_new_row_waits_for_one_launch_where_rows_come_now_and_then():
    """As live streams do: nothing is ahead of it that its neighbour might not need."""
    backend = ScriptedDevice({0: script(0, 40), 1: script(1, 3)}, slots=4, chunk=4)
    ready = [row(0)]
    decoder = RowDecoder(backend, iter(lambda: ready.pop() if ready else None, ...), RULES)
    for _ in range(4):
        assert decoder.advance() == []
    ready.append(row(1))
    assert [found.key for found in decoder.advance()] == [1]
    assert not any(call.ahead for call in launches_of(backend))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_states_are_let_go_when_their_row_ends(chunk):
    taken, given = [], []

    class States(np.ndarray):
        def __del__(self):
            given.append(1)

    def rows():
        for key in range(30):
            taken.append(key)
            yield Row(key, np.full((2, 3), key, np.float32).view(States))

    backend = ScriptedDevice({key: script(key, 3 * key % 13) for key in range(30)}, slots=4, chunk=chunk)
    for gone, _ in enumerate(decode_rows(backend, rows(), RULES), start=1):
        assert len(taken) <= gone + 4 + 16  # those that ended in one launch are handed out one by one
    assert len(taken) == 30
    assert len(given) >= 30


# ---- the fake itself --------------------------------------------------------------------------------------


def ready_device():
    backend = ScriptedDevice({0: [5, 6, 1], 1: [7, 1]}, slots=3, chunk=2)
    backend.admit(0, states(0, 1))
    backend.seed(0, ints(0, 0))
    return backend


@pytest.mark.parametrize(("calls", "reason"), [
    (lambda d: (d.admit(2, states(0)), d.launch(ints(0, 0, 0), 1)), "row 0 in slot 2 was launched before"),
    (lambda d: (d.admit(1, states(1)), d.launch(ints(0, 0), 1)), "row 1 in slot 1 was launched before it was seeded"),
    (lambda d: d.launch(ints(0, 0, 0), 1), "slot 2 was used before a row was admitted"),
    (lambda d: d.launch(ints(1, 0), 1), "row 0 in slot 0 was read at position 1, not 0"),
    (lambda d: d.launch(ints(0, 0), 3), "3 steps, but a launch takes 1 to 2"),
    (lambda d: d.launch(ints(0, 0), 0), "0 steps"),
    (lambda d: d.launch(np.array([0, 0]), 1), "int64 positions"),
    (lambda d: d.launch(ints(), 1), "0 rows"),
    (lambda d: d.collect(), "none is under way"),
    (lambda d: (d.launch(ints(0), 1), d.collect(), d.collect()), "none is under way"),
    (lambda d: [d.launch(ints(n), 1) for n in range(3)], "2 launches are under way already"),
    (lambda d: (d.launch(ints(0, 0), 2), d.collect(), d.launch(ints(2, 2), 1)), "row 1 was launched after its end"),
    (lambda d: (d.launch(ints(0, 0), 2), d.launch(ints(2, 3), 1)), "row 1 in slot 1 was read at position 3, not 2"),
    (lambda d: (d.launch(ints(0), 1), d.seed(0, ints(0))), "row 0 was seeded with 0 after 1 steps"),
    (lambda d: d.seed(0, ints(9)), "row 0 was seeded with 9"),
    (lambda d: d.seed(0, np.array([0])), "int64 tokens"),
    (lambda d: (d.launch(ints(0, 0), 1), d.move(1, 0, 0), d.launch(ints(1), 1)), "a cache that is not its own"),
    (lambda d: d.step(ints(0), ints(0)), "stepped from the host"),
])  # fmt: skip
def test_calls_that_break_the_contract_are_refused(calls, reason):
    with pytest.raises(AssertionError, match=reason):
        calls(ready_device())


def test_results_are_overwritten_by_the_launch_after_the_next():
    backend = ready_device()
    backend.launch(ints(0), 1)
    first, scores = backend.collect()
    assert (first.tolist(), scores.tolist()) == ([[5]], [[-5 / 1024]])
    backend.launch(ints(1), 1)
    assert first.tolist() == [[5]]
    backend.launch(ints(2), 1)
    assert first.tolist() != [[5]]


def test_rows_run_on_with_garbage_that_is_not_finite():
    backend = ScriptedDevice({0: [1]}, slots=1, chunk=64)
    backend.admit(0, states(0))
    backend.seed(0, ints(0))
    backend.launch(ints(0), 64)
    tokens, scores = backend.collect()
    assert (tokens[0, 0], scores[0, 0]) == (1, -1 / 1024)
    assert np.isnan(scores).any()
    assert len(set(tokens[1:, 0].tolist())) > 3


def test_a_device_of_no_steps_is_refused():
    with pytest.raises(OptionError, match="give 1 or more"):
        ScriptedDevice({}, chunk=0)


def test_steps_and_launches_admit_alike():
    """The same rows in the same order, whatever a launch holds."""
    scripts = {key: script(key, 5 + 3 * key % 7) for key in range(20)}
    orders = []
    for backend in (ScriptedBackend(scripts, slots=4), *(ScriptedDevice(scripts, slots=4, chunk=n) for n in CHUNKS)):
        decode(backend)
        orders.append([key for call in backend.calls if isinstance(call, Admitted) for key in call.keys])
    assert orders == [list(range(20))] * 4
