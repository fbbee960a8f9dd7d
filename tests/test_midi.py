"""MIDI files read back with pretty_midi and mido."""

from __future__ import annotations

from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import replace
from io import BytesIO

import mido
import numpy as np
import pretty_midi
import pytest

from mt3_runtime import midi
from mt3_runtime.errors import OptionError, OutputError
from mt3_runtime.midi import midi_warnings, notes_to_midi, write_midi
from mt3_runtime.midi_styles import MT3_STYLE, YOURMT3_FINE_STYLE, YOURMT3_STYLE, MidiStyle
from mt3_runtime.notes import Note, sort_notes

TICK = 1 / 440  # seconds: 220 ticks in a quarter of half a second


def note(onset, offset, pitch=60, velocity=100, program=0, is_drum=False):
    return Note(onset, offset, pitch, velocity, program, is_drum)


def encoded(notes, folder):
    write_midi(notes, folder / "x.mid")
    return mido.MidiFile(folder / "x.mid")


def read(file, tick=TICK):
    """(program, is_drum) -> sorted (start tick, end tick, pitch, velocity); each key has one track."""
    found = {}
    for instrument in pretty_midi.PrettyMIDI(mido_object=deepcopy(file)).instruments:  # changes what it reads
        times = np.array([(n.start, n.end) for n in instrument.notes]) / tick  # [notes, 2]
        ticks = np.rint(times).astype(int)
        assert np.abs(times - ticks).max() < 1e-6
        key = (instrument.program, instrument.is_drum)
        assert key not in found
        sounds = [(n.pitch, n.velocity) for n in instrument.notes]
        found[key] = sorted((*span, *sound) for span, sound in zip(ticks.tolist(), sounds, strict=True))
    return found


def expected(notes, rate=440):
    """What the file should hold, note by note against all others; and (cut short, left out)."""
    rows = defaultdict(list)
    cut = out = 0
    on_grid = [(n, round(n.onset * rate), max(round(n.offset * rate), round(n.onset * rate) + 1)) for n in notes]
    for i, (n, start, end) in enumerate(on_grid):
        same = [
            (m_start, m_end, m.velocity, j)
            for j, (m, m_start, m_end) in enumerate(on_grid)
            if (m.program, m.is_drum, m.pitch) == (n.program, n.is_drum, n.pitch) and j != i
        ]
        rivals = [(m_end, v, -j) for m_start, m_end, v, j in same if m_start == start]
        if any(rival > (end, n.velocity, -i) for rival in rivals):
            out += 1
            continue
        stop = min([end, *(m_start for m_start, *_ in same if m_start > start)])
        cut += stop < end
        rows[n.program, n.is_drum].append((start, stop, n.pitch, n.velocity))
    return {key: sorted(value) for key, value in rows.items()}, cut, out


def random_notes(rng):
    """Few notes on few pitches, so that they meet; on the grid of 10 ms, free, or nearly equal in time."""
    amount = int(rng.integers(0, 9))
    programs = rng.choice(128, size=int(rng.integers(1, 4)), replace=False).tolist()
    kind = rng.integers(3)
    onsets = [rng.integers(0, 60, amount) / 100, rng.uniform(0, 2, amount), 0.5 + rng.uniform(0, 0.01, amount)][kind]
    lengths = np.where(rng.random(amount) < 0.3, rng.uniform(1e-5, 0.004, amount), rng.uniform(0.004, 0.6, amount))
    drums = rng.random(amount) < 0.25
    pitches = rng.choice([0, 59, 60, 127], amount)
    velocities = rng.integers(1, 128, amount)
    instruments = rng.choice(programs, amount)
    return [
        Note(t, t + d, p, v, 0 if x else g, is_drum=x)
        for t, d, p, v, g, x in zip(
            onsets.tolist(), lengths.tolist(), pitches.tolist(), velocities.tolist(), instruments.tolist(),
            drums.tolist(), strict=True,
        )
    ]  # fmt: skip


def assert_paired(file):
    """Every note-on is followed by its own note-off, on a port and channel that no other track uses."""
    taken = set()
    for track in file.tracks[1:]:
        port = next((message.port for message in track if message.type == "midi_port"), 0)
        channels = {message.channel for message in track if not message.is_meta}
        assert len(channels) == 1
        assert (port, *channels) not in taken
        taken.add((port, *channels))
        sounding = set()
        for message in track:
            if message.type == "note_on" and message.velocity:
                assert message.note not in sounding
                sounding.add(message.note)
            elif message.type == "note_on":
                sounding.remove(message.note)  # a stray note-off is a KeyError
        assert not sounding


