"""The code that trains the demo model: music, targets, initial weights, losses, training that can be interrupted."""

from __future__ import annotations

import copy
import errno
import functools
import itertools
import json
import math
import operator
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from demo_model import agreement, labels, losses, synthesis, targets  # noqa: E402
from demo_model.clips import HELD_OUT, TRAINING, make_clip  # noqa: E402
from demo_model.command import main  # noqa: E402
from demo_model.curriculum import STAGES, Curriculum  # noqa: E402
from demo_model.drums import DRUMS, KEYS  # noqa: E402
from demo_model.examples import ExampleMaker, collate  # noqa: E402
from demo_model.families import BY_PROGRAM, FAMILIES  # noqa: E402
from demo_model.feeder import Feeder  # noqa: E402
from demo_model.initial import NEIGHBOURS, initial_weights  # noqa: E402
from demo_model.listening import decode_greedily, transcribe_clips  # noqa: E402
from demo_model.mistelling import mistell  # noqa: E402
from demo_model.network import GUIDED_CROSS, GUIDED_SELF, Looks, Network  # noqa: E402
from demo_model.optimiser import schedule  # noqa: E402
from demo_model.registers import codes, divide, turn  # noqa: E402
from demo_model.scores import KINDS  # noqa: E402
from demo_model.settings import EVENTS, FEATURES, SHIFTS, SMALL, VOCABULARY  # noqa: E402
from demo_model.sitting import Conditions, export, train  # noqa: E402
from demo_model.state import Plan, load_progress  # noqa: E402
from demo_model.training import Trainer, begin  # noqa: E402

from mt3_export.checkpoint import load_checkpoint  # noqa: E402
from mt3_export.lowering import Eager  # noqa: E402
from mt3_export.network import build_modules  # noqa: E402
from mt3_export.random_weights import random_tensors  # noqa: E402
from mt3_runtime.errors import CheckpointError, DeviceError, OptionError, OutputError  # noqa: E402
from mt3_runtime.loading import load  # noqa: E402
from mt3_runtime.note_decoding import SegmentTokens, tokens_to_notes  # noqa: E402
from mt3_runtime.notes import Note  # noqa: E402
from mt3_runtime.segments import segment_start  # noqa: E402

RATE = 16_000
TINY = replace(SMALL, name="tiny", d_model=48, num_heads=3, d_kv=8, d_ff=24, encoder_layers=2, decoder_layers=2)
PLAIN = replace(
    FAMILIES[1].draw(np.random.default_rng(0)), slope=1.0, decay=3.0, damping=0.5, attack=0.005, release=0.1, stops=()
)
CPU = torch.device("cpu")


def write(segments):
    """Names of the events of each segment, to be read by eye."""
    return [
        " ".join(
            f"{event.kind}{event.value}" if (event := EVENTS.decode(token)) else f"<{token}>"
            for token in targets.write_tokens(segment)
        )
        for segment in segments
    ]


def note(onset, offset, pitch=60, program=0, *, is_drum=False):
    return Note(onset, offset, pitch, 100, program, is_drum)


def by_voice(note):
    return note.is_drum, note.program, note.pitch, note.onset


# Sound


def test_a_note_is_the_sum_of_its_decaying_partials():
    hertz, levels, decays = np.array([220.0, 447.0]), np.array([0.7, 0.3]), np.array([2.0, 5.0])
    phases = np.array([0.3, 1.1])
    time = np.arange(1000) / RATE
    direct = sum(
        level * np.exp(-decay * time) * np.cos(2 * np.pi * f * time + phase)
        for f, level, decay, phase in zip(hertz, levels, decays, phases, strict=True)
    )
    np.testing.assert_allclose(synthesis._sum_partials(hertz, levels, decays, phases, 1000), direct, atol=2e-6)


def test_a_note_has_its_pitch_its_length_and_its_loudness():
    rng = np.random.default_rng(1)
    wave, soft = (synthesis.play(69, 1.0, velocity, PLAIN, rng) for velocity in (120, 40))
    assert len(wave) == round(1.1 * RATE)
    spectrum = np.abs(np.fft.rfft(wave[:RATE] * np.hanning(RATE)))
    assert np.argmax(spectrum[50:]) + 50 == 440  # a bin is 1 Hz
    assert np.abs(wave).max() > 3 * np.abs(soft).max()
    assert np.abs(wave[-50:]).max() < 0.01 * np.abs(wave[:2000]).max()


