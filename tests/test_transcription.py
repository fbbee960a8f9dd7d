"""What a result says about itself, and the files it becomes."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import FrozenInstanceError, replace
from io import BytesIO

import numpy as np
import pretty_midi
import pytest
from PIL import Image

from mt3_runtime.errors import OptionError, OutputError
from mt3_runtime.midi_styles import MidiStyle
from mt3_runtime.notes import Note
from mt3_runtime.transcription import Provenance, Transcription

NOTES = (
    Note(0.1, 1 / 3, 60, 127, 33, is_drum=False, confidence=2 / 3),
    Note(0.5, 0.51, 38, 100, 0, is_drum=True),
)


@pytest.fixture
def provenance():
    return Provenance(
        model="mt3",
        bundle="models/mt3",
        bundle_sha256="ab" * 32,
        device="cpu",
        provider="CPUExecutionProvider",
        precision="fp32",
        runtime_version="0.1.0",
        audio_seconds=2.5,
        stage_seconds={"read": 0.125, "decode": 0.5},
        real_time_factor=0.25,
        segments=2,
        tokens=90,
        invalid_events=1,
        dropped_events=2,
        truncated_segments=(1,),
        failed_segments=(),
        warnings=("segment 1 was cut off at 1024 tokens", 'a "quoted" one'),
    )


@pytest.fixture
def transcription(provenance):
    return Transcription(NOTES, 2.5, provenance)


def refuse(text):
    raise AssertionError(f"{text} is not JSON")


def parse(transcription):
    return json.loads(transcription.to_json(), parse_constant=refuse)


def test_json_holds_everything(transcription):
    document = parse(transcription)
    assert document == {
        "version": 1,
        "duration": 2.5,
        "notes": [
            {"onset": 0.1, "offset": 0.333333, "pitch": 60, "velocity": 127, "program": 33, "is_drum": False,
             "confidence": 0.666667},
            {"onset": 0.5, "offset": 0.51, "pitch": 38, "velocity": 100, "program": 0, "is_drum": True,
             "confidence": None},
        ],
        "warnings": ["segment 1 was cut off at 1024 tokens", 'a "quoted" one'],
        "provenance": {
            "model": "mt3", "bundle": "models/mt3", "bundle_sha256": "ab" * 32, "device": "cpu",
            "provider": "CPUExecutionProvider", "precision": "fp32", "runtime_version": "0.1.0",
            "audio_seconds": 2.5, "stage_seconds": {"read": 0.125, "decode": 0.5}, "real_time_factor": 0.25,
            "segments": 2, "tokens": 90, "invalid_events": 1, "dropped_events": 2,
            "truncated_segments": [1], "failed_segments": [], "memory_restarts": [], "fallback_rows": 0,
                "skip_silence": "off", "silent_segments": [], "device_reason": "", "strict_upstream": False,
        },
    }  # fmt: skip
    assert transcription.warnings == tuple(document["warnings"])


def test_json_has_one_note_on_a_line(transcription):
    lines = transcription.to_json().splitlines()
    assert [json.loads(line.rstrip(","))["pitch"] for line in lines if '"onset"' in line] == [60, 38]


def test_json_without_notes(provenance):
    assert parse(Transcription((), 0.0, replace(provenance, warnings=())))["notes"] == []


def test_json_of_numpy_numbers_and_odd_text(provenance):
    odd = replace(
        provenance, bundle="cl\udce9 \u2028", tokens=np.int64(7), stage_seconds={"read": np.float32(0.5)},
        truncated_segments=(np.int32(4),),
    )  # fmt: skip
    note = Note(np.float32(0.5), np.float64(1.0), np.int64(60), np.uint8(1), np.int16(3), np.False_, np.float32(0.5))
    document = parse(Transcription((note,), np.float32(1.5), odd))
    assert document["duration"] == 1.5
    assert document["notes"][0] == {
        "onset": 0.5, "offset": 1.0, "pitch": 60, "velocity": 1, "program": 3, "is_drum": False, "confidence": 0.5,
    }  # fmt: skip
    assert document["provenance"]["bundle"] == "cl\udce9 \u2028"
    assert document["provenance"]["tokens"] == 7
    assert document["provenance"]["stage_seconds"] == {"read": 0.5}
    assert document["provenance"]["truncated_segments"] == [4]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("audio_seconds", math.nan, "audio_seconds"),
        ("real_time_factor", math.inf, "real_time_factor"),
        ("tokens", -1, "tokens"),
        ("real_time_factor", np.float32("nan"), "real_time_factor"),
        ("stage_seconds", {"encode": math.nan}, "encode"),
        ("stage_seconds", {"encode": -0.1}, "encode"),
    ],
)
def test_provenance_refuses_what_is_no_amount(provenance, field, value, named):
    with pytest.raises(OptionError, match=f"'{named}' is .*: give a finite number"):
        replace(provenance, **{field: value})


@pytest.mark.parametrize("duration", [-1.0, math.nan, math.inf])
def test_a_duration_is_a_length(provenance, duration):
    with pytest.raises(OptionError, match="duration"):
        Transcription((), duration, provenance)


def test_a_result_cannot_change_and_can_travel(transcription):
    stages = {"read": 1.0}
    provenance = replace(transcription.provenance, stage_seconds=stages)
    stages["read"] = 9.0
    assert provenance.stage_seconds == {"read": 1.0}
    with pytest.raises(FrozenInstanceError):
        transcription.duration = 3.0
    assert deepcopy(transcription) == transcription  # as pickling does, between processes


def test_midi_has_the_notes(transcription):
    found = {(i.name, i.program, i.is_drum): [n.pitch for n in i.notes] for i in transcription.to_midi().instruments}
    assert found == {("Electric Bass (finger)", 33, False): [60], ("Drums", 0, True): [38]}


def test_midi_is_written_in_its_style_and_everything_else_is_as_it_is(transcription, tmp_path):
    merged = replace(transcription, midi_style=MidiStyle(480, merged={33: 48}, names={48: "Strings"}))
    assert {(i.name, i.program) for i in merged.to_midi().instruments} == {("Strings", 48), ("Drums", 0)}
    merged.save(tmp_path / "song.mid")
    midi = pretty_midi.PrettyMIDI(str(tmp_path / "song.mid"))
    assert (midi.resolution, sorted(i.program for i in midi.instruments)) == (480, [0, 48])
    assert merged.to_json() == transcription.to_json()
    assert deepcopy(merged) == merged != transcription


@pytest.mark.parametrize("suffix", [".mid", ".midi", ".MID"])
def test_save_midi(transcription, tmp_path, suffix):
    assert transcription.save(tmp_path / f"song{suffix}") == ()
    midi = pretty_midi.PrettyMIDI(str(tmp_path / f"song{suffix}"))
    assert {i.program: [n.pitch for n in i.notes] for i in midi.instruments} == {33: [60], 0: [38]}


def test_save_tells_what_midi_cannot_hold(transcription, tmp_path):
    twice = replace(transcription, notes=[*NOTES, NOTES[0]])
    [warning] = twice.save(tmp_path / "song.mid")
    assert "left out" in warning
    assert twice.save(str(tmp_path / "song.json")) == ()
    assert len(json.loads((tmp_path / "song.json").read_text())["notes"]) == 3


def test_save_json_and_picture(transcription, tmp_path):
    transcription.save(tmp_path / "song.json")
    assert (tmp_path / "song.json").read_text() == transcription.to_json()
    transcription.save(tmp_path / "song.png")
    image = Image.open(BytesIO((tmp_path / "song.png").read_bytes()))
    image.verify()
    assert image.width > 900


@pytest.mark.parametrize("name", ["song", "song.wav", ".mid", "song.mid.bak"])
def test_save_with_another_suffix(transcription, tmp_path, name):
    with pytest.raises(OutputError, match=r"suffix \.mid, \.midi, \.json or \.png"):
        transcription.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".mid", ".json", ".png"])
def test_a_missing_folder_is_named(transcription, tmp_path, suffix):
    with pytest.raises(OutputError, match=r"missing.*create the folder first"):
        transcription.save(tmp_path / "missing" / f"song{suffix}")
