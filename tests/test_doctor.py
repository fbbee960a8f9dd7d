"""The doctor finds what is wrong, says how it is put right, and never raises on a broken installation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest

import mt3_runtime
from mt3_runtime.doctor import (
    CPU,
    CUDA,
    PROBE_GRAPH,
    PROCESS_BYTES,
    Diagnosis,
    Engine,
    check_bundle,
    check_engine,
    check_extras,
    check_imports,
    check_memory,
    check_processor,
    diagnose,
    memory_needed,
    probe_engine,
    probe_imports,
)
from mt3_runtime.errors import DeviceError
from mt3_runtime.findings import Finding
from mt3_runtime.machine import MIB, Machine
from mt3_runtime.manifest import FileRecord
from mt3_runtime.specs import FeatureSpec, ModelSpec

MT3 = ModelSpec(
    family="mt3", name="mt3", d_model=512, num_heads=6, d_kv=64, d_ff=1024, encoder_layers=8, decoder_layers=8,
    vocab_size=1536, position_base=255, max_length=1024, start_token=0, end_token=1,
)  # fmt: skip
MACHINE = Machine(
    system="Linux 6.1 x86_64", cpu_name="Some CPU", cpu_flags=("avx2", "fma"), allowed_cpus=8, physical_cores=4,
    cpu_quota=None, usable_cores=4, memory_total=16 << 30, memory_available=8 << 30, memory_limit=None,
)  # fmt: skip


def made_up(weights, other=0):
    """As much of a bundle as the memory estimate reads: MT3 with so many bytes of weights."""
    forms = [("encoder", "ort"), ("decode_step", "ort"), ("encoder", "tensorrt")]
    graphs = [SimpleNamespace(graph=g, lowering=form, file=f"{g}.{form}", weights="weights.bin") for g, form in forms]
    sizes = {"weights.bin": weights, "encoder.ort": 0, "decode_step.ort": 0, "encoder.tensorrt": other}
    files = {name: FileRecord(size, "0" * 64) for name, size in sizes.items()}
    features = FeatureSpec("ddsp", mel_norm=False)
    return SimpleNamespace(manifest=SimpleNamespace(model=MT3, features=features, graphs=graphs, files=files))


@pytest.fixture
def bundle(tiny_folder, tmp_path):
    """A copy of the tiny bundle, to be spoiled."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "bundle"))


def levels(findings):
    return [finding.level for finding in findings]


def worst(findings):
    return next(f for level in ("error", "warning", "ok") for f in findings if f.level == level)


def test_this_environment_is_healthy():
    diagnosis = diagnose()
    assert diagnosis.exit_code == 0, diagnosis.to_text()
    assert "error" not in levels(diagnosis.findings)
    assert CPU in diagnosis.providers
    assert diagnosis.packages["numpy"]


def test_probe_graph_is_one_identity_node():
    model = onnx.load_from_string(PROBE_GRAPH)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


def test_the_probe_runs_on_the_cpu_and_names_what_provides_it():
    engine = probe_engine()
    assert CPU in engine.started
    assert set(engine.started) <= set(engine.available) == set(onnxruntime.get_available_providers())
    assert "onnxruntime" in engine.distributions
    assert not engine.failure


def test_a_finding_that_is_not_ok_needs_a_fix():
    with pytest.raises(ValueError, match="names no fix"):
        Finding("error", "broken")