def test_vibrato_bends_the_pitch_by_its_depth():
    depth, rate = 0.004, 5.0
    timbre = replace(PLAIN, slope=9.0, decay=0.0, vibrato=depth, rate=rate)
    wave = synthesis.play(81, 1.0, 100, timbre, np.random.default_rng(2))[1000:15000].astype(float)
    spectrum = np.fft.fft(wave)
    spectrum[len(wave) // 2 :] = 0  # the analytic signal, whose angle turns by the frequency
    hertz = np.diff(np.unwrap(np.angle(np.fft.ifft(spectrum)))) * RATE / (2 * np.pi)
    middle = np.convolve(hertz[1000:-1000], np.full(160, 1 / 160), mode="valid")
    assert middle.max() == pytest.approx(880 * (1 + depth), rel=5e-4)
    assert middle.min() == pytest.approx(880 * (1 - depth), rel=5e-4)


def test_every_family_can_be_told_by_its_numbers():
    assert len({family.program for family in FAMILIES}) == len(FAMILIES) == 8
    for family in FAMILIES:
        timbre = family.draw(np.random.default_rng(3))
        for name in ("slope", "decay", "attack", "release", "formant", "spread", "vibrato"):
            low, high = getattr(family, name)
            assert low <= getattr(timbre, name) <= high


def test_drums_differ_in_where_their_sound_lies():
    rng = np.random.default_rng(4)
    centres = {}
    for key, drum in DRUMS.items():
        wave = drum.hit(rng)
        assert np.abs(wave).max() == pytest.approx(1.0)
        power = np.abs(np.fft.rfft(wave, RATE)) ** 2
        centres[key] = (power * np.arange(len(power))).sum() / power.sum()
    assert centres[36] < centres[45] < centres[50] < centres[38] < centres[49] < min(centres[42], centres[46])
    assert sorted(centres) == list(KEYS)


@pytest.mark.parametrize("kind", KINDS)
def test_clips_keep_their_promises(kind):
    clip = make_clip(KINDS[kind], (5.0, 9.0), (TRAINING, 0, 1))
    seconds = len(clip.audio) / RATE
    assert 5.0 <= seconds <= 9.0
    assert clip.audio.dtype == np.float32
    assert 0.05 < np.abs(clip.audio).max() <= 1.0
    pitched = [n for n in clip.notes if not n.is_drum]
    assert len({n.program for n in pitched}) == KINDS[kind].voices
    assert any(n.is_drum for n in clip.notes) == KINDS[kind].drums
    for n in pitched:
        assert BY_PROGRAM[n.program].low <= n.pitch <= BY_PROGRAM[n.program].high
        assert n.offset <= seconds + 1 / RATE
    by_pitch = sorted(pitched, key=lambda n: (n.pitch, n.onset))
    for one, other in itertools.pairwise(by_pitch):
        assert one.pitch != other.pitch or one.offset < other.onset


def test_equal_seeds_give_equal_clips_and_streams_never_meet():
    one, same, held = (
        make_clip(KINDS["trio"], (4.0, 5.0), seed) for seed in ((TRAINING, 5), (TRAINING, 5), (HELD_OUT, 5))
    )
    assert one.notes == same.notes
    np.testing.assert_array_equal(one.audio, same.audio)
    assert one.notes != held.notes


# Targets


def test_a_note_over_a_boundary_is_tied_and_states_are_written_once():
    notes = [note(0.5, 3.0, 60, 0), note(0.5, 1.0, 64, 0), note(1.0, 1.1, 36, is_drum=True), note(2.5, 3.0, 48, 33)]
    first, second = write(targets.segment_events(notes, 4 * RATE))
    assert first == "tie0 shift50 program0 velocity1 pitch60 pitch64 shift100 velocity0 pitch64 velocity1 drum36 <1>"
    assert second == (
        "program0 pitch60 tie0 shift46 program33 velocity1 pitch48 "
        "shift96 program0 velocity0 pitch60 program33 pitch48 <1>"
    )


def test_times_that_cannot_be_told_apart_are_one_time():
    late, early = note(2.031, 2.5, 60), note(2.055, 2.5, 62)  # the second segment starts at 2.048 s, told as 2.04 s
    ends = [note(0.3, 1.02, 50), note(0.3, 0.98, 52), note(1.0, 1.5, 53), note(0.3, 2.06, 55), note(0.3, 1.53, 57)]
    first, second = write(targets.segment_events([late, early, *ends], 4 * RATE))
    assert first == (
        "tie0 shift30 program0 velocity1 pitch50 pitch52 pitch55 pitch57 "
        "shift100 velocity0 pitch50 pitch52 velocity1 pitch53 shift150 velocity0 pitch53 pitch57 <1>"
    )
    assert second == "tie0 program0 velocity1 pitch60 pitch62 shift46 velocity0 pitch60 pitch62 <1>"


@pytest.mark.parametrize("kind", ["one", "band"])
def test_the_runtime_reads_the_targets_back_as_the_notes(kind):
    for index in range(8):
        clip = make_clip(KINDS[kind], (6.0, 16.0), (TRAINING, 9, index))
        segments = targets.segment_events(clip.notes, len(clip.audio))
        tokens = [
            SegmentTokens(segment_start(i, FEATURES, VOCABULARY), targets.write_tokens(segment))
            for i, segment in enumerate(segments)
        ]
        found, statistics = tokens_to_notes(tokens, EVENTS)
        assert (statistics.invalid_events, statistics.dropped_events) == (0, 0)
        for one, other in zip(*(sorted(notes, key=by_voice) for notes in (found, clip.notes)), strict=True):
            assert by_voice(one)[:3] == by_voice(other)[:3]
            assert one.onset == pytest.approx(other.onset, abs=0.0251)
            assert one.is_drum or one.offset == pytest.approx(other.offset, abs=0.0501)


def test_distinct_times_of_a_segment_are_50_ms_apart():
    for index in range(5):
        clip = make_clip(KINDS["band"], (6.0, 10.0), (TRAINING, 10, index))
        for segment in targets.segment_events(clip.notes, len(clip.audio)):
            steps = [group.steps for group in segment.groups]
            assert all(later - sooner >= 5 for sooner, later in itertools.pairwise(steps))


def test_frames_know_what_begins_sounds_ends_and_follows():
    notes = [note(0.4, 1.2, 60, 24), note(0.8, 0.9, 42, is_drum=True)]
    (segment,) = targets.segment_events(notes, 2 * RATE)
    found = labels.label_frames(segment)
    column = {token: index for index, token in enumerate(labels.SPOKEN_IDS)}
    said = {
        EVENTS.decode(token): np.flatnonzero(found.spoken[:, index]).tolist()
        for token, index in column.items()
        if found.spoken[:, index].any()
    }
    assert {f"{event.kind}{event.value}": frames for event, frames in said.items()} == {
        "pitch60": [49, 50, 51],
        "program24": [49, 50, 51, 149, 150, 151],
        "drum42": [99, 100, 101],
        "velocity0": [149, 150, 151],
        "velocity1": [49, 50, 51, 99, 100, 101],
    }
    sounding = np.flatnonzero(found.hidden[:, 88 + 60 - 21])
    assert (sounding[0], sounding[-1], len(sounding)) == (50, 149, 100)
    following = [EVENTS.decode(int(token)) for token in found.following[[0, 47, 48, 97, 98, 147, 148, 255]]]
    assert [event and event.value for event in following] == [40, 40, 80, 80, 120, 120, None, None]
    assert found.voices.tolist() == [[50, 39, 2], [100, 39, 2], [150, 39, 2]]


def test_tokens_are_read_at_the_frame_of_the_last_shift():
    tokens = [EVENTS.encode(targets.Event(kind, value)) for kind, value in (("tie", 0), ("shift", 8), ("pitch", 60))]
    assert labels.reading_frames([*tokens, SHIFTS[204], 1]).tolist() == [0, 0, 10, 10, 255]


def stage_of(*mixture, mistold=0.0):
    return replace(STAGES[0], mixture=mixture, mistold=mistold)


def test_a_batch_is_padded_sorted_and_the_same_every_time():
    maker = ExampleMaker()
    first, second = (maker.batch(3, 7, 12, stage_of(("two", 1.0), ("line", 0.5))) for _ in range(2))
    lengths = [(part.tokens != 0).sum(1) for part in first]
    assert list(map(len, lengths)) == [8, 4]
    assert (np.diff(np.concatenate(lengths)) >= 0).all()
    assert all(part.tokens.shape[1] == length.max() for part, length in zip(first, lengths, strict=True))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.features, other.features)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert (one.tokens[np.arange(len(one.kinds)), (one.tokens != 0).sum(1) - 1] == 1).all()


