"""The demo clip is what its README says, and its reference MIDI is what can be heard in it."""

from __future__ import annotations

import itertools
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


def test_reference_is_one_voice_then_drums(reference, melody, drums):
    assert reference.resolution == 220
    assert len({track.program for track in reference.instruments if not track.is_drum}) >= 3
    assert len(melody) >= 15
    assert len(drums) >= 6
    assert all(48 <= note.pitch <= 84 and 0.2 <= note.end - note.start <= 0.6 for note in melody)
    assert all(first.end <= second.start for first, second in itertools.pairwise(melody))
    assert min(hit.start for hit in drums) >= melody[-1].end
    crossing = [note for note in melody if int(note.start / SEGMENT) != int(note.end / SEGMENT)]
    assert len(crossing) >= 3


def test_every_note_is_heard_at_its_pitch(clip, melody):
    """The strongest harmonic series a quarter of the way into a note has the note's fundamental."""
    candidates = np.arange(40, 92)
    for note in melody:
        magnitudes, frequencies = spectrum(clip, note.start + 0.02, length=3200)
        scores = []
        for pitch in candidates:
            fundamental = 440.0 * 2.0 ** ((pitch - 69) / 12.0)
            partials = [fundamental * k for k in range(1, 6) if fundamental * k < 7000]
            # Weights that fall, so that neither half nor twice the fundamental wins.
            scores.append(
                sum(np.interp(f, frequencies, magnitudes) / k for k, f in enumerate(partials, 1)) / len(partials)
            )
        assert candidates[int(np.argmax(scores))] == note.pitch, note


def test_every_melodic_onset_is_heard_on_time(clip, melody):
    """The second partial is weak just before the onset and strong just after it; the voice never pauses."""
    for note in melody:
        # The fundamentals of neighbouring notes lie as close as 100 ms resolve, and third partials meet fourths.
        partial = 2 * 440.0 * 2.0 ** ((note.pitch - 69) / 12.0)
        before, after = (
            np.interp(partial, *spectrum(clip, note.start + shift, length=1600)[::-1]) for shift in (-0.105, 0.05)
        )
        assert after > 4 * before, note
    assert all(0 <= second.start - first.end < 0.05 for first, second in itertools.pairwise(melody))


def test_every_drum_hit_is_heard_on_time(clip, melody, drums):
    """Energy rises within 50 ms of each hit of the drum part and nowhere else in it."""
    hop, width = 80, 512
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(clip, (width, width)), width)[::hop]
    levels = np.log(np.abs(np.fft.rfft(frames * np.hanning(width))) + 0.05)  # [frames, bins]
    flux = np.maximum(levels[4:] - levels[:-4], 0.0).sum(axis=1)
    times = (np.arange(flux.size) + 4) * hop / RATE - width / RATE / 2
    part = times > melody[-1].end
    near = np.abs(times[:, None] - np.array([hit.start for hit in drums])[None]) < 0.05  # [frames, hits]
    assert near.any(axis=0).all()
    weakest = min(flux[near[:, hit]].max() for hit in range(len(drums)))
    assert weakest > 2 * flux[part & ~near.any(axis=1)].max()


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
