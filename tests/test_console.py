"""Standard streams that are closed, full or of few characters: the work is done, or one line says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mt3_runtime.bundle import demo_bundle_path, demo_clip_path
from mt3_runtime.cli import main

COMMANDS = Path(sys.executable).parent
RATE = 16_000
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


def shell(line, folder, **environment):
    """Runs a line of the shell in a folder; `mt3-run` is the one that is tested."""
    variables = {**os.environ, "PATH": f"{COMMANDS}:{os.environ['PATH']}", **environment}
    return subprocess.run(["sh", "-c", line], cwd=folder, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path):
    """Two short sounds, their raw samples, and a MIDI file."""
    samples = np.round(9_000 * np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)).astype("<i2")
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, samples, RATE)
    (tmp_path / "a.raw").write_bytes(samples.tobytes())
    (tmp_path / "reference.mid").write_bytes((demo_clip_path() / "reference.mid").read_bytes())
    return tmp_path


@needs_full
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_words_that_cannot_be_written_stop_no_work(folder, where):
    found = shell(f"mt3-run transcribe a.wav b.wav --slots 1 --output-dir out {where}", folder)
    assert (found.returncode, found.stdout) == (0, "")
    assert {path.name for path in (folder / "out").iterdir()} == {"a.mid", "b.mid"}
    found = shell(f"mt3-run stream --rate {RATE} -o st.mid <a.raw {where}", folder)
    assert found.returncode == 0
    assert [json.loads(line)["is_last"] for line in found.stdout.splitlines()] == [True]
    assert (folder / "st.mid").read_bytes().startswith(b"MThd")


@needs_full
def test_results_that_cannot_be_written_are_an_error_and_no_difference(folder):
    for command in ("mt3-run diff reference.mid reference.mid", f"mt3-export inspect --json {demo_bundle_path()}"):
        found = shell(f"{command} >/dev/full", folder)
        told = "error: standard output cannot be written (No space left on device): send it elsewhere"
        assert (found.returncode, found.stderr) == (2, f"{command.split()[0]}: {told}\n")


def test_what_is_closed_is_opened_to_nothing(folder):
    """Else a file of ours gets its number, and what is printed goes into that."""
    found = shell("mt3-run diff none.mid reference.mid --json 2>&-", folder)
    assert (found.returncode, found.stdout, found.stderr) == (2, "", "")
    found = shell("mt3-run transcribe a.wav -o a.mid >&- 2>&- <&-", folder)
    assert found.returncode == 0
    written = (folder / "a.mid").read_bytes()
    assert shell("mt3-run transcribe a.wav -o b.mid", folder).returncode == 0
    assert written == (folder / "b.mid").read_bytes()


def test_children_have_no_closed_streams_either(folder):
    child = "import os; [os.fstat(number) for number in (0, 1, 2)]; print('all', file=open('told', 'w'))"
    program = f"""import subprocess, sys; from mt3_runtime.console import prepare_streams; prepare_streams()
subprocess.run([sys.executable, "-c", {child!r}], check=True)"""
    (folder / "program.py").write_text(program)
    assert shell(f"{sys.executable} program.py <&- >&- 2>&-", folder).returncode == 0
    assert (folder / "told").read_text() == "all\n"


def test_every_character_can_be_printed(folder):
    name = "é€.mid"
    (folder / name).write_bytes((folder / "reference.mid").read_bytes())
    found = shell(f"mt3-run diff {name} reference.mid", folder, PYTHONIOENCODING="ascii")
    assert found.returncode == 0
    assert found.stdout.startswith("A  '\\xe9\\u20ac.mid': 58 notes\n")


def test_names_break_no_line_and_reach_no_terminal(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = "n\nope\x1b[31m.wav"
    assert main(["transcribe", odd, "-o", "x.mid"]) == 2
    assert capsys.readouterr().err == f"mt3-run: error: {odd!r} does not exist: check the path\n"
    assert main(["transcribe", "x.wav", "-o", "x\ny/z.mid"]) == 2
    assert capsys.readouterr().err == "mt3-run: error: folder 'x\\ny' does not exist: create it first\n"


@pytest.mark.parametrize("command", [["transcribe", "a.wav"], ["stream", "--rate", "16000"]])
def test_names_that_are_too_long_are_one_line(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "-o", "y" * 300 + ".mid"]) == 2
    assert capsys.readouterr().err.endswith(".mid': the name is too long: choose a shorter one\n")