def test_workers_make_the_same_batches():
    orders = [(0, number, 4, stage_of(("two", 1.0), mistold=0.5)) for number in range(3)]
    taken = []
    for workers in (0, 1):
        with Feeder(workers) as feeder:
            for order in orders:
                feeder.ask(*order)
            taken.append([feeder.take() for _ in orders])
    for here, there in zip(*taken, strict=True):
        for one, other in zip(here, there, strict=True):
            np.testing.assert_array_equal(one.features, other.features)
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.learned, other.learned)


# Notes told for the wrong instrument


def test_a_mistold_note_is_read_and_not_learned_and_stays_with_its_instrument():
    notes = [note(0.5, 1.5, 60, 33), note(0.5, 1.0, 72, 0), note(1.0, 1.5, 60, 33), note(1.0, 3.0, 72, 33)]
    first, second = targets.segment_events(notes[:2] + notes[3:], 4 * RATE)
    told = mistell(first, 1.0, np.random.default_rng(0))
    # 72 of 33 has nowhere to go: 0 has told a 72 itself.
    assert write([told]) == [
        (
            "tie0 shift50 program0 velocity1 pitch60 pitch72 shift100 velocity0 pitch72 program33 velocity1 pitch72 "
            "shift150 program0 velocity0 pitch60 <1>"
        )
    ]
    tokens, learned = targets.write_lesson(told)
    assert [place for place, known in enumerate(learned) if not known] == [2, 3, 4]
    assert tokens == targets.write_tokens(told)
    assert mistell(second, 1.0, np.random.default_rng(0)) == second  # no earlier instrument
    (twice,) = targets.segment_events([notes[1], note(0.5, 0.9, 60, 33), notes[2]], 2 * RATE)
    assert write([mistell(twice, 1.0, np.random.default_rng(0))]) == [
        (
            "tie0 shift50 program0 velocity1 pitch60 pitch72 shift90 velocity0 pitch60 shift100 pitch72 "
            "program33 velocity1 pitch60 shift150 velocity0 pitch60 <1>"
        )
    ]