def test_imports_that_fail_are_errors_with_a_command(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("raise OSError('libsndfile.so:\\n not found')")
    monkeypatch.syspath_prepend(tmp_path)
    failures = probe_imports(("json", "half_installed", "never_installed"))
    assert set(failures) == {"half_installed", "never_installed"}
    findings = check_imports(failures)
    assert levels(findings) == ["error", "error"]
    assert findings[0].text == "half_installed cannot be imported: libsndfile.so: not found"
    assert findings[0].fix == "pip install --force-reinstall half_installed"
    assert levels(check_imports({})) == ["ok"]


ORT, ORT_GPU = "onnxruntime", "onnxruntime-gpu"


@pytest.mark.parametrize(
    ("engine", "nvidia", "level", "text", "fix"),
    [
        (Engine((), failure="No module"), False, "error", "not installed", '"mt3-runtime[cpu]"'),
        (Engine((), failure="No module"), True, "error", "not installed", '"mt3-runtime[cuda]"'),
        (Engine((ORT,), failure="no attribute"), False, "error", "no attribute", "pip uninstall -y onnxruntime &&"),
        (Engine((ORT,), (CPU,)), False, "error", "wrong result", "[cpu]"),
        (Engine((ORT, ORT_GPU), (CPU,), (CPU,)), False, "warning", "overwrite", "onnxruntime onnxruntime-gpu &&"),
        (Engine((ORT, ORT_GPU), failure="bad"), False, "error", "bad", "onnxruntime onnxruntime-gpu &&"),
        (Engine((ORT_GPU,), (CUDA, CPU), (CPU,)), False, "ok", "runs graphs on the CPU", ""),
        (Engine((ORT_GPU,), (CUDA, CPU), (CPU, CUDA)), True, "ok", "runs graphs", ""),
        (Engine((), (CPU,), (CPU,)), False, "ok", "unknown origin", ""),
    ],
)
def test_engine(engine, nvidia, level, text, fix):
    finding = worst(check_engine(engine, nvidia=nvidia))
    assert finding.level == level
    assert text in finding.text
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["ok"]),
        ({"cpu_quota": 2.0, "usable_cores": 2}, ["ok"]),
        ({"cpu_quota": 0.5, "usable_cores": 1}, ["warning"]),
        ({"cpu_flags": ("f16c",)}, ["ok", "warning"]),
        ({"cpu_flags": ()}, ["ok"]),
        ({"cpu_flags": ("asimddp",), "system": "Linux 6.1 aarch64"}, ["ok"]),
    ],
)
def test_processor(changes, expected):
    assert levels(check_processor(replace(MACHINE, **changes))) == expected


def test_extras():
    assert check_extras({"pillow": "11.0"}) == []
    assert check_extras({"pillow": None})[0].fix == 'pip install "mt3-runtime[picture]"'


def test_memory_needed_counts_weights_and_caches_once():
    """MT3 by hand: keys and values of 8 layers, 6 heads x 64, 1024 tokens and 256 frames, 4 bytes each."""
    cache = 2 * 8 * 384 * (1024 + 256) * 4
    assert cache == 31_457_280
    assert memory_needed(made_up(0), slots=0) == PROCESS_BYTES
    assert memory_needed(made_up(0), slots=2) == PROCESS_BYTES + 3 * cache
    assert memory_needed(made_up(100 * MIB, other=7 * MIB), slots=0) == PROCESS_BYTES + 150 * MIB


@pytest.mark.parametrize(("share", "level"), [(0.99, "error"), (1.01, "warning"), (1.24, "warning"), (1.26, "ok")])
def test_memory(share, level):
    finding = check_memory(int(memory_needed(made_up(MIB)) * share), made_up(MIB))[0]
    assert finding.level == level
    assert "with mt3" in finding.text


def test_memory_that_cannot_be_read_is_no_fault():
    assert levels(check_memory(None, made_up(MIB))) == ["ok"]
    assert "unknown" in check_memory(None, None)[0].text


def test_the_memory_estimate_covers_what_a_real_session_takes(tmp_path):
    """48 MiB of float32 weights: no less than measured, and no more than twice as much."""
    size, layers = 1024, 12
    path = tmp_path / "weights.onnx"
    values = [
        onnx.helper.make_tensor(f"w{i}", onnx.TensorProto.FLOAT, (size, size), b"\x3d" * (4 * size * size),
                                raw=True)
        for i in range(layers)
    ]  # fmt: skip
    nodes = [onnx.helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(layers)]
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])
        for name in ("h0", f"h{layers}")
    ]
    graph = onnx.helper.make_graph(nodes, "chain", ends[:1], ends[1:], values)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), path)
    code = (
        "import sys, numpy, onnxruntime, soundfile, soxr, pretty_midi\n"
        "from mt3_runtime.machine import peak_rss_mb\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        f"session.run(None, {{'h0': numpy.ones((8, {size}), 'float32')}})\n"
        "print(peak_rss_mb())"
    )
    measured = float(run(["-c", code, str(path)]).stdout) * MIB
    estimate = memory_needed(made_up(path.stat().st_size), slots=0)
    assert measured <= estimate <= 2 * measured


def test_bundle_that_is_well_starts(bundle):
    """The real loader, on the real files."""
    diagnosis = diagnose(bundle, start=mt3_runtime.load)
    assert diagnosis.exit_code == 0, diagnosis.to_text()
    assert f"bundle {bundle}: its graphs start" in diagnosis.to_text()
    assert "to transcribe with tiny" in diagnosis.to_text()


def test_every_file_of_a_bundle_is_looked_at(bundle):
    files = [path for path in bundle.iterdir() if path.name != "manifest.json"]
    assert len(files) >= 4
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        opened, findings = check_bundle(bundle, None)
        assert opened is None
        assert path.name in worst(findings).text
        assert worst(findings).fix
        path.write_bytes(whole)
    assert levels(check_bundle(bundle, None)[1]) == ["ok"]


