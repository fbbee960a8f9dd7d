"""Rows that replay scripts, and what has to come of them."""

from __future__ import annotations

import numpy as np

from mt3_runtime.backends.scripted import Admitted, Stepped
from mt3_runtime.decoding import DecodedRow, DecodingRules, Row, decode_rows

START, END = 0, 1
RULES = DecodingRules(START, END, max_tokens=64)


def script(key, length):
    """Tokens that no other row has, then the end."""
    return [100 * key + 2 + index for index in range(length)] + [END]


def row(key):
    return Row(key, np.full((2, 3), key, np.float32))


def decode(backend, keys=None, rules=RULES):
    keys = list(backend._scripts) if keys is None else keys
    decoded = list(decode_rows(backend, map(row, keys), rules))
    assert sorted(row.key for row in decoded) == sorted(keys)
    return {row.key: row for row in decoded}


def check(decoded, tokens, status):
    assert isinstance(decoded, DecodedRow)
    assert decoded.status == status
    assert decoded.tokens.tolist() == list(tokens)
    assert decoded.tokens.dtype == np.int32
    assert decoded.log_probs.dtype == np.float32
    assert decoded.log_probs.tolist() == [-token / 1024 for token in tokens]


def positions_of(backend, key):
    """Where a row was stepped, over all its passes."""
    steps = [call for call in backend.calls if isinstance(call, Stepped)]
    return [position for step in steps for own, position in zip(step.keys, step.positions, strict=True) if own == key]


def admissions_of(backend, key):
    return sum(call.keys.count(key) for call in backend.calls if isinstance(call, Admitted))


def give_up_and_begin_anew(make, results):
    """Close a decoding after so many results: the same backend then decodes all rows whole."""
    scripts = {key: script(key, 4 + 7 * key % 5) for key in range(9)}
    backend = make(scripts)
    stream = decode_rows(backend, map(row, scripts), RULES)
    for _ in range(results):
        next(stream)
    stream.close()
    for key, decoded in decode(backend, list(scripts)[::-1]).items():
        check(decoded, scripts[key][:-1], "ended")


def follow(backend, steps, count):
    """Step slots 0..count-1 from their start: tokens and log-probabilities [rows, steps]."""
    tokens, chosen = np.zeros(count, np.int32), []
    for position in range(steps):
        found, log_probs = backend.step(tokens, np.full(count, position, np.int32))
        tokens = found.copy()
        chosen.append((tokens, log_probs.copy()))
    return tuple(np.array(column).T for column in zip(*chosen, strict=True))