def test_mistelling_keeps_every_pitch_and_time():
    rng = np.random.default_rng(7)
    moved = onsets = 0
    for index in range(12):
        clip = make_clip(KINDS["band"], (6.0, 10.0), (TRAINING, 14, index))
        for segment in targets.segment_events(clip.notes, len(clip.audio)):
            told = mistell(segment, 0.2, rng)
            assert told.ties == segment.ties
            for group, before in zip(told.groups, segment.groups, strict=True):
                assert (group.steps, group.drums) == (before.steps, before.drums)
                for new, old in ((group.onsets, before.onsets), (group.offsets, before.offsets)):
                    assert sorted(pitch for _, pitch in new) == sorted(pitch for _, pitch in old)
                    assert list(new) == sorted(set(new))
                assert set(group.onsets) - set(before.onsets) == group.mistold
                moved, onsets = moved + len(group.mistold), onsets + len(group.onsets)
            _, learned = targets.write_lesson(told)
            assert all(learned) == all(not group.mistold for group in told.groups)
    assert 0.05 < moved / onsets < 0.2  # of those that have an earlier instrument, a fifth


def test_what_is_mistold_does_not_train_its_own_repetition(small_runs):
    maker = ExampleMaker()
    (part,) = maker.batch(2, 0, 8, stage_of(("band", 1.0), mistold=0.5))
    assert 0 < (~part.learned & (part.tokens != 0)).sum() < part.learned.sum()
    trainer = Trainer(begin(Plan(**small_runs), CPU))
    losses_, _ = trainer._learn(part, 1.0)
    batch, network = trainer.to_tensors(part), trainer.network()
    inputs = torch.nn.functional.pad(batch["tokens"][:, :-1], (1, 0))
    logits = network.speak(network.decode(network.encode(batch["features"]), inputs))
    rows = [
        losses.soft_cross_entropy(logits[row, place][None], batch["tokens"][row, place][None]).item()
        for row, place in np.argwhere(part.learned)
    ]
    assert losses_["tokens"] == pytest.approx(np.mean(rows), rel=1e-4)


# Network


def test_the_network_is_the_exporters():
    tensors = random_tensors(TINY, 0)
    network, modules = Network(TINY, tensors), build_modules(TINY, FEATURES, tensors, Eager())
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(2, 256, 512, generator=generator)
    inputs = torch.randint(0, 1391, (2, 5), generator=generator)
    states = network.encode(features)
    torch.testing.assert_close(states, modules["encoder"](features)[:, 0], atol=2e-5, rtol=1e-4)
    logits = network.speak(network.decode(states, inputs))
    cross = modules["cross_kv"](states)
    own = tuple(torch.zeros(2, 3, 8, 8) for _ in range(4))
    for position in range(5):
        step = modules["decode_step"](inputs[:, position], torch.full((2,), position), *cross, *own)
        own = step[2:-1]
        torch.testing.assert_close(logits[:, position], step[-1], atol=2e-5, rtol=1e-4)


def test_clips_are_heard_as_the_runtime_hears_them(tiny_checkpoint, tiny_folder):
    transcriber = load(tiny_folder, "cpu", threads=1)
    clips = [make_clip(KINDS["band"], (4.0, 7.0), (TRAINING, 11, index)) for index in range(3)]
    heard = transcribe_clips(tiny_checkpoint, clips, longest=tiny_checkpoint.model.max_length)
    assert sum(map(len, heard)) > 0
    for clip, notes in zip(clips, heard, strict=True):
        expected = transcriber.transcribe(clip.audio, RATE).notes
        assert notes == [replace(n, confidence=None) for n in expected]


def test_greedy_decoding_stops_each_row_at_its_own_end():
    tensors = random_tensors(TINY, 2)
    modules = build_modules(TINY, FEATURES, tensors, Eager())
    states = torch.randn(6, 256, 48, generator=torch.Generator().manual_seed(1))
    endless = decode_greedily(TINY, modules, states, 16)
    assert {len(row) for row in endless} == {16}
    end = endless[2][5]
    cut = [row[: row.index(end)] if end in row else row for row in endless]
    assert len({len(row) for row in cut}) > 1
    assert decode_greedily(replace(TINY, end_token=end), modules, states, 16) == cut


# Initial weights