def test_random_lists_read_back_to_the_tick(monkeypatch):
    written = []
    monkeypatch.setattr(midi, "atomic_write", lambda _, content: written.append(content))  # spare the disk
    rng = np.random.default_rng(11)
    seen = Counter()
    for _ in range(10_000):
        notes = random_notes(rng)
        told = " ".join(write_midi(notes, "nowhere.mid"))
        file = mido.MidiFile(file=BytesIO(written.pop()))
        rows, cut, out = expected(notes)
        assert_paired(file)
        assert read(file) == rows
        assert (f"cut short where the same pitch starts again: {cut}" in told) == (cut > 0)
        assert (f"left out because the same pitch starts on the same tick: {out}" in told) == (out > 0)
        seen.update(cut=cut, out=out, notes=len(notes), drums=sum(n.is_drum for n in notes))
    assert min(seen.values()) > 500, "the lists must reach every case often"


def test_notes_that_do_not_meet_keep_their_times(tmp_path):
    rng = np.random.default_rng(5)
    edges = np.cumsum(rng.uniform(0.003, 0.5, 400))
    notes = [
        note(on, off, int(p)) for on, off, p in zip(edges[::2], edges[1::2], rng.integers(60, 63, 200), strict=True)
    ]
    assert midi_warnings(notes) == ()
    [instrument] = pretty_midi.PrettyMIDI(mido_object=encoded(notes, tmp_path)).instruments
    got = sorted(instrument.notes, key=lambda n: n.start)
    assert len(got) == 200
    for before, after in zip(sort_notes(notes), got, strict=True):
        assert abs(before.onset - after.start) <= TICK / 2 + 1e-9
        assert abs(before.offset - after.end) <= TICK / 2 + 1e-9
        assert (before.pitch, before.velocity) == (after.pitch, after.velocity)


@pytest.mark.parametrize(
    ("notes", "rows"),
    [
        ([note(1, 3), note(2, 2.5)], [(440, 880, 60, 100), (880, 1100, 60, 100)]),
        ([note(1, 1.01, velocity=90), note(1, 2)], [(440, 880, 60, 100)]),
        ([note(1, 2, velocity=90), note(1, 2)], [(440, 880, 60, 100)]),
        ([note(1, 1.0001)], [(440, 441, 60, 100)]),
        ([note(1, 2), note(2, 3)], [(440, 880, 60, 100), (880, 1320, 60, 100)]),
    ],
)
def test_one_pitch_sounds_once_at_a_time(tmp_path, notes, rows):
    for order in (notes, notes[::-1]):
        assert read(encoded(order, tmp_path)) == {(0, False): rows}


def test_a_thousand_hits_at_once_make_one_track(tmp_path):
    file = encoded([note(1, 1.01, 36, is_drum=True)] * 1000, tmp_path)
    assert read(file) == {(0, True): [(440, 444, 36, 100)]}
    assert midi_warnings([note(1, 1.01, 36, is_drum=True)] * 1000) == (
        "MIDI: notes left out because the same pitch starts on the same tick: 999",
    )


def test_layout_of_the_file(tmp_path):
    notes = [note(0, 1, 35, is_drum=True), note(0, 1, program=33), note(0, 1, program=0)]
    file = encoded(notes, tmp_path)
    assert (file.type, file.ticks_per_beat) == (1, 220)
    timing, *tracks = file.tracks
    assert [message.tempo for message in timing if message.type == "set_tempo"] == [500_000]
    assert [track.name for track in tracks] == ["Acoustic Grand Piano", "Electric Bass (finger)", "Drums"]
    programs = [[(m.channel, m.program) for m in track if m.type == "program_change"] for track in tracks]
    assert programs == [[(0, 0)], [(1, 33)], [(9, 0)]]
    assert not any(m.type == "midi_port" for track in tracks for m in track)
    assert write_midi(notes, tmp_path / "x.mid") == ()


def test_no_notes_make_a_valid_file(tmp_path):
    assert read(encoded([], tmp_path)) == {}
    assert notes_to_midi([]).instruments == []


def many_programs(amount):
    rng = np.random.default_rng(amount)
    notes = [note(0.25 * (i % 7), 0.25 * (i % 7) + 0.2, i, program=i) for i in range(amount)]
    times = rng.integers(0, 20, 5 * amount) / 4
    pitches = rng.integers(30, 99, 5 * amount)
    notes += [
        note(t, t + 0.2, p, program=i % amount)
        for i, (t, p) in enumerate(zip(times.tolist(), pitches.tolist(), strict=True))
    ]
    return [*notes, note(0.5, 0.51, 38, is_drum=True)]


