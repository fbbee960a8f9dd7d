"""Commands whose packages are not installed: one line with the command that installs them, before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mt3_export.dependencies import needing
from mt3_runtime.bundle import demo_bundle_path, demo_clip_path
from mt3_runtime.errors import DependencyError

TRAIN = Path(__file__).parent.parent / "scripts" / "train_demo"
WITHOUT = """
import os, runpy, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
program, sys.argv = sys.argv[2], sys.argv[2:]
if program == "mt3-export":
    from mt3_export.cli import main
elif program == "mt3-run":
    from mt3_runtime.cli import main
else:
    sys.path.insert(0, os.path.dirname(program))
    runpy.run_path(program, run_name="__main__")
sys.exit(main())
"""
CPU_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu && "  # not gigabytes of CUDA
CHECKPOINT = ("--model", "mt3", "--checkpoint", "random:0")


def run(missing, *command, folder):
    arguments = [sys.executable, "-c", WITHOUT, missing, *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=folder)


@pytest.fixture
def clip():
    return demo_clip_path() / "clip.flac"


@pytest.mark.parametrize(
    ("missing", "command", "fix"),
    [
        ("torch", ("bundle", *CHECKPOINT, "--output", "new"), "[export]'"),
        ("onnxscript,onnx_ir", ("bundle", *CHECKPOINT, "--output", "new"), "[export]'"),
        ("torch,onnx_ir", ("bundle", *CHECKPOINT, "--output", "new"), "[export]'"),
        ("torch", ("verify", "DEMO", *CHECKPOINT), "[cpu,export]'"),
        ("onnx_ir", ("quantize", "DEMO", "--output", "new"), "[quantize]'"),
        ("onnx", ("inspect", "DEMO"), "[quantize]'"),
        ("onnx", ("engines", "DEMO"), "[quantize]'"),
        ("onnx_ir", ("precision", "DEMO", "--audio", ".", "--output", "new"), "[cpu,quantize]'"),
    ],
)  # fmt: skip
def test_exporter(missing, command, fix, tmp_path):
    named = [demo_bundle_path() if word == "DEMO" else word for word in command]
    found = run(missing, "mt3-export", *named, folder=tmp_path)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    small = CPU_TORCH if "torch" in missing else ""
    assert any(
        f" {name} cannot be imported: {small}pip install 'mt3-runtime{fix}\n" in found.stderr
        for name in missing.split(",")
    )
    assert not list(tmp_path.iterdir())


def test_checkpoint_in_the_lab(clip, tmp_path):
    arguments = ("precision", *CHECKPOINT, "--audio", clip, "--output", tmp_path / "new")
    found = run("torch", "mt3-export", *arguments, folder=tmp_path)
    assert found.returncode == 2
    assert f"torch cannot be imported: {CPU_TORCH}pip install 'mt3-runtime[cpu,export]'" in found.stderr


def test_training(tmp_path):
    found = run("mir_eval", TRAIN, "--evaluate", demo_bundle_path(), folder=tmp_path)
    assert found.returncode == 2
    assert found.stderr == "train_demo: mir_eval cannot be imported: pip install 'mt3-runtime[cpu,export]' mir_eval\n"


@pytest.mark.parametrize(
    "command",
    [
        ("transcribe", "CLIP", "--picture", "new.png"),
        ("transcribe", "CLIP", "--formats", "mid,png", "--output-dir", "new"),
        ("demo", "--output-dir", "new"),
        ("diff", "MIDI", "MIDI", "--picture", "new.png"),
    ],
)
def test_pictures(command, clip, tmp_path):
    """Before anything is transcribed or written."""
    files = {"CLIP": clip, "MIDI": clip.parent / "reference.mid"}
    found = run("PIL", "mt3-run", *(files.get(word, word) for word in command), folder=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "mt3-run: error: pictures need Pillow: pip install 'mt3-runtime[picture]'\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ImportError("cannot import name 'a'", name="mt3_export.b"), ImportError("no name")])
def test_faults_of_ours_are_none_of_the_users(error):
    with pytest.raises(ImportError) as caught, needing("export"):
        raise error
    assert caught.value is error


def test_a_broken_package_says_why():
    error = ImportError("libcudart.so.12: cannot open shared object file", name="torch._C")
    with pytest.raises(DependencyError) as caught, needing("export"):
        raise error
    reason = "libcudart.so.12: cannot open shared object file"
    assert str(caught.value) == f"torch._C cannot be imported ({reason}): pip install --force-reinstall torch"


def test_an_error_with_its_own_fix_is_left_alone():
    with pytest.raises(DependencyError, match="pip install it") as caught, needing("export"):
        raise DependencyError("it is missing: pip install it")
    assert caught.value.__cause__ is None