@pytest.fixture(scope="module")
def started():
    """Initial weights of the demo's size, their network, and a batch."""
    maker = ExampleMaker()
    examples = maker.examples(make_clip(KINDS["two"], (6.5, 6.6), (TRAINING, 12, 0)), "two")
    frames = torch.from_numpy(np.concatenate([example.features for example in examples]))
    weights = initial_weights(SMALL, frames, 0)
    return weights, Network(SMALL, weights), collate(examples)


def test_the_demo_fits_its_budget(started):
    weights, _, _ = started
    assert sum(tensor.numel() for tensor in weights.values()) <= 5_400_000


def test_turned_codes_are_codes_of_later_frames():
    registers = divide(SMALL)
    here, later = codes(SMALL, registers, torch.tensor([40])), codes(SMALL, registers, torch.tensor([57]))
    torch.testing.assert_close(here @ turn(17 * registers.frequencies).T, later, atol=1e-4, rtol=1e-4)
    used = torch.cat((registers.place, registers.now, registers.then, registers.free))
    assert sorted(used.tolist()) == list(range(SMALL.d_model))


def test_no_input_dimension_drowns_another(started):
    weights, _, batch = started
    registers = divide(SMALL)
    hidden = torch.from_numpy(batch.features).float() @ weights["proj.weight"].T
    assert (hidden[..., torch.cat((registers.place, registers.then))] == 0).all()
    levels = hidden[..., torch.cat((registers.free, registers.now))].flatten(0, 1).std(0)
    assert levels.min() > 0.2
    assert levels.max() < 4.0


def test_early_encoder_heads_look_at_their_neighbours(started):
    weights, _, _ = started
    place = divide(SMALL).place
    sinusoid = codes(SMALL, divide(SMALL), torch.arange(256))
    for layer, offsets in enumerate(NEIGHBOURS):
        for head, offset in enumerate(offsets):
            part = slice(head * SMALL.d_kv, (head + 1) * SMALL.d_kv)
            query, key = (
                sinusoid @ weights[f"encoder.block.{layer}.layer.0.SelfAttention.{name}.weight"][part][:, place].T
                for name in "qk"
            )
            looked = (query @ key.T).argmax(-1)[20:230]
            assert (looked - torch.arange(20, 230) == offset).all()


def test_the_decoder_starts_by_reading_at_its_last_shift(started):
    _, network, batch = started
    looks = Looks()
    inputs = torch.nn.functional.pad(torch.from_numpy(batch.tokens).long()[:, :-1], (1, 0))
    with torch.no_grad():
        network.decode(network.encode(torch.from_numpy(batch.features).float()), inputs, looks)
    real = torch.from_numpy(batch.tokens != 0)
    reading = torch.from_numpy(batch.reading).long()
    assert looks.scores[GUIDED_CROSS].shape[:2] == (len(batch.tokens), SMALL.num_heads)
    near = (looks.scores[GUIDED_CROSS][:, 0].argmax(-1) - reading).abs() <= 2
    assert near[real].float().mean() > 0.5  # by chance 0.02
    remembered = looks.scores[GUIDED_SELF][:, 0].argmax(-1) == losses.latest_of_kinds(inputs)[0]
    assert remembered[real].float().mean() > 0.4


# Losses


