"""Speeds of the machine as scripts/roofline measures them, and the script as a whole, in sizes that mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from roofline_parts import memory, products  # noqa: E402 -- the scripts are not a package of ours
from roofline_parts.report import to_text  # noqa: E402

from mt3_runtime.bundle import demo_bundle_path, open_bundle  # noqa: E402


def test_buffers_are_read_and_copied_whole():
    measured = memory.Memory(2, 1 << 20)
    assert set(measured.reads()) == set(memory.READS)
    assert all(rate > 0 for rate in [*measured.reads().values(), *measured.copies().values()])
    sizes = [sum(part.nbytes for part in parts) for parts in (measured._source, measured._target)]
    assert sizes == [1 << 20, 1 << 20]
    measured._target[1][:] = 0
    measured.copies()
    assert np.array_equal(np.concatenate(measured._target), np.full(1 << 17, 1.5))
    measured.close()


def test_buffers_are_far_larger_than_the_largest_cache(tmp_path, monkeypatch):
    for index, size in enumerate(["32K", "2048K", "96M", "nonsense"]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    assert memory.largest_cache(tmp_path) == 96 << 20
    assert memory.largest_cache(tmp_path / "none") == memory.UNKNOWN_CACHE
    free = 1 << 40
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    assert memory.buffer_bytes(96 << 20) == 6 * 96 << 20
    assert memory.buffer_bytes(1 << 20) == memory.LEAST
    free = 600
    assert memory.buffer_bytes(1 << 20) == 100


def test_peaks_are_of_every_kind_of_product():
    found = products.Products(1, products.ProductSizes(((8, 64, 64), (4, 32, 32)), (1, 64, 64)))
    assert set(found.peaks()) == {"MatMul", "DynamicQuantizeMatMul", "MatMulNBits of 8 bits", "MatMulNBits of 4 bits"}
    assert all(rate > 0 for rate in found.peaks().values())
    size = 64 * 64 * 4
    assert list(found.reads(size)) == [products.ONE_ROW]
    assert found.reads(size)[products.ONE_ROW] > 0
    assert found.reads(size + 1) == {}


# ---- the script -----------------------------------------------------------------------------------------------------


def test_the_whole_script(tmp_path):
    target = tmp_path / "roof.json"
    options = ["--bundle", demo_bundle_path(), "--rows", "3,1", "--rounds", "1", "--threads", "1", "--json", target]
    command = [sys.executable, SCRIPTS / "roofline", "--quick", *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    document = json.loads(target.read_text())
    assert run.stdout.strip() == to_text(document)
    names = [(entry["graph"], entry["count"]) for entry in document["graphs"]]
    assert names == [("encoder", 1), ("cross_kv", 1), ("decode_step", 1), ("decode_step", 3)]
    speeds = document["speeds"]
    assert all(speeds[name] == max(ways.values()) for name, ways in document["ways"].items())
    for entry in document["graphs"]:
        moved = (entry["weight_bytes"] + entry["read_bytes"]) / speeds["read"] + entry["written_bytes"] / speeds["copy"]
        floor = 1e3 * max(moved, entry["operations"]["fp32"] / speeds["fp32"])
        assert entry["floor_ms"] == pytest.approx(floor, rel=1e-9)
        assert entry["ratio"] == pytest.approx(entry["measured_ms"] / floor, rel=1e-9)
        assert sum(entry["nodes"].values()) > 10
    assert (document["precision"], document["threads"], document["quick"]) == ("fp32", 1, True)
    assert document["versions"]["onnxruntime"] == onnxruntime.__version__
    assert document["bundle_sha256"] == open_bundle(demo_bundle_path()).sha256
    assert "--quick" in document["command"]
    assert list(tmp_path.iterdir()) == [target]  # no profile is left


@pytest.fixture
def script(monkeypatch, capsys):
    """The script in this process: exit code, what it printed, lines of standard error."""
    loader = SourceFileLoader("roofline_script", str(SCRIPTS / "roofline"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["roofline", *map(str, options)])
        code = module.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    run.module = module
    return run


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (("--rows", "0"), "give one such as 1,8"),
        (("--rows", "1,x"), "give one such as 1,8"),
        (("--rows", ""), "give one such as 1,8"),
        (("--position", "-1"), "give one of these"),
        (("--position", "999999"), "give one of these"),
        (("--rounds", "0"), "give a larger one"),
        (("--threads", "0"), "give a larger one"),
        (("--precision", "int8"), "make it with mt3-export quantize --precision int8"),
        (("--precision", "bf16"), "make it with mt3-export bundle --precision fp32,bf16"),
        (("--bundle", "nowhere"), "name a folder made by mt3-export bundle"),
    ],
)
def test_mistakes_are_one_line(script, options, fix):
    code, out, lines = script("--quick", "--bundle", demo_bundle_path(), *options)
    assert (code, out) == (2, "")
    assert lines[-1].startswith("roofline: error: ")
    assert lines[-1].endswith(f": {fix}")


def test_what_to_install_is_said(script, monkeypatch):
    monkeypatch.setattr(script.module, "find_spec", lambda name: None if name == "onnx" else name)
    code, _, lines = script("--bundle", demo_bundle_path())
    assert code == 2
    assert lines == ["roofline: error: onnx cannot be imported: pip install 'mt3-runtime[cpu,export]'"]
