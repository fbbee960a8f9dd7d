"""Files are read as they are needed: memory does not grow with their length, errors come where they stand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bundle_cases import no_open_files_left
from mt3_runtime.audio import AudioStream, open_audio
from mt3_runtime.errors import AudioError
from scripted_audio import RATE, STEP, scripted, silence

HERE = Path(__file__).parent
NAN = math.nan
HELD = [1134, 13, 1168, 1133, 1064, 1]  # tie, shift 10, program 33, velocity 1, pitch 60, end
LISTEN = """
import json, sys
from pathlib import Path
from mt3_runtime.bundle import open_bundle
from scripted_audio import listener

def peak():  # of this process alone; getrusage starts from its parent's peak
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

busy = listener(open_bundle(Path(sys.argv[1])), {1: [1134, 1133, 1303, 3, 3, 1]}, slots=8)
answer = []
for path in sys.argv[2:]:
    result = busy.transcribe(path)
    busy.backend.calls.clear()
    answer.append([result.duration, result.provenance.segments, len(result.notes), peak()])
print(json.dumps(answer))
"""


def write_level(path, minutes):
    """One level from the first sample to the last, which FLAC makes small."""
    block = np.full(60 * RATE, STEP, np.float32)
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16", format="FLAC") as file:
        for _ in range(minutes):
            file.write(block)
    return path


def test_an_hour_takes_no_more_memory_than_a_minute(tiny_folder, tmp_path):
    paths = [write_level(tmp_path / f"{minutes}.flac", minutes) for minutes in (1, 60)]
    finished = subprocess.run(
        [sys.executable, "-c", LISTEN, tiny_folder, *paths], cwd=HERE, capture_output=True, text=True, check=True
    )
    minute, hour = json.loads(finished.stdout)
    assert minute[:3] == [60, 30, 30]
    assert hour[:3] == [3600, 1758, 1758]
    assert hour[3] - minute[3] < 12  # MB; the samples alone would be 230


@pytest.fixture
def spoiled(tmp_path):
    """A minute of which the last sample is not finite."""
    audio = np.zeros(60 * RATE, np.float32)
    audio[-1] = NAN
    soundfile.write(tmp_path / "spoiled.wav", audio, RATE, subtype="FLOAT")
    return tmp_path / "spoiled.wav"


def test_a_file_that_is_spoiled_at_its_end_fails_as_a_whole(tiny_bundle, spoiled):
    busy = scripted(tiny_bundle, *[HELD] * 60, slots=2)
    with no_open_files_left(), pytest.raises(AudioError, match="NaN or infinite"):
        busy.transcribe(spoiled)
    assert busy.transcribe(silence(2), RATE).provenance.segments == 2


def test_segments_before_the_end_of_a_spoiled_file_come_first(tiny_bundle, spoiled):
    busy, found = scripted(tiny_bundle, *[HELD] * 60, slots=2), []
    with no_open_files_left(), pytest.raises(AudioError, match="NaN or infinite"):
        found.extend(segment.index for segment in busy.iter_segments(spoiled))
    assert found == list(range(24))  # three of four blocks of 16.4 s are sound
    assert busy.transcribe(silence(2), RATE).provenance.segments == 2


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 3.0])
def test_the_count_is_what_the_header_promises_until_the_end_is_read(tiny_bundle, tmp_path, monkeypatch, share):
    path, told = tmp_path / "a.wav", []
    soundfile.write(path, silence(20), RATE)

    @contextmanager
    def promising(*arguments, **options):
        with open_audio(*arguments, **options) as stream:
            yield AudioStream(stream.blocks, round(share * stream.expected))

    monkeypatch.setattr("mt3_runtime.reading.open_audio", promising)
    busy = scripted(tiny_bundle, *[HELD] * 20, slots=1)
    result = busy.transcribe(path, progress=lambda *step: told.append(step))
    assert result.provenance.segments == 20
    assert [done for done, _ in told] == list(range(1, 21))
    assert all(done <= count for done, count in told)
    assert told[0][1] == max(4, round(share * 20), 1)  # four segments are read at once
    assert told[-1] == (20, 20)


def test_a_file_that_is_left_early_is_closed(tiny_bundle, tmp_path):
    soundfile.write(tmp_path / "a.flac", silence(40), RATE)
    with no_open_files_left():
        stream = scripted(tiny_bundle, *[HELD] * 40).iter_segments(tmp_path / "a.flac")
        next(stream)
        stream.close()
