"""What is timed on a device, which returns before it is done: the work, and not the asking for it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mt3_runtime import bench, stopwatch
from mt3_runtime.backends.scripted_device import ScriptedDevice

ENCODING, ADMITTING, STEP = 100.0, 10.0, 1.0  # seconds: of a segment, a row, a step


class Late(ScriptedDevice):
    """A device whose time passes only when somebody waits for it."""

    now = due = 0.0

    def encode(self, features):
        self.due += ENCODING * len(features)
        return super().encode(features)

    def admit(self, first, states, memory=None):
        self.due += ADMITTING * len(states)
        super().admit(first, states, memory)

    def launch(self, positions, steps):
        self.due += STEP * steps
        super().launch(positions, steps)

    def collect(self):
        self.synchronize()
        return super().collect()

    def synchronize(self):
        self.now, self.due = self.now + self.due, 0.0


@pytest.fixture
def late(monkeypatch):
    backend = Late(dict.fromkeys(range(100), [5] * 20), slots=3, length=96, chunk=4)
    for module in (bench, stopwatch):
        monkeypatch.setattr(module, "perf_counter", lambda: backend.now)
    return backend


def test_encoding_is_timed_until_it_is_done_and_steps_without_what_came_before(late, tiny_bundle):
    transcriber = SimpleNamespace(backend=late, bundle=tiny_bundle)
    features = np.zeros((3, 4, 4), np.float32)
    options = bench.BenchOptions(None, "cuda", "fp16", None, 3, 8, 2, None)
    figures = bench._steps(transcriber, features, options)
    assert figures["encode_s"] == 3 * ENCODING
    assert figures["decode_ms_per_step"] == {"1": 1e3 * STEP, "3": 1e3 * STEP}
    assert figures["total_s"] == 3 * (ENCODING + ADMITTING) + 8 * STEP


def test_rows_of_given_lengths_do_not_wait_for_their_encoding(late, tiny_bundle, monkeypatch):
    due = []
    monkeypatch.setattr(bench, "bench_lengths", lambda backend, *_: due.append(backend.due))
    options = SimpleNamespace(lengths=(2, 3), repeat=1)
    bench._lengths(SimpleNamespace(backend=late, bundle=tiny_bundle), np.zeros((2, 4, 4), np.float32), options)
    assert due == [0.0]
