"""The demo clip is what its README says, and its reference MIDI is what can be heard in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pretty_midi
import pytest
import soundfile

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "engines" / "demo_clip"
SEGMENT = 2.048  # seconds
RATE = 16_000


@pytest.fixture(scope="module")
def clip():
    samples, rate = soundfile.read(FOLDER / "clip.flac", dtype="float64")
    assert rate == RATE
    return samples  # [samples]


@pytest.fixture(scope="module")
def reference():
    return pretty_midi.PrettyMIDI(str(FOLDER / "reference.mid"))


@pytest.fixture(scope="module")
def melody(reference):
    notes = [note for track in reference.instruments if not track.is_drum for note in track.notes]
    return sorted(notes, key=lambda note: note.start)


@pytest.fixture(scope="module")
def drums(reference):
    return [note for track in reference.instruments if track.is_drum for note in track.notes]


def spectrum(samples, start, length=4096):
    """Magnitudes over the samples from `start` seconds on, and their frequencies in Hz."""
    first = round(start * RATE)
    window = samples[first : first + length] * np.hanning(length)
    return np.abs(np.fft.rfft(window, 4 * length)), np.fft.rfftfreq(4 * length, 1 / RATE)


def test_format_and_size(clip):
    info = soundfile.info(FOLDER / "clip.flac")
    assert (info.format, info.subtype, info.channels) == ("FLAC", "PCM_16", 1)
    assert 9.5 <= info.duration <= 10.5
    assert (FOLDER / "clip.flac").stat().st_size < 250_000
    assert 0.5 < np.abs(clip).max() < 0.9
    assert {path.name for path in FOLDER.iterdir()} == {"clip.flac", "reference.mid", "README.md"}


def test_reference_is_a_small_band(reference, melody, drums):
    assert reference.resolution == 220
    programs = {track.program for track in reference.instruments if not track.is_drum}
    assert programs == {0, 33, 48}
    assert len(melody) >= 30
    assert len(drums) >= 20
    assert {note.pitch for note in drums} == {36, 38, 42}
    assert all(40 <= note.pitch <= 84 and 0.2 <= note.end - note.start <= 1.3 for note in melody)
    crossing = [note for note in melody if int(note.start / SEGMENT) != int(note.end / SEGMENT)]
    assert len(crossing) >= 5
    together = [sum(other.start <= time < other.end for other in melody) for time in np.arange(3, 9, 0.1)]
    assert max(together) == 2


def loudness(samples, pitch, start, length=1600):
    """Of the first three partials of a pitch, over the samples from `start` seconds on."""
    hertz = 440.0 * 2.0 ** ((pitch - 69) / 12.0) * np.arange(1, 4)
    return np.interp(hertz, *spectrum(samples, start, length)[::-1])


def test_every_onset_is_heard_on_time(clip, melody):
    """A partial at least is weak just before an onset and strong just after it, unless it sounded on from before."""
    for note in melody:
        if any(abs(other.end - note.start) < 0.05 and other.pitch == note.pitch for other in melody):
            continue
        before, after = (loudness(clip, note.pitch, note.start + shift) for shift in (-0.105, 0.05))
        assert (after > 2.5 * before).any(), note


def test_every_note_is_louder_than_its_neighbours(clip, melody):
    """Half tones above and below, whatever else sounds: their fundamentals are weaker."""
    for note in melody:
        here, above, below = (
            loudness(clip, note.pitch + shift, note.start + 0.03, 3200)[:2].max() for shift in (0, 1, -1)
        )
        assert here > 1.5 * max(above, below), note


def test_every_drum_hit_is_heard_on_time(clip, drums):
    """Energy that no instrument has, below 75 Hz or above 5 kHz, rises within 30 ms of each hit and nowhere else."""
    hop, width = 80, 512
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(clip, (width, width)), width)[::hop]
    magnitudes = np.abs(np.fft.rfft(frames * np.hanning(width)))
    high = magnitudes[:, round(5500 / RATE * width) :].sum(axis=1)
    flux = np.maximum(high[4:] - high[:-4], 0.0)
    times = (np.arange(flux.size) + 4) * hop / RATE - width / RATE / 2
    hits = np.array(sorted({hit.start for hit in drums}))
    near = np.abs(times[:, None] - hits[None]) < 0.03  # [frames, hits]
    assert near.any(axis=0).all()
    weakest = min(flux[near[:, hit]].max() for hit in range(len(hits)))
    quiet = ~(np.abs(times[:, None] - hits[None]) < 0.06).any(axis=1) & (times < hits[-1])
    assert weakest > 2 * flux[quiet].max()


def test_silence_before_the_first_note(clip, melody):
    first = round(melody[0].start * RATE)
    assert not clip[: first - 80].any()
    assert np.abs(clip[first : first + 800]).max() > 0.1


def test_the_script_renders_the_same_clip(clip, reference, tmp_path):
    """Samples within one step of 16 bits (libm differs between machines), notes exactly."""
    script = ROOT / "scripts" / "make_demo_clip"
    assert os.access(script, os.X_OK)
    subprocess.run([sys.executable, script, "--output-dir", tmp_path], check=True, capture_output=True)
    again, rate = soundfile.read(tmp_path / "clip.flac", dtype="float64")
    assert rate == RATE
    assert again.shape == clip.shape
    assert np.abs(again - clip).max() <= 1.01 / 32768
    rewritten = pretty_midi.PrettyMIDI(str(tmp_path / "reference.mid"))
    assert _contents(rewritten) == _contents(reference)


def _contents(midi):
    return [
        (track.program, track.is_drum, note.pitch, note.velocity, note.start, note.end)
        for track in midi.instruments
        for note in track.notes
    ]
