"""Segments that are told of the one before them: what they are told, when they may begin, what a failure does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mt3_runtime.backends.scripted import Admitted, Stepped
from mt3_runtime.graphs import graph_specs
from mt3_runtime.specs import MemorySpec
from scripted_audio import RATE, levels, listener, write

START, END, TIE = 0, 1, 1134
SPAN = 40


def drum(number):
    return 1263 + number


@pytest.fixture(scope="session")
def memory_bundle(tiny_bundle):
    """What a scripted backend needs of a model with memory: the manifest, and no graph of its own."""
    manifest = tiny_bundle.manifest
    memory = MemorySpec("context", length=4, span=SPAN, fill_token=0, first_tokens=(TIE, END))
    model = replace(manifest.model, memory=memory)
    contracts = tuple(graph_specs(model, manifest.features).values())
    return replace(tiny_bundle, manifest=replace(manifest, model=model, contracts=contracts))


def tokens_of(key, length=0):
    return [TIE, 1133, drum(20 + key), *[3] * length]


def scripts(lengths):
    return {key: [*tokens_of(key, length), END] for key, length in lengths.items()}


def filled(*tokens):
    return (*tokens, *[0] * (SPAN - len(tokens)))


def memories(busy):
    """What every row was told at its last admission, by key."""
    return {
        key: memory
        for call in busy.backend.calls
        if isinstance(call, Admitted)
        for key, memory in zip(call.keys, call.memories, strict=True)
    }


def order(busy):
    return [key for call in busy.backend.calls if isinstance(call, Admitted) for key in call.keys]


FIRST = filled(TIE, END)


def test_each_segment_is_told_of_the_one_before(memory_bundle):
    lengths = {1: 0, 2: 9, 3: 3, 4: 5}
    busy = listener(memory_bundle, scripts(lengths), slots=3)
    result = busy.transcribe(levels(memory_bundle, list(lengths)), RATE)
    assert [note.pitch for note in result.notes] == [21, 22, 23, 24]
    assert order(busy) == [1, 2, 3, 4]
    told = {1: FIRST} | {key + 1: filled(START, *tokens_of(key, lengths[key]), END) for key in (1, 2, 3)}
    assert memories(busy) == told
    assert all(len(call.keys) == 1 for call in busy.backend.calls if isinstance(call, Stepped))


def test_a_chain_goes_on_in_the_step_after(memory_bundle):
    """Nothing is wasted between the segments of a song: as many steps as there are tokens."""
    lengths = {key: key % 5 for key in range(12)}
    busy = listener(memory_bundle, scripts(lengths), slots=8)
    result = busy.transcribe(levels(memory_bundle, list(lengths)), RATE)
    steps = sum(isinstance(call, Stepped) for call in busy.backend.calls)
    assert steps == sum(len(tokens_of(key, length)) + 1 for key, length in lengths.items())
    assert result.provenance.segments == 12


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_many_songs_fill_the_slots_and_none_hears_another(memory_bundle, tmp_path, slots):
    rng = np.random.default_rng(5)
    lengths = dict(enumerate(rng.integers(0, 25, 30).tolist()))
    songs = [range(first, first + count) for first, count in ((0, 7), (7, 1), (8, 9), (17, 3), (20, 6), (26, 4))]
    files = [write(tmp_path / f"{index}.wav", levels(memory_bundle, song)) for index, song in enumerate(songs)]
    busy = listener(memory_bundle, scripts(lengths), slots=slots)
    found = dict(busy.transcribe_many(files))
    for index, song in enumerate(songs):
        assert [note.pitch for note in found[index].notes] == [20 + key for key in song]
    told = {
        key: FIRST if key == song[0] else filled(START, *tokens_of(key - 1, lengths[key - 1]), END)
        for song in songs
        for key in song
    }
    assert memories(busy) == told
    widths = [len(call.keys) for call in busy.backend.calls if isinstance(call, Stepped)]
    tokens = sum(len(tokens_of(key, length)) + 1 for key, length in lengths.items())
    assert sum(widths) == tokens
    assert max(widths) == min(slots, len(songs))
    longest = max(sum(len(tokens_of(key, lengths[key])) + 1 for key in song) for song in songs)
    assert len(widths) <= tokens / min(slots, len(songs)) + longest


def test_a_broken_file_among_songs(memory_bundle, tmp_path):
    files = [write(tmp_path / "a.wav", levels(memory_bundle, [1, 2, 3])), tmp_path / "none.wav"]
    files.append(write(tmp_path / "b.wav", levels(memory_bundle, [4, 5])))
    busy = listener(memory_bundle, scripts(dict.fromkeys(range(1, 6), 4)), slots=4)
    found = dict(busy.transcribe_many(files))
    assert [[note.pitch for note in found[index].notes] for index in (0, 2)] == [[21, 22, 23], [24, 25]]
    assert "does not exist" in str(found[1])


def test_a_sequence_without_end_is_cut_to_the_span(memory_bundle):
    """As the authors' code does: start token, then tokens, without an end, the last ones lost."""
    endless = [TIE, 1133, drum(21), *range(3, 120)]
    busy = listener(memory_bundle, {1: endless, **scripts({2: 1})})
    result = busy.transcribe(levels(memory_bundle, [1, 2]), RATE)
    assert memories(busy)[2] == (START, *endless[: SPAN - 1])
    assert result.provenance.truncated_segments == (0,)
    assert result.provenance.memory_restarts == ()


