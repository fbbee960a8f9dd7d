"""MIDI files read as pretty_midi reads them, and one line for those that cannot be read."""

from __future__ import annotations

from collections import Counter
from io import BytesIO

import mido
import numpy as np
import pretty_midi
import pytest

from mt3_runtime.bundle import demo_clip_path
from mt3_runtime.cli import main
from mt3_runtime.errors import OptionError
from mt3_runtime.midi_reading import read_midi

REFERENCE = demo_clip_path() / "reference.mid"


def run(capsys, *arguments):
    code = main(["diff", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_notes_are_read_as_pretty_midi_reads_them():
    expected = Counter(
        (n.start, n.end, n.pitch, n.velocity, 0 if track.is_drum else track.program, track.is_drum)
        for track in pretty_midi.PrettyMIDI(str(REFERENCE)).instruments
        for n in track.notes
    )
    read = read_midi(REFERENCE)
    assert Counter((n.onset, n.offset, n.pitch, n.velocity, n.program, n.is_drum) for n in read.notes) == expected
    assert read.warnings == ()


def test_what_is_not_read_is_told(tmp_path, capsys):
    file = mido.MidiFile(ticks_per_beat=100)
    on, off = (mido.Message(kind, note=60, time=50) for kind in ("note_on", "note_off"))
    file.tracks.append(mido.MidiTrack([on, off, on, off.copy(time=0), on.copy(note=61)]))
    file.tracks.append(mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=1)]))
    file.save(tmp_path / "odd.mid")
    read = read_midi(tmp_path / "odd.mid")
    assert [(n.onset, n.offset) for n in read.notes] == [(0.25, 0.5)]
    assert len(read.warnings) == 2
    assert "no length, left out: 2" in read.warnings[0]
    assert "tempo changes" in read.warnings[1]
    code, out, _ = run(capsys, tmp_path / "odd.mid", tmp_path / "odd.mid")
    assert code == 0
    assert out.count("note: ") == 4


def encoded(**options):
    buffer = BytesIO()
    file = mido.MidiFile(**options)
    file.tracks.append(mido.MidiTrack([mido.Message("note_on", note=60), mido.Message("note_off", note=60, time=9)]))
    file.save(file=buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "damaged"),
        (b"RIFF and more of that", "no MIDI file"),
        (encoded(type=2), "type 2"),
        (
            encoded().replace(b"\0\xff\x2f\0", b"\0\xff\x59\x02\x63\0\0").replace(b"\0\0\0\x0c", b"\0\0\0\x0f"),
            "damaged",
        ),
        (encoded(ticks_per_beat=0x1000).replace(b"\x10\x00", b"\xe7\x28"), "SMPTE"),
        (encoded()[:10] + b"\0\0\1\xe0", "it has no events"),
        (encoded().replace(b"\x09\x80", b"\xff\xff\xff\x7f\x80").replace(b"\0\0\0\x0c", b"\0\0\0\x0f"), "000 ticks"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, data, said, capsys):
    path = tmp_path / "bad.mid"
    path.write_bytes(data)
    code, out, err = run(capsys, REFERENCE, path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mt3-run: error: ")
    assert said in err
    assert err.rstrip().endswith("give a MIDI file of type 0 or 1")


def test_paths_that_cannot_be_read(tmp_path, capsys):
    for path, said in ((tmp_path / "none.mid", "No such file"), (tmp_path, "Is a directory")):
        code, out, err = run(capsys, path, REFERENCE)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err


def refusal(path):
    try:
        read_midi(path)
    except OptionError as error:
        return str(error)


def test_damage_is_told_in_one_line_whatever_it_is(tmp_path):
    whole, path = REFERENCE.read_bytes(), tmp_path / "damaged.mid"
    rng = np.random.default_rng(3)
    outcomes = Counter()
    for round_ in range(400):
        data = bytearray(whole)
        if round_ % 4 == 0:
            del data[int(rng.integers(len(data))) :]
        for place in rng.integers(len(data), size=rng.integers(1, 4)) if data else ():
            data[place] = int(rng.integers(256))
        path.write_bytes(data)
        said = refusal(path)
        outcomes[said is None] += 1
        assert said is None or ("\n" not in said and len(said) < 500)
    assert min(outcomes[True], outcomes[False]) > 40
