"""The script for GPU machines, run whole on a GPU that is not there; and that it notices what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from gpu_checks import runner  # noqa: E402 -- the scripts are not a package of ours
from gpu_checks.peers import Decoder  # noqa: E402
from gpu_checks.plan import SIZES, Plan, Target  # noqa: E402
from gpu_checks.report import to_text  # noqa: E402

from mt3_runtime.bundle import demo_bundle_path  # noqa: E402
from mt3_runtime.errors import DependencyError, DeviceError  # noqa: E402
from mt3_runtime.gpu_probe import has_gpu  # noqa: E402
from mt3_runtime.trt import import_tensorrt  # noqa: E402

CHECKS = ("placement", "parity", "poisoned", "speed", "memory", "latency", "throughput")


@pytest.fixture(scope="module")
def plan():
    return Plan(bundle=str(demo_bundle_path()), device=0, **SIZES["fake"])


def test_the_whole_script_runs_without_a_gpu(tmp_path):
    command = [sys.executable, str(SCRIPTS / "gpu_check"), "--fake", "--output", str(tmp_path / "found.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    document = json.loads((tmp_path / "found.json").read_text())
    assert [(result["target"], result["check"], result["status"]) for result in document["results"]] == [
        *(("fake/fp32", check, "passed") for check in CHECKS),
        ("cpu", "torch", "passed"),
    ]
    found = {result["check"]: result for result in document["results"]}
    assert found["parity"]["rows_identical"] == found["parity"]["rows"] == 2
    assert found["poisoned"]["large"]
    assert found["poisoned"]["stale_nan"]
    assert set(found["speed"]["ms_per_step"]) == {"eager", "captured", "16 steps"}
    assert all(
        time > 0 for times in found["speed"]["ms_per_step"].values() for row in times.values() for time in row.values()
    )
    assert set(found["torch"]["ms_per_step"]) == {"eager", "static"}
    assert document["bundle_sha256"]
    assert "--fake" in document["command"]
    assert document["versions"]["onnxruntime"]
    assert run.stdout.strip() == to_text(document | {"command": document["command"]})
    assert "8 checks, 0 failed, 0 could not run here" in run.stdout


def broken(monkeypatch, fault):
    make = Target.make

    def made(self, plan, slots, **options):
        backend = make(self, plan, slots, **options)
        fault(backend)
        return backend

    monkeypatch.setattr(Target, "make", made)


def lose_a_token(backend):
    launch = backend.launch
    backend.launch = lambda positions, steps: launch(positions + (positions == 3), steps)


def see_one_too_many(backend):
    """Every row writes one place further, and sees a place that it never wrote."""
    launch = backend.launch
    backend.launch = lambda positions, steps: launch(positions + 1, steps)


@pytest.mark.parametrize(("check", "fault"), [("parity", lose_a_token), ("poisoned", see_one_too_many)])
def test_a_backend_that_is_wrong_fails(plan, monkeypatch, check, fault):
    assert runner.run_check(check, "fake/fp32", plan)["status"] == "passed"
    broken(monkeypatch, fault)
    assert runner.run_check(check, "fake/fp32", plan)["status"] == "failed"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DependencyError("no package: pip install it"), "skipped"),
        (DeviceError("no GPU: buy one"), "error"),
        (ZeroDivisionError("a fault\nof two lines"), "error"),
    ],
)
def test_a_check_that_cannot_run_stops_no_other(plan, monkeypatch, error, status):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Target, "make", fail)
    result = runner.run_check("parity", "fake/fp32", plan)
    assert result["status"] == status
    assert "\n" not in result["error"]


def test_a_process_that_dies_is_reported(plan, tmp_path):
    script = tmp_path / "script"
    script.write_text("import os, sys\nprint('half a line', file=sys.stderr, flush=True)\nos._exit(7)\n")
    result = runner.run_apart(str(script), "parity", "fake/fp32", plan)
    assert result == {"target": "fake/fp32", "check": "parity", "status": "error", "error": "exit code 7: half a line"}


def test_a_check_in_another_process_comes_back_whole(plan):
    result = runner.run_apart(str(SCRIPTS / "gpu_check"), "placement", "fake/fp32", plan)
    assert result["status"] == "passed"
    assert result["gpu"] == "fake"


def test_both_peers_decode_the_same_tokens(plan):
    model, found = plan.open().manifest.model, []
    for length in (None, 32):
        with torch.inference_mode():
            decoder = Decoder(model, 8, 3, length, "cpu")
            for _ in range(2):  # the second time over what the first one left
                decoder.reset()
                tokens = []
                for _ in range(12):
                    decoder.step()
                    tokens.append(decoder.token.tolist())
                found.append(tokens)
    assert found[0] == found[1] == found[2] == found[3]
    assert len({tuple(tokens) for tokens in found[0]}) > 4


def test_names_that_nothing_has_are_refused():
    command = [sys.executable, str(SCRIPTS / "gpu_check"), "--fake", "--checks", "parity,speeds"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "speeds is none of placement, parity" in run.stderr


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_engines_that_cannot_be_built_are_an_error_and_not_left_out(tmp_path):
    """TensorRT-RTX is there, the GPU to build for is not: of `skipped` nobody would take notice."""
    import_tensorrt("tensorrt-rtx")
    options = ["--bundle", str(demo_bundle_path()), "--targets", "tensorrt-rtx/fp32", "--checks", "parity"]
    command = [sys.executable, str(SCRIPTS / "gpu_check"), *options, "--output", str(tmp_path / "found.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 1
    [result] = json.loads((tmp_path / "found.json").read_text())["results"]
    assert (result["check"], result["status"]) == ("engines", "error")
    assert "libcuda.so.1" in result["error"]
