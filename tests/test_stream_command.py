"""`mt3-run stream`, and the figures of songs and streams that `mt3-run bench` prints."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pretty_midi
import pytest

from mt3_runtime import bench_songs, cli, stream_command
from mt3_runtime.audio import load_audio
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import demo_clip_path
from mt3_runtime.loading import load
from mt3_runtime.transcription import note_to_dict
from scripted_audio import RATE, SEGMENT, levels, listener

END, TIE = 1, 1134
SECONDS = 5


@pytest.fixture(scope="module")
def clip():
    """The first seconds of the demo clip as 16-bit numbers, and the notes that it holds."""
    audio = load_audio(demo_clip_path() / "clip.flac")[: SECONDS * RATE]
    numbers = np.round(audio * 32_767).astype("<i2")
    return numbers, load(threads=1).transcribe(numbers, RATE).notes


class Pipe(io.BytesIO):
    """Gives what has come, a few bytes at a time."""

    def read1(self, size=-1):
        return super().read1(min(size, 1_013))


def stream(monkeypatch, capsys, data, *arguments):
    """Exit code, lines of JSON and lines of standard error."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=Pipe(data)))
    code = cli.main(["stream", "--threads", "1", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err.splitlines()


def onsets(notes):
    return sorted((note["onset"], note["pitch"], note["is_drum"]) for note in notes)


def test_notes_come_line_by_line_and_as_midi(monkeypatch, capsys, clip, tmp_path):
    numbers, notes = clip
    target = tmp_path / "out.mid"
    code, lines, said = stream(monkeypatch, capsys, numbers.tobytes(), "--rate", RATE, "-o", target)
    assert code == 0
    assert [(line["segment"], line["is_last"], line["status"]) for line in lines] == [
        (0, False, "ended"), (1, False, "ended"), (2, True, "ended"),
    ]  # fmt: skip
    assert lines[1]["start"] == 2.04
    found = [note for line in lines for note in line["notes"]]
    assert onsets(found) == onsets(map(note_to_dict, notes))
    assert len(found) > 5
    assert sum(len(track.notes) for track in pretty_midi.PrettyMIDI(str(target)).instruments) == len(found)
    assert "not for real music" in said[0]
    assert said[1] == "listening: 1 x s16le at 16000 Hz, on cpu: no NVIDIA GPU can be reached"


@pytest.mark.parametrize(
    ("kind", "dtype", "scale"), [("s16le", "<i2", 1), ("s32le", "<i4", 65_536), ("f32le", "<f4", 2.0**-15)]
)
def test_formats_and_channels(monkeypatch, capsys, clip, kind, dtype, scale):
    numbers, notes = clip
    data = np.repeat((numbers * np.float64(scale)).astype(dtype)[:, None], 2, axis=1).tobytes()
    options = ("--rate", RATE, "--channels", 2, "--format", kind)
    code, lines, said = stream(monkeypatch, capsys, data + b"\1\2\3", *options)
    assert code == 0
    assert onsets([note for line in lines for note in line["notes"]]) == onsets(map(note_to_dict, notes))
    assert said[-1] == "note: the last 3 bytes are no whole sample and were left out"


def test_what_is_wrong_is_one_line(monkeypatch, capsys, tmp_path):
    silence = np.zeros(3 * RATE, "<i2").tobytes()
    for data, options, reason in (
        (b"", ("--rate", RATE), "the stream holds 0 samples"),
        (b"", ("--rate", 100), "standard input has a rate of 100 Hz"),
        (b"", ("--rate", RATE, "--channels", 9), "9 channels"),
        (silence, ("--rate", RATE, "-o", tmp_path / "x.wav"), "does not end in .mid"),
        (silence, ("--rate", RATE, "-o", tmp_path / "none" / "x.mid"), "create it first"),
        (np.full(3 * RATE, np.nan, "<f4").tobytes(), ("--rate", RATE, "--format", "f32le"), "NaN"),
    ):
        code, lines, said = stream(monkeypatch, capsys, data, *options)
        assert (code, lines) == (2, [])
        assert reason in said[-1]
        assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_the_notes_before_it(monkeypatch, capsys, clip, tmp_path):
    numbers, notes = clip
    target, options = tmp_path / "out.mid", ("--rate", RATE, "--format", "f32le", "-o", tmp_path / "out.mid")
    data = np.concatenate([numbers / np.float32(32_768), [np.nan]]).astype("<f4").tobytes()
    code, lines, said = stream(monkeypatch, capsys, data, *options)
    found = [note for line in lines for note in line["notes"]]
    assert (code, [line["is_last"] for line in lines]) == (2, [False, False, True])
    assert onsets(found) == onsets(map(note_to_dict, notes))  # those that sounded, too, and the segment that had begun
    assert "the stream holds NaN" in said[-1]
    assert sum(len(track.notes) for track in pretty_midi.PrettyMIDI(str(target)).instruments) == len(found) > 3
    target.unlink()
    assert stream(monkeypatch, capsys, np.full(9, np.nan, "<f4").tobytes(), *options)[0] == 2
    assert not target.exists()


COMMAND = [str(Path(sys.executable).parent / "mt3-run"), "stream", "--rate", str(RATE), "--threads", "1"]


@pytest.fixture(autouse=True)
def heard():
    """Signals are as in a terminal: tests that run in the background inherit that they are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def listening(*options, **settings):
    """A process that waits for samples."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, *options], stdin=pipe, stdout=pipe, stderr=pipe, **settings) as process:
        try:
            while not process.stderr.readline().startswith(b"listening"):
                pass
            yield process
        finally:
            process.kill()


def say(process, samples):
    process.stdin.write(samples.tobytes())
    process.stdin.flush()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pipe_is_answered_at_once_and_a_signal_is_the_end(clip, tmp_path, number):
    """A real process: its first line comes while the pipe is open, and the signal loses no note."""
    numbers, notes = clip
    target = tmp_path / "out.mid"
    with listening("-o", target) as process:
        say(process, numbers[:SEGMENT])
        lines = [json.loads(process.stdout.readline())]
        say(process, numbers[SEGMENT:])
        lines.append(json.loads(process.stdout.readline()))
        process.send_signal(number)
        lines += map(json.loads, process.stdout)
        assert process.wait(30) == 0
    assert [line["is_last"] for line in lines] == [False, False, True]
    assert onsets([note for line in lines for note in line["notes"]]) == onsets(map(note_to_dict, notes))
    assert target.exists()


def test_a_signal_in_the_middle_of_decoding_waits_for_its_end(monkeypatch, capsys, clip):
    """Sent from within a step, so that it comes when nothing is being read; what was read before it is kept."""
    numbers, _ = clip
    step, sent = OrtBackend.step, []

    def interrupted(self, *arguments):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return step(self, *arguments)

    monkeypatch.setattr(OrtBackend, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    code, lines, _ = stream(monkeypatch, capsys, numbers.tobytes(), "--rate", RATE)
    assert (code, sent) == (0, [None])
    assert [line["is_last"] for line in lines] == [False, True]
    assert lines[0]["notes"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_is_an_interrupt(monkeypatch, capsys, clip):
    numbers, _ = clip
    monkeypatch.setattr(OrtBackend, "step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TypeError):  # the first signal alone does not stop the step, which returns nothing
        stream(monkeypatch, capsys, numbers.tobytes(), "--rate", RATE)

    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(OrtBackend, "step", twice)
    code, lines, said = stream(monkeypatch, capsys, numbers.tobytes(), "--rate", RATE)
    assert (code, lines, said[-1]) == (130, [], "mt3-run: interrupted")


def test_a_signal_right_behind_the_samples_loses_none_of_them():
    """A read that the signal broke off would have taken them from the pipe, and thrown them away."""
    kept = 0
    for _ in range(30):
        reader, writer = os.pipe()
        interrupt = stream_command._Interrupt()
        with os.fdopen(reader, "rb") as source, interrupt.installed():
            child = os.fork()
            if not child:
                time.sleep(0.02)  # the other side waits by then
                os.write(writer, bytes(4_096))
                os.kill(os.getppid(), signal.SIGINT)
                os._exit(0)
            kept += len(interrupt.read(source)) == 4_096
            os.waitpid(child, 0)
        os.close(writer)
    assert kept == 30


def test_a_pipe_that_does_not_block_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with os.fdopen(reader, "rb") as source, os.fdopen(writer, "wb", buffering=0) as sink:
        threading.Timer(0.1, sink.write, [b"here"]).start()
        assert stream_command._Interrupt().read(source) == b"here"


def test_signals_while_the_notes_are_written_wait(monkeypatch, capsys, clip, tmp_path):
    numbers, notes = clip
    target, write = tmp_path / "out.mid", stream_command.write_midi

    def interrupted(*arguments, **options):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return write(*arguments, **options)

    monkeypatch.setattr(stream_command, "write_midi", interrupted)
    code, _, _ = stream(monkeypatch, capsys, numbers.tobytes(), "--rate", RATE, "-o", target)
    assert code == 0
    assert sum(len(track.notes) for track in pretty_midi.PrettyMIDI(str(target)).instruments) == len(notes)


def test_an_ignored_signal_stays_ignored(clip):
    """As of a shell's `mt3-run stream &`."""
    numbers, _ = clip
    with listening(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGINT)
        say(process, numbers)
        process.stdin.close()
        assert [json.loads(line)["segment"] for line in process.stdout] == [0, 1, 2]


def test_a_closed_pipe_is_one_line(clip, tmp_path):
    numbers, _ = clip
    target = tmp_path / "out.mid"
    with listening("-o", target) as process:
        process.stdout.close()
        with suppress(BrokenPipeError):  # it may be gone before it has read everything
            say(process, numbers)
            process.stdin.close()
        [line] = process.stderr.read().decode().splitlines()
        assert process.wait(30) == 2
    assert "nobody reads the notes any more" in line
    assert target.exists()


# ---- figures --------------------------------------------------------------------------------------------


def bench(capsys, *arguments):
    code = cli.main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def test_bench_of_songs(capsys, tiny_folder):
    options = ("--bundle", tiny_folder, "--segments", 2, "--steps", 5, "--repeat", 1, "--songs", 3)
    code, out, _ = bench(capsys, *options, "--json")
    result = json.loads(out)
    assert (code, result["songs"], result["segments"], result["steps"]) == (0, 3, 2, 5)
    assert result["ratio"] == pytest.approx(3 * result["one_s"] / result["all_s"])
    assert "3 side by side" in bench(capsys, *options)[1]


def test_bench_of_streams(capsys, tiny_folder):
    options = ("--bundle", tiny_folder, "--segments", 4, "--steps", 5, "--streams", 2)
    code, out, _ = bench(capsys, *options, "--json")
    result = json.loads(out)
    assert (code, result["streams"]) == (0, 2)
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["worst_ms"]
    assert result["load"] > 0
    assert "(p99)" in bench(capsys, *options)[1]
    assert bench(capsys, *options, "--songs", 2)[0] == 2
    assert bench(capsys, "--bundle", tiny_folder, "--steps", 97, "--streams", 1)[0] == 2


@pytest.mark.parametrize("bundle", ["tiny_bundle", "channels_bundle"])
def test_latency_is_counted_from_the_last_sample_to_the_notes(monkeypatch, request, bundle):
    """Each step takes 0.1 s, on a clock of its own, however many rows share it."""
    bundle = request.getfixturevalue(bundle)
    channels = bundle.manifest.model.channels
    busy = listener(bundle, {row: [9] * 96 for row in range(20 * channels)}, slots=2 * channels)
    now, step = 0.0, busy.backend.step

    def slow(*arguments):
        nonlocal now
        now += 0.1
        return step(*arguments)

    busy.backend.step = slow
    busy.backend.encode = lambda features: np.zeros((len(features), channels, 1, 1), np.float32)
    monkeypatch.setattr(bench_songs, "perf_counter", lambda: now)
    result = bench_songs.bench_streams(busy, 1, 6, 7, repeat=2)
    assert result["p50_ms"] == pytest.approx(700)
    assert result["worst_ms"] == pytest.approx(700)
    assert result["load"] == pytest.approx(0.7 / (SEGMENT / RATE), rel=1e-3)
    together = bench_songs.bench_streams(busy, 2, 6, 15, repeat=1)  # 1.5 s of work for each, 1.02 s apart, two slots
    assert together["p50_ms"] == pytest.approx(1500, abs=101)
    assert busy.rules.end_token == END  # as before


def test_forced_lengths_are_given_back(tiny_bundle):
    busy = listener(tiny_bundle, {number: [TIE, END, *[3] * 90] for number in range(200)}, slots=2)
    rules = busy.rules
    figures = bench_songs.bench_songs(busy, 2, 2, 4, repeat=1)
    assert figures["songs"] == 2
    assert busy.rules is rules
    assert math.isfinite(figures["ratio"])
    assert busy.transcribe(levels(tiny_bundle, [1]), RATE).provenance.tokens == 1


def test_no_standard_input_is_one_line():
    command = ["sh", "-c", '"$@" <&-', "sh", *COMMAND]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (2, "mt3-run: error: there is no standard input: pipe samples to it\n")