def test_after_a_failure_the_memory_begins_anew_and_that_is_said(memory_bundle):
    broken = [TIE, 1133, drum(22), float("nan")]
    busy = listener(memory_bundle, {**scripts({1: 2, 3: 2, 4: 0}), 2: broken})
    result = busy.transcribe(levels(memory_bundle, [1, 2, 3, 4]), RATE)
    assert memories(busy)[3] == FIRST
    assert memories(busy)[4] == filled(START, *tokens_of(3, 2), END)
    assert result.provenance.failed_segments == (1,)
    assert result.provenance.memory_restarts == (2,)
    assert "segments 2 know nothing of what was before: it failed" in result.warnings
    assert '"memory_restarts": [' in result.to_json()


def test_a_second_attempt_is_told_the_same(memory_bundle):
    busy = listener(
        memory_bundle, {**scripts({1: 1}), 2: [TIE, float("nan")]}, retries={2: [*tokens_of(2), END]}, slots=2
    )
    result = busy.transcribe(levels(memory_bundle, [1, 2]), RATE)
    told = [call.memories[0] for call in busy.backend.calls if isinstance(call, Admitted) and call.keys == (2,)]
    assert told == [filled(START, *tokens_of(1, 1), END)] * 2
    assert result.warnings == ()


def test_a_failure_at_the_end_restarts_nothing(memory_bundle):
    busy = listener(memory_bundle, {**scripts({1: 1}), 2: [float("nan")]})
    result = busy.transcribe(levels(memory_bundle, [1, 2]), RATE)
    assert result.provenance.failed_segments == (1,)
    assert result.provenance.memory_restarts == ()


def test_live_streams_remember_each_its_own(memory_bundle):
    songs = {"a": range(1, 5), "b": range(5, 12), "c": range(12, 14)}
    lengths = {key: key % 7 for key in range(1, 14)}
    busy = listener(memory_bundle, scripts(lengths), slots=2)
    with busy.live() as live:
        found = {name: [] for name in songs}
        for name, song in songs.items():
            live.open(name, RATE)
            live.feed(name, levels(memory_bundle, song))
            live.end(name)
        for name, segment in live.drain():
            found[name] += [note.pitch for note in segment.notes]
    assert found == {name: [20 + key for key in song] for name, song in songs.items()}
    for song in songs.values():
        for key in song:
            before = FIRST if key == song[0] else filled(START, *tokens_of(key - 1, lengths[key - 1]), END)
            assert memories(busy)[key] == before