def merged_as_by_a_player_without_ports(file):
    """(tick, pitch, the program its channel has at that time) of each melodic onset."""
    merged = mido.merge_tracks(file.tracks)
    now, program, onsets = 0, {}, []
    for message in merged:
        now += message.time
        if message.type == "program_change":
            program[message.channel] = message.program
        elif message.type == "note_on" and message.velocity and message.channel != 9:
            onsets.append((now, message.note, program[message.channel]))
    return sorted(onsets)


@pytest.mark.parametrize("amount", [1, 14, 15, 16, 17, 31, 128])
def test_many_programs_share_no_channel(tmp_path, amount):
    notes = many_programs(amount)
    file = encoded(notes, tmp_path)
    rows, *_ = expected(notes)
    assert read(file) == rows
    assert len(rows) == amount + 1
    assert_paired(file)
    melodic = [(start, pitch, key[0]) for key, values in rows.items() if not key[1] for start, _, pitch, _ in values]
    assert merged_as_by_a_player_without_ports(file) == sorted(melodic)
    crowded = f"MIDI: {amount + 1} instruments need more than one MIDI port"
    assert any(text.startswith(crowded) for text in midi_warnings(notes)) == (amount > 15)


def test_drum_kits_are_kept_apart(tmp_path):
    notes = [note(0, 1, 36, program=kit, is_drum=True) for kit in (0, 16)]
    file = encoded(notes, tmp_path)
    assert set(read(file)) == {(0, True), (16, True)}
    assert_paired(file)
    assert len(midi_warnings(notes)) == 1


@pytest.mark.parametrize("seed", range(100))
def test_pretty_midi_holds_and_writes_the_same(tmp_path, seed):
    notes = random_notes(np.random.default_rng(seed)) + many_programs(1 + seed % 20)
    pretty = notes_to_midi(notes)
    rows, *_ = expected(notes)
    assert [(i.is_drum, i.program) for i in pretty.instruments] == sorted((drum, program) for program, drum in rows)
    pretty.write(str(tmp_path / "pretty.mid"))
    assert read(mido.MidiFile(tmp_path / "pretty.mid")) == rows


@pytest.mark.parametrize("seconds", [20_000, 700_000, 3_000_000])
def test_pauses_longer_than_one_event_can_tell(tmp_path, seconds):
    """A stream may go on for weeks; one delta holds 169 hours."""
    track = encoded([note(1, 2), note(seconds, seconds + 1)], tmp_path).tracks[1]  # pretty_midi refuses such files
    times = np.cumsum([message.time for message in track])
    ticks = [int(time) for time, message in zip(times, track, strict=True) if message.type == "note_on"]
    assert ticks == [440, 880, 440 * seconds, 440 * (seconds + 1)]


@pytest.mark.parametrize("seconds", [1e10, 1e300])
def test_a_time_that_is_none(tmp_path, seconds):
    with pytest.raises(OutputError, match="not in any music: keep notes below"):
        write_midi([note(1, seconds)], tmp_path / "late.mid")
    assert not (tmp_path / "late.mid").exists()


# ---- YourMT3: classes of instruments, another resolution ------------------------------------------------

# class: its programs in the file, the one that stands for them, the one that is written
CLASSES = {
    "Acoustic Piano": ([0, 1, 3, 6, 7], 0, 0),
    "Electric Piano": ([2, 4, 5], 2, 2),
    "Chromatic Percussion": (range(8, 16), 8, 8),
    "Organ": (range(16, 24), 16, 16),
    "Guitar (clean)": (range(24, 28), 24, 24),
    "Guitar (distortion)": (range(28, 32), 30, 30),
    "Bass": (range(32, 40), 33, 33),
    "Strings": (range(40, 56), 48, 48),
    "Brass": (range(56, 64), 56, 56),
    "Reed": (range(64, 72), 64, 64),
    "Pipe": (range(72, 80), 72, 72),
    "Synth Lead": (range(80, 88), 80, 80),
    "Synth Pad": (range(88, 96), 88, 88),
    "Singing Voice": ([100], 100, 65),
    "Singing Voice (chorus)": ([101], 101, 53),
}
WRITTEN = {program: written for programs, _, written in CLASSES.values() for program in programs}


def every_program():
    """One note of each program, one at a time; and a drum."""
    return [note(t, t + 0.5, 60, program=t) for t in range(128)] + [note(0, 0.01, 36, is_drum=True)]