@pytest.mark.parametrize(
    ("message", "text", "fix"),
    [
        ("the graph does not start: no such file: reinstall onnxruntime",
         "the graph does not start: no such file", "reinstall onnxruntime"),
        ("two\nlines: do this", "two lines", "do this"),
        ("no advice", "no advice", "export the bundle again"),
    ],
)  # fmt: skip
def test_bundle_that_does_not_start(bundle, message, text, fix):
    def start(path):
        assert path == bundle
        raise DeviceError(message)

    opened, findings = check_bundle(bundle, start)
    assert opened is None
    assert levels(findings) == ["ok", "error"]
    assert (findings[-1].text, findings[-1].fix) == (text, fix)


@pytest.mark.parametrize("name", ["", "missing", "x" * 300])
def test_folder_that_is_no_bundle(tmp_path, name):
    diagnosis = diagnose(tmp_path / name)
    assert diagnosis.exit_code == 1
    assert str(tmp_path) in worst(diagnosis.findings).text
    assert worst(diagnosis.findings).fix


def test_a_machine_too_small_for_the_bundle_is_an_error(bundle, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 65536 kB\nMemAvailable: 32768 kB\n")
    diagnosis = diagnose(bundle, root=tmp_path)
    assert diagnosis.exit_code == 1
    assert "32 MiB is available" in worst(diagnosis.findings).text


def make_diagnosis(*findings):
    return Diagnosis("0.1", "3.11", MACHINE, {"numpy": "2.4", "pillow": None}, (CPU,), None, findings)


def test_report_names_every_finding_and_fix_with_the_worst_last():
    text = make_diagnosis(
        Finding("error", "it is broken", "mend it"), Finding("ok", "fine"), Finding("warning", "slow", "hurry")
    ).to_text()
    parts = ["numpy 2.4", "Some CPU", "16.0 GiB", "fine", "slow", "hurry", "it is broken", "mend it", "errors: 1"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert "pillow" not in text
    assert max(map(len, text.splitlines())) < 120


def test_json_holds_everything():
    held = json.loads(make_diagnosis(Finding("warning", "slow", "hurry")).to_json())
    assert held["machine"]["physical_cores"] == 4
    assert held["findings"] == [{"level": "warning", "text": "slow", "fix": "hurry"}]
    assert held["packages"] == {"numpy": "2.4", "pillow": None}
    assert held["exit_code"] == 0


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("error", 1)])
def test_exit_code(level, code):
    assert make_diagnosis(Finding("ok", "x"), Finding(level, "x", "y")).exit_code == code


def run(arguments, path=None):
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True)


REPORT = (
    "import sys; from mt3_runtime.doctor import diagnose; "
    "diagnosis = diagnose(); print(diagnosis.to_text()); print(diagnosis.exit_code)"
)


def test_both_onnxruntimes_installed_is_noticed(tmp_path):
    """A second distribution that provides the same package, found by its own record."""
    folder = tmp_path / "onnxruntime_gpu-1.23.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.23.0\n")
    (folder / "RECORD").write_text("onnxruntime/__init__.py,,\n")
    report = run(["-c", REPORT], tmp_path).stdout
    assert "onnxruntime and onnxruntime-gpu overwrite each other's files" in report
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install" in report
    assert report.endswith("\n0\n")


@pytest.mark.parametrize(
    ("name", "source", "text", "why"),
    [
        ("onnxruntime", "raise ImportError('libonnxruntime.so.1: cannot open')", "onnxruntime does not work",
         "libonnxruntime.so.1: cannot open"),
        ("onnxruntime", "", "onnxruntime does not work", "has no attribute 'get_available_providers'"),
        ("soundfile", "raise OSError('sndfile library not found')", "soundfile cannot be imported",
         "sndfile library not found"),
        ("numpy", "raise ImportError('wrong platform')", "numpy cannot be imported", "wrong platform"),
    ],
)  # fmt: skip
def test_a_broken_package_is_a_finding_not_a_traceback(tmp_path, tiny_folder, name, source, text, why):
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text(source)
    code = (
        "import sys, mt3_runtime; from pathlib import Path; from mt3_runtime.doctor import diagnose\n"
        "start = lambda path: mt3_runtime.load(path)\n"
        "diagnosis = diagnose(Path(sys.argv[1]), start=start); print(diagnosis.to_text(), diagnosis.exit_code)"
    )
    done = run(["-c", code, str(tiny_folder)], tmp_path)
    assert f"error    {text}" in done.stdout
    assert why in done.stdout
    assert done.stdout.endswith(" 1\n")
    assert "mt3_runtime" not in done.stderr  # ONNX Runtime itself prints why it cannot have numpy