def test_a_shift_may_be_a_step_off():
    logits = torch.randn(4, 1536, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([SHIFTS[50], SHIFTS[0], SHIFTS[205], 1100])
    log_probs = logits.double().log_softmax(-1).numpy()
    expected = [
        -(0.1 * row[id_ - 1 if id_ > 3 else id_] + 0.8 * row[id_] + 0.1 * row[min(id_ + 1, 208)])
        for row, id_ in zip(log_probs[:3], tokens[:3].tolist(), strict=True)
    ]
    expected.append(-log_probs[3, 1100])
    assert float(losses.soft_cross_entropy(logits, tokens)) == pytest.approx(np.mean(expected), rel=1e-5)
    said = torch.nn.functional.one_hot(torch.tensor([SHIFTS[51], SHIFTS[2], SHIFTS[205], 1101]), 1536).float()
    assert losses.tokens_right(said, tokens).tolist() == [True, False, True, False]


def test_the_latest_token_of_a_kind_is_found_as_a_loop_finds_it():
    rng = np.random.default_rng(5)
    rows = rng.choice([SHIFTS[3], 1134, 1132, 1133, 1135, 1168, 1070, 1300], (3, 40))
    rows[:, 0] = 0
    found = losses.latest_of_kinds(torch.from_numpy(rows)).numpy()
    kinds = ({SHIFTS[3], 1134}, {1132, 1133}, {1135, 1168})
    for kind, places in zip(kinds, found, strict=True):
        for row, where in zip(rows, places, strict=True):
            expected = [max([0, *(i for i in range(end + 1) if row[i] in kind)]) for end in range(40)]
            assert where.tolist() == expected


def test_guidance_is_least_where_heads_look_where_they_should():
    batch = {
        "tokens": torch.tensor([[SHIFTS[8], 1070, 1]]),
        "reading": torch.tensor([[0, 10, 10]]),
        "following": torch.full((1, 256), 1),
    }
    inputs = torch.tensor([[0, SHIFTS[8], 1070]])
    window = {-1: 0.25, 0: 0.5, 1: 0.25}
    cross = torch.full((1, 1, 3, 256), -30.0)
    for query, frame in enumerate((0, 10, 10)):
        for step, share in window.items():
            place = (0, 0, query, max(0, frame + step))
            cross[place] = math.log(math.exp(cross[place]) + share)
    perfect = {
        "cross": cross,
        "encoder": torch.full((1, 1, 256, 256), -30.0).index_fill_(-1, torch.tensor([0]), 0.0),
        "self": torch.full((1, 3, 3, 3), -30.0),
    }
    perfect["self"][:, 0, [0, 1, 2], [0, 1, 1]] = 0.0
    perfect["self"][:, 1:, :, 0] = 0.0
    looks = Looks()
    looks.scores = perfect
    best = losses.guidance_loss(looks, inputs, batch)
    inside = -sum(share * math.log(share) for share in window.values())
    at_edge = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(best["cross"]) == pytest.approx((2 * inside + at_edge) / 3, abs=1e-4)
    assert float(best["self"]) == pytest.approx(0.0, abs=1e-4)
    looks.scores = {name: scores.roll(1, -1) for name, scores in perfect.items()}
    worse = losses.guidance_loss(looks, inputs, batch)
    assert all(float(worse[name]) > float(best[name]) + 0.2 for name in best)


# Curriculum, schedule, scores


def test_a_stage_ends_when_it_is_learned_or_its_time_is_up():
    quick, slow = Curriculum(), Curriculum()
    assert not quick.update({"line": 1.0}, 0.01)
    while not quick.update({"line": 1.0}, 0.01):
        assert quick.accuracy["line"] < STAGES[0].accuracy
    assert (quick.stage, slow.stage) == (1, 0)
    assert not slow.update({"line": 0.0}, STAGES[0].deadline - 0.001)
    assert slow.update({"line": 0.0}, STAGES[0].deadline)
    for _ in range(500):
        quick.update(dict.fromkeys(KINDS, 1.0), STAGES[-2].deadline - 0.001)
    assert quick.stage == len(STAGES) - 2  # the two last have all kinds, and last until their time is up
    assert quick.update(dict.fromkeys(KINDS, 1.0), STAGES[-2].deadline)
    assert not quick.update(dict.fromkeys(KINDS, 1.0), 1.0)
    assert quick.stage == len(STAGES) - 1
    assert {name for stage in STAGES for name, _ in stage.mixture} == set(KINDS)


def test_the_rate_warms_up_slows_down_and_falls_to_nothing():
    rates = np.array([schedule(step, 4000) for step in range(4000)])
    assert rates[0] == pytest.approx(0.02)
    assert (rates[49:250] == 1.0).all()
    assert rates[1000] == pytest.approx(0.5)
    assert (np.diff(rates[250:]) < 0).all()
    np.testing.assert_allclose(rates[2400:], np.sqrt(250 / np.arange(2400, 4000)) * np.linspace(1.0, 1 / 1600, 1600))


def test_agreement_counts_what_it_says():
    reference = [note(0.0, 1.0, 60, 0), note(0.0, 1.0, 64, 24), note(1.0, 1.1, 36, is_drum=True)]
    heard = [note(0.04, 0.7, 60, 0), note(0.02, 1.0, 64, 0), note(1.0, 1.1, 38, is_drum=True), note(2.0, 2.5, 70)]
    found = agreement.compare(heard, reference)
    assert found.onset == pytest.approx(2 * 2 / 7)
    assert found.instrument == pytest.approx(2 * 1 / 7)
    assert found.offset == pytest.approx(2 * 1 / 5)
    assert found.drums == 0.0
    alone = agreement.compare([], [note(0.0, 1.0)])
    assert (alone.onset, alone.drums) == (0.0, None)
    assert agreement.average([found, alone]).onset == pytest.approx(2 / 7)


# Training


@pytest.fixture
def small_runs(monkeypatch):
    """Runs of a tiny network on easy clips; what a test changes is only size."""
    monkeypatch.setattr("demo_model.state.SIZES", {"small": TINY})
    monkeypatch.setattr("demo_model.training.SIZES", {"small": TINY})
    monkeypatch.setattr("demo_model.training._CLIPS", 4)
    monkeypatch.setattr("demo_model.sitting.LOG_STEPS", 2)
    monkeypatch.setattr("demo_model.sitting.CLIPS", 1)
    monkeypatch.setattr("demo_model.held_out.SECONDS", (2.5, 3.0))
    return {"seed": 1, "steps": 6, "batch": 4, "precision": "fp32"}


AT_ONCE = Conditions(validate_minutes=1000.0, workers=0, threads=1)


def stop_after(monkeypatch, steps):
    """Stop a sitting by its own rule after so many more steps."""
    asked = iter([False] * steps + [True])
    monkeypatch.setattr("demo_model.sitting._Sitting.enough", lambda self: next(asked))


def test_going_on_is_as_if_it_had_never_stopped(tmp_path, monkeypatch, small_runs):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        whole = train(tmp_path / "whole", small_runs, AT_ONCE)
    for steps in (2, 3):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            parts = train(tmp_path / "parts", small_runs, AT_ONCE)
    assert whole.step == parts.step == 5
    assert whole.curriculum == parts.curriculum
    for key, tensor in whole.weights.items():
        torch.testing.assert_close(tensor, parts.weights[key], atol=0, rtol=0)
    log = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert log[0]["plan"]["seed"] == 1
    assert [entry["step"] for entry in log[1:]] == [2, 4, 5]
    assert {"tokens", "frames", "following", "cross", "minutes"} <= set(log[1])
    assert any(name.startswith("accuracy.") for name in log[1])


def test_a_log_that_cannot_be_written_loses_no_step(tmp_path, monkeypatch, small_runs):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        whole = train(tmp_path / "whole", small_runs, AT_ONCE)
    folder, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    stopping = iter([False, False, True])

    def lose_the_log(sitting):
        if sitting.trainer.progress.step == 1:
            log.unlink()
            log.mkdir()
        return next(stopping)

    with monkeypatch.context() as patch:
        patch.setattr("demo_model.sitting._Sitting.enough", lose_the_log)
        with pytest.raises(OutputError, match=r"log\.jsonl.* cannot be written .*give the same command again"):
            train(folder, small_runs, AT_ONCE)
    assert load_progress(folder, CPU).step == 2
    with pytest.raises(OutputError, match="cannot be written"):
        train(folder, small_runs, AT_ONCE)
    assert load_progress(folder, CPU).step == 2  # nothing was begun that could not be told
    log.rmdir()
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        parts = train(folder, small_runs, AT_ONCE)
    assert parts.step == 3
    for key, tensor in whole.weights.items():
        torch.testing.assert_close(tensor, parts.weights[key], atol=0, rtol=0)


def test_a_full_standard_output_loses_no_step(tmp_path, monkeypatch, small_runs):
    printed = []

    def print_once(text, **_):
        if printed:
            raise OSError(errno.ENOSPC, "No space left on device")
        printed.append(text)

    monkeypatch.setattr("demo_model.sitting.print", print_once, raising=False)
    with pytest.raises(OutputError, match="No space left on device"):
        train(tmp_path, small_runs, AT_ONCE)
    assert load_progress(tmp_path, CPU).step == 2


def test_training_learns_and_its_export_can_be_loaded(tmp_path, monkeypatch, small_runs):
    stages = (replace(STAGES[0], mixture=(("line", 1.0),), accuracy=2.0, deadline=2.0),)
    monkeypatch.setattr("demo_model.curriculum.STAGES", stages)
    monkeypatch.setattr("demo_model.training.STAGES", stages)
    progress = train(tmp_path, {**small_runs, "steps": 100}, AT_ONCE)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first, last = log[1], log[-2]
    assert last["step"] == 100
    assert last["tokens"] < 0.75 * first["tokens"]
    assert last["frames"] < 0.75 * first["frames"]
    assert set(log[-1]["f1"]) >= {"onset.one", "onset.band", "drums.band"}
    export(tmp_path, tmp_path / "demo.safetensors")
    loaded = load_checkpoint(tmp_path / "demo.safetensors")
    assert (loaded.features, loaded.warnings) == (FEATURES, ())
    assert loaded.model == replace(TINY, name="demo")
    for key, tensor in progress.weights.items():
        assert torch.equal(loaded.tensors[key], tensor)


@pytest.fixture
def broken_state(tmp_path, monkeypatch, small_runs):
    """The folder of a run of one step, and what breaks a copy of its state."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train(tmp_path, small_runs, AT_ONCE)
    stored = torch.load(tmp_path / "state.pt", weights_only=True)

    def break_at(*path, value=None):
        """Put `value` in a place of the state, or take out what is there."""
        broken = copy.deepcopy(stored)
        *outer, name = path
        place = functools.reduce(operator.getitem, outer, broken)
        if value is None:
            del place[name]
        else:
            place[name] = value
        torch.save(broken, tmp_path / "state.pt")
        return tmp_path

    return break_at


def test_a_state_that_no_training_leaves_is_refused(broken_state, small_runs):
    assert load_progress(broken_state("plan", "seed", value=1), CPU).step == 1  # as it was
    for path, value in (
        (("plan", "size"), "huge"),
        (("plan", "precision"), "fp8"),
        (("plan", "batch"), 0),
        (("plan", "seed"), None),
        (("weights", "proj.weight"), None),
        (("weights", "proj.weight"), "no tensor"),
        (("weights", "proj.weight"), torch.zeros(48, 511)),
        (("weights", "proj.weight"), torch.zeros(48, 512, dtype=torch.int64)),
        (("weights", "other.weight"), torch.zeros(1)),
        (("extra", "hidden.bias"), None),
        (("stages",), [99]),
        (("stages",), 0),
        (("curriculum", "stage"), -1),
        (("curriculum", "accuracy"), {"line": math.nan}),
        (("step",), "x"),
        (("step",), None),
        (("seconds",), math.inf),
        (("optimiser", 1), None),
        (("optimiser", 0, "state"), {}),
        (("optimiser", 0, "state", 3), None),
        (("optimiser", 0, "state", 3, "momentum_buffer"), torch.zeros(1)),
        (("optimiser", 1, "state", 0, "exp_avg"), None),
    ):
        folder = broken_state(*path, value=value)
        with pytest.raises(CheckpointError, match="no training state of this version: choose another folder"):
            load_progress(folder, CPU)
    broken_state("weights", "proj.weight")
    with pytest.raises(CheckpointError, match="choose another folder"):
        export(folder, folder / "out.safetensors")
    assert not (folder / "out.safetensors").exists()
    with pytest.raises(CheckpointError, match="choose another folder"):
        train(folder, small_runs, AT_ONCE)


def test_another_plan_or_a_broken_state_is_refused(tmp_path, monkeypatch, small_runs):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train(tmp_path, small_runs, AT_ONCE)
        with pytest.raises(OptionError, match="seed 1, not 2"):
            train(tmp_path, {**small_runs, "seed": 2}, AT_ONCE)
    with pytest.raises(DeviceError, match="use cpu"):
        train(tmp_path, small_runs, replace(AT_ONCE, device="nonsense"))
    assert load_progress(tmp_path / "nothing", CPU) is None
    with pytest.raises(CheckpointError, match="train one first"):
        export(tmp_path / "nothing", tmp_path / "out.safetensors")
    (tmp_path / "state.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="choose another folder"):
        export(tmp_path, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluate", "no-such-file"], "does not exist: check the path"),
        (["--state", "no-such-run", "--export", "x.safetensors"], "train one first"),
        (["--state", "new", "--seed", "-1"], "-1 is no seed: give a whole number from 0 to"),
        (["--state", "new", "--seed", "9" * 26], "is no seed: give a whole number from 0 to"),
    ],
)
def test_an_error_is_told_in_a_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_demo: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_every_seed_that_is_accepted_can_begin_a_run(small_runs):
    assert begin(Plan(**{**small_runs, "seed": 2**64 - 1}), CPU).step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "give --state DIR"), (["--export", "x"], "give --state DIR"), (["--clips", "0"], "0 is not positive")],
)
def test_the_command_explains_itself(arguments, message):
    command = [sys.executable, str(ROOT / "scripts" / "train_demo"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--clips 2", "give --state DIR to train or export, or --evaluate FILE"),
        ("--evaluate x --state y --export z", "--evaluate does not use --state, --export: leave that out"),
        ("--evaluate x --seed 0", "--evaluate does not use --seed: leave that out"),
        ("--evaluate x --workers 1", "--evaluate does not use --workers: leave that out"),
        ("--state x --export y --batch 32", "--export does not use --batch: leave that out"),
        ("--state x --export y --device cpu", "--export does not use --device: leave that out"),
        ("--state x --clips 100", "training does not use --clips: leave that out"),
    ],
)
def test_no_option_is_ignored(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("demo_model.command._run", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f": error: {message}")


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ("--state RUN", ("train", Path("RUN"), {}, Conditions())),
        (
            "--state RUN --steps 15400 --minutes 60",
            ("train", Path("RUN"), {"steps": 15_400}, Conditions(minutes=60.0)),
        ),
        (
            "--state RUN --seed 0 --batch 8 --size full --precision fp32",
            ("train", Path("RUN"), {"seed": 0, "batch": 8, "size": "full", "precision": "fp32"}, Conditions()),
        ),
        (
            "--state RUN --validate 2 --device cuda --threads 3 --workers 4",
            ("train", Path("RUN"), {}, Conditions(None, 2.0, "cuda", 3, 4)),
        ),
        ("--state RUN --export demo.safetensors", ("export", Path("RUN"), Path("demo.safetensors"))),
        ("--evaluate NEW", ("evaluate", Path("NEW"), 100)),
        ("--evaluate engines/demo --clips 7", ("evaluate", Path("engines/demo"), 7)),
    ],
)
def test_what_is_given_is_what_is_done(monkeypatch, arguments, call):
    calls = []
    for target in ("sitting.train", "sitting.export", "evaluation.evaluate_file"):
        name = target.rpartition(".")[2].removesuffix("_file")
        monkeypatch.setattr(f"demo_model.{target}", lambda *values, name=name: calls.append((name, *values)) or [])
    assert main(arguments.split()) == 0
    assert calls == [call]
