"""From the start of a process to its result: files read once, imports in time, memory that does not grow."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from bundle_cases import copied, refusal
from mt3_runtime import bundle as bundles
from mt3_runtime.backends import sessions
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.backends.sessions import open_session, open_sessions, session_options
from mt3_runtime.bundle import open_bundle
from mt3_runtime.graphs import GRAPH_NAMES

SCRIPT = Path(__file__).parent.parent / "scripts" / "cold_start"
WEIGHTS = "weights.fp32.bin"
SLOW = ("pretty_midi", "mido", "soundfile", "soxr", "importlib.metadata", "PIL", "tqdm")


def entries(bundle):
    return [bundle.graph(name, "ort", "fp32") for name in GRAPH_NAMES]


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_every_file_is_read_once_and_before_any_engine_starts(tiny_bundle, monkeypatch):
    order = []

    def blocks(folder, name):
        order.append(name)
        return real_blocks(folder, name)

    def engine(*arguments, **options):
        order.append("engine")
        return real_engine(*arguments, **options)

    real_blocks, real_engine = bundles._blocks, onnxruntime.InferenceSession
    monkeypatch.setattr(bundles, "_blocks", blocks)
    monkeypatch.setattr(onnxruntime, "InferenceSession", engine)
    OrtBackend(tiny_bundle, slots=1, threads=2)
    files = sorted([WEIGHTS, *(f"{name}.fp32.ort.onnx" for name in GRAPH_NAMES)])
    assert sorted(order[: len(files)]) == files
    assert order[len(files) :] == ["engine"] * len(GRAPH_NAMES)


@pytest.mark.parametrize("name", [WEIGHTS, *(f"{name}.fp32.ort.onnx" for name in GRAPH_NAMES)])
def test_no_engine_starts_where_one_file_is_damaged(tiny_folder, tmp_path, monkeypatch, name):
    started = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: started.append(1))
    folder = copied(tiny_folder, tmp_path / "tiny")
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 3] ^= 16
    (folder / name).write_bytes(damaged)
    opened = open_bundle(folder)
    assert "not what the manifest lists" in refusal(lambda: OrtBackend(opened, slots=1, threads=2))
    assert not started


def test_of_sessions_made_side_by_side_one_may_fail(tiny_bundle, monkeypatch):
    def engine(text, *arguments, **options):
        if hashlib.sha256(text).hexdigest() == refused:
            raise RuntimeError("first line\nsecond line")
        return real(text, *arguments, **options)

    real, refused = onnxruntime.InferenceSession, tiny_bundle.manifest.files["cross_kv.fp32.ort.onnx"].sha256
    monkeypatch.setattr(onnxruntime, "InferenceSession", engine)
    message = refusal(lambda: open_sessions(tiny_bundle, entries(tiny_bundle), threads=3))
    assert message.startswith("ONNX Runtime cannot load cross_kv.fp32.ort.onnx of ")
    assert message.endswith(" (first line): export again")


def test_sessions_made_side_by_side_compute_what_single_ones_do(tiny_bundle):
    together = open_sessions(tiny_bundle, entries(tiny_bundle), threads=2)
    assert list(together) == list(GRAPH_NAMES)
    features = np.random.default_rng(0).standard_normal((2, 256, 512), dtype=np.float32)
    given = {"features": features}
    for entry in entries(tiny_bundle)[:2]:
        alone = open_session(tiny_bundle, entry, threads=2).run(None, given)
        found = together[entry.graph].run(None, given)
        assert all(np.array_equal(*pair) for pair in zip(alone, found, strict=True))
        given = {"states": found[0][:, 0]}


@pytest.mark.parametrize("spins", [True, False])
def test_workers_spin_where_the_machine_allows_it_and_not_for_long(tiny_bundle, monkeypatch, spins):
    asked = []
    monkeypatch.setattr(sessions, "may_spin", lambda threads: asked.append(threads) or spins)
    options = session_options(tiny_bundle, 3)
    assert asked == [3]
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spins))
    assert 0 < int(options.get_session_config_entry("session.intra_op.spin_duration_us")) <= 2000
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)


def test_what_comes_after_the_model_is_imported_while_it_is_made(tiny_folder):
    code = (
        "import sys, mt3_runtime.loading\n"
        f"slow = {SLOW}\n"
        "print([name for name in slow if name in sys.modules])\n"
        "mt3_runtime.loading.load(sys.argv[1], 'cpu')\n"
        "print([name for name in slow if name in sys.modules])"
    )
    before, after = run(code, tiny_folder).splitlines()
    assert before == "[]"
    assert after == "['pretty_midi', 'mido', 'soundfile', 'soxr', 'importlib.metadata']"


def test_the_commands_are_listed_without_numpy():
    assert run("import sys, mt3_runtime.cli; print('numpy' in sys.modules)") == "False"


def test_a_shape_that_comes_again_costs_no_memory(tiny_folder):
    """64 segments of the tiny network take 33 MB; with plans of shapes, the second time takes 23 MB more."""
    code = (
        "import sys, numpy as np\n"
        "from mt3_runtime.backends.ort import OrtBackend\n"
        "from mt3_runtime.bundle import open_bundle\n"
        "from mt3_runtime.machine import peak_rss_mb\n"
        "backend = OrtBackend(open_bundle(sys.argv[1]), slots=1, threads=1)\n"
        "features, peaks = np.ones((64, 256, 512), np.float32), [peak_rss_mb()]\n"
        "for _ in range(3):\n"
        "    backend.encode(features)\n"
        "    peaks.append(peak_rss_mb())\n"
        "print(*peaks)"
    )
    loaded, first, *later = map(float, run(code, tiny_folder).split())
    assert first - loaded > 25
    assert max(later) - first < 5


def test_the_script_times_processes_that_end_by_their_limit(tiny_folder):
    before = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    command = [sys.executable, str(SCRIPT), "--bundle", str(tiny_folder), "--steps", "5", "--rounds", "2", "--json"]
    done = subprocess.run([*command, "--", "--threads", "1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert len(found["rounds"]) == 2
    for each in (found["medians"], *found["rounds"]):
        stages = [each[f"{name}_s"] for name in ("read", "features", "encode", "decode", "notes")]
        assert min(stages) >= 0
        assert each["start_s"] == pytest.approx(each["wall_s"] - sum(stages), abs=0.2)
        assert 0 < each["start_s"] < each["wall_s"]
        assert 30 < each["peak_rss_mb"] < 400
    assert found["medians"]["full_peak_rss_mb"] == pytest.approx(
        found["medians"]["peak_rss_mb"], rel=0.2
    )  # tiny caches
    assert {path.name: path.read_bytes() for path in tiny_folder.iterdir()} == before
    assert not [path for path in tiny_folder.parent.iterdir() if path.name.startswith("tmp")]


def test_the_script_says_what_is_wrong(tmp_path):
    command = [sys.executable, str(SCRIPT), "--bundle", str(tmp_path / "none"), "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("scripts/cold_start: ")
    assert done.stderr.rstrip().endswith("does not exist: name a folder made by mt3-export bundle")