def layout(file):
    """(name, program, channel, pitches) of each track with notes, in order."""
    return [
        (
            track.name,
            next(m.program for m in track if m.type == "program_change"),
            next(m.channel for m in track if m.type == "program_change"),
            [m.note for m in track if m.type == "note_on" and m.velocity],
        )
        for track in file.tracks[1:]
    ]


def test_programs_of_a_class_share_a_track(tmp_path):
    notes = [note for note in every_program() if note.program in WRITTEN]
    assert write_midi(notes, tmp_path / "x.mid", style=YOURMT3_STYLE) == ()
    file = mido.MidiFile(tmp_path / "x.mid")
    assert (file.type, file.ticks_per_beat) == (1, 480)
    assert [message.tempo for message in file.tracks[0] if message.type == "set_tempo"] == [500_000]
    in_order = sorted(CLASSES.items(), key=lambda item: item[1][1])
    channels = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15]
    assert layout(file) == [
        *(
            (name, written, channel, [60] * len(programs))
            for channel, (name, (programs, _, written)) in zip(channels, in_order, strict=True)
        ),
        ("Drums", 0, 9, [36]),
    ]
    rows = read(file, 1 / 960)
    assert {(program, n[0] // 960) for (program, is_drum), row in rows.items() for n in row if not is_drum} == {
        (written, program) for program, written in WRITTEN.items()
    }


def test_programs_without_a_class_stay(tmp_path):
    write_midi(every_program(), tmp_path / "x.mid", style=YOURMT3_STYLE)
    found = {program for _, program, *_ in layout(mido.MidiFile(tmp_path / "x.mid"))}
    assert found == {*WRITTEN.values(), *range(96, 100), *range(102, 128)}


def test_fine_style_keeps_the_programs(tmp_path):
    write_midi(every_program(), tmp_path / "x.mid", style=YOURMT3_FINE_STYLE)
    file = mido.MidiFile(tmp_path / "x.mid")
    assert file.ticks_per_beat == 480
    *tracks, drums = layout(file)
    assert [program for _, program, *_ in tracks] == [
        {100: 65, 101: 53}.get(program, program) for program in range(128)
    ]
    names = [name for name, *_ in tracks]
    assert (names[40], names[41], names[42], names[100], names[101]) == (
        "Violin", "Viola", "Cello", "Singing Voice", "Singing Voice (chorus)",
    )  # fmt: skip
    assert len(set(names)) == 128
    assert drums == ("Drums", 0, 9, [36])


@pytest.mark.parametrize("seed", range(150))
def test_notes_that_meet_on_a_merged_program_are_separated(tmp_path, seed):
    rng = np.random.default_rng(seed)
    programs = [0, 1, 2, 40, 41, 53, 65, 100, 101, 120]
    notes = [
        each if each.is_drum else replace(each, program=int(rng.choice(programs)))
        for _ in range(4)
        for each in random_notes(rng)
    ]
    stands_for = {program: first for members, first, _ in CLASSES.values() for program in members}
    merged = [
        each if each.is_drum else replace(each, program=stands_for.get(each.program, each.program)) for each in notes
    ]
    rows, cut, out = expected(merged, rate=960)
    written = {({100: 65, 101: 53}.get(program, program), is_drum): row for (program, is_drum), row in rows.items()}
    told = write_midi(notes, tmp_path / "x.mid", style=YOURMT3_STYLE)
    assert read(mido.MidiFile(tmp_path / "x.mid"), 1 / 960) == written
    assert told == midi_warnings(notes, style=YOURMT3_STYLE)
    assert (f"MIDI: notes cut short where the same pitch starts again: {cut}" in told) == (cut > 0)
    assert (f"MIDI: notes left out because the same pitch starts on the same tick: {out}" in told) == (out > 0)
    pretty = notes_to_midi(notes, style=YOURMT3_STYLE)
    pretty.write(str(tmp_path / "pretty.mid"))
    assert read(mido.MidiFile(tmp_path / "pretty.mid"), 1 / 960) == written
    assert pretty.resolution == 480


def test_a_style_knows_only_what_midi_has():
    assert MidiStyle(220) == MT3_STYLE
    for ticks in (0, -1, 32_768):
        with pytest.raises(OptionError, match="give 1 to 32767"):
            MidiStyle(ticks)
    for wrong in ({"merged": {0: 128}}, {"merged": {-1: 0}}, {"names": {128: "Drums"}}, {"written": {100: 200}}):
        with pytest.raises(OptionError, match="give 0 to 127"):
            MidiStyle(480, **wrong)
