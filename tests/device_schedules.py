"""A random scheduler over a device, and rows whose tokens are known: every backend for GPUs must pass under it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from device_cases import CONTEXT, FRAMES, LENGTH, SPAN, Numbers, expected, remembered, row_states
from mt3_runtime.backends.device_rows import DeviceOptions, DeviceRows
from mt3_runtime.backends.fake_gpu import FakeGpu, FakeGraphs

SLOTS, LENGTHS = 6, (8, 16, LENGTH)


def device(manifest, precision="fp16", chunk=4, *, eager=False, slots=SLOTS, **graphs):
    gpu = FakeGpu(eager=eager)
    given = {"lengths": LENGTHS, **graphs}
    options = DeviceOptions(slots, precision=precision, chunk=chunk)
    held = {spec.name for spec in manifest.contracts}
    functions = {name: run for name, run in Numbers(precision).functions().items() if name in held}
    made = FakeGraphs(gpu, functions, **given)
    return DeviceRows(manifest, gpu, made, options, device="fake:0", provider="FakeGpu")


@dataclass(eq=False)
class Live:
    state: object
    told: np.ndarray | None
    wanted: list[int]  # [] for a row that fails
    position: int = 0
    found: list[int] = field(default_factory=list)


class Host:
    """A scheduler that launches ahead, admits, moves and throws away, at random but always as the contract says."""

    def __init__(self, backend, rows, rng):
        self.backend, self.waiting, self.rng = backend, rows, rng
        self.slots, self.launched, self.ended, self.moves = [], [], 0, 0

    def run(self):
        while self.waiting or self.slots or self.launched:
            self.fill()
            if self.slots:
                self.launch()
            if len(self.launched) == 2 or (self.launched and (not self.slots or self.rng.random() < 0.3)):
                self.collect()

    def fill(self):
        free = self.backend.slots - len(self.slots)
        count = min(free, len(self.waiting), int(self.rng.integers(0, free + 1)) or (not self.slots))
        fresh = [self.waiting.pop(0) for _ in range(count)]
        self.admit(len(self.slots), fresh)
        self.slots += fresh

    def admit(self, first, rows):
        if rows:
            told = None if rows[0].told is None else np.stack([row.told for row in rows])
            self.backend.admit(first, [row.state for row in rows], told)
            self.backend.seed(first, np.zeros(len(rows), np.int32))
            for row in rows:
                row.state = None

    def launch(self):
        steps = int(self.rng.integers(1, self.backend.chunk + 1))
        self.backend.launch(np.array([row.position for row in self.slots], np.int32), steps)
        self.launched.append([(row, row.position) for row in self.slots])
        for row in self.slots:
            row.position = min(row.position + steps, LENGTH + 7)  # past the end goes on; the device stops at the last

    def collect(self):
        tokens, log_probs = self.backend.collect()
        launched = self.launched.pop(0)
        assert tokens.shape == log_probs.shape == (len(tokens), len(launched))
        for slot, (row, start) in enumerate(launched):
            wanted = row.wanted[start : start + len(tokens)]
            assert tokens[: len(wanted), slot].tolist() == wanted
            assert log_probs[: len(wanted), slot].tolist() == [-token / 1024 for token in wanted]
            assert row.wanted or np.isnan(log_probs[:, slot]).all()
            row.found += tokens[: len(wanted), slot].tolist()
        for row in [row for row in self.slots if len(row.found) == len(row.wanted)]:
            self.leave(self.slots.index(row))

    def leave(self, place):
        """A fresh row takes the place, or the last one does."""
        self.ended += 1
        if self.waiting and self.rng.random() < 0.5:
            self.slots[place] = self.waiting.pop(0)
            self.admit(place, [self.slots[place]])
            return
        last = self.slots.pop()
        if place < len(self.slots):
            self.backend.move(len(self.slots), place, last.position)
            self.slots[place], self.moves = last, self.moves + 1


def make_rows(backend, rng, *, segments=6, channels=3, memory=None, failing=0.2, steps=LENGTH):
    features = rng.integers(0, 50, (segments, FRAMES, 1024)).astype(np.float32)
    lost = rng.random(segments) < failing
    features[lost, 3, 5] = np.nan
    rows = []
    states = backend.encode(features)
    for segment in range(segments):
        for channel in range(channels):
            told, before, source = None, None, row_states(features[segment], channel)
            if memory:
                told = np.zeros(SPAN, np.int32)
                told[: rng.integers(1, SPAN)] = rng.integers(2, 500)
                before = remembered(told.tolist())
                source, before = (np.concatenate([source, before]), None) if memory == CONTEXT else (source, before)
            count = 0 if lost[segment] else int(rng.integers(1, steps + 1))
            rows.append(Live(states[segment][channel], told, expected(source, count, before) if count else []))
    return [rows[i] for i in rng.permutation(len(rows))]


def play(backend, seed, **options):
    rng = np.random.default_rng(seed)
    host = Host(backend, make_rows(backend, rng, **options), rng)
    total = len(host.waiting)
    host.run()
    assert host.ended == total
    return host
