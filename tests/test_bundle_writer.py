"""A bundle is written whole or not at all, and the same one every time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import pytest

from bundle_cases import check_all
from conftest import TINY_FEATURES, TINY_MODEL
from fast_export import FastExport
from mt3_export import bundle_folder, bundle_writer
from mt3_export.bundle_folder import check_output
from mt3_export.onnx_graph import _check_contract
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import BundleError, OptionError, OutputError
from mt3_runtime.graphs import graph_specs
from mt3_runtime.vocabulary import Vocabulary

TESTS = Path(__file__).parent
SPECS = graph_specs(TINY_MODEL, TINY_FEATURES)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def fast(tiny_folder):
    return FastExport(tiny_folder)


@pytest.fixture
def place(tiny_folder, tmp_path):
    """A folder that holds a bundle already."""
    shutil.copytree(tiny_folder, tmp_path / "place" / "old")
    return tmp_path / "place"


@pytest.fixture(scope="module")
def disturbed(tiny_folder):
    """What killed_exports.py reports, from a folder that other users can reach; KILLS=500 picks more points."""
    with tempfile.TemporaryDirectory() as work:
        Path(work).chmod(0o755)
        command = [sys.executable, TESTS / "killed_exports.py", tiny_folder, work, os.environ.get("KILLS", "12")]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600).stdout)


def test_what_is_written(fast, tmp_path, tiny_folder):
    assert fast(tmp_path / "new") == tmp_path / "new"
    assert contents(tmp_path / "new") == contents(tiny_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    check_all(tmp_path / "new")


def test_permissions_follow_the_umask(fast, tmp_path):
    before = os.umask(0o027)
    try:
        fast(tmp_path / "new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o640}


def test_killed_at_every_call_on_the_file_system(disturbed):
    left = disturbed["events"]
    assert set(left) == {"nothing", "leftover", "whole", "at the end: whole"}
    assert left["leftover"] > 30


@pytest.mark.parametrize("places", ["lines", "moments"])
def test_killed_wherever_chance_wants(disturbed, places):
    assert set(disturbed[places]) <= {"nothing", "leftover", "whole"}
    assert sum(disturbed[places].values()) >= 12


def test_a_writer_that_does_not_rename_is_caught(disturbed):
    """The planted fault: files are written where the bundle is to be."""
    assert disturbed["planted"]["broken"] >= 12


def test_out_of_room(disturbed):
    assert len(disturbed["room"]) >= 10
    for _, message, left in disturbed["room"]:
        assert message.startswith("OutputError: cannot write ")
        assert message.endswith("new (File too large): free some space or choose another --output")
        assert left == "nothing"


def test_a_write_protected_folder(disturbed):
    message, left = disturbed["protected"]
    assert message.endswith("new (Permission denied): free some space or choose another --output")
    assert left == "nothing"


def failing(real, code, after):
    """`real`, until it has been called `after` times."""
    calls = 0

    def replacement(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    return replacement


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (Path, "mkdir", 0),
        (Path, "open", 0),
        (Path, "write_bytes", 0),
        (Path, "write_bytes", 5),
        (Path, "write_bytes", 6),
        (os, "fsync", 0),
        (os, "fsync", 8),
        (Path, "rename", 0),
    ],
)
def test_failing_disks(fast, place, monkeypatch, tiny_folder, owner, name, after, code):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), code, after))
        with pytest.raises(OutputError) as caught:
            fast(place / "new")
    assert str(caught.value) == (
        f"cannot write {place / 'new'} ({os.strerror(code)}): free some space or choose another --output"
    )
    assert [path.name for path in place.iterdir()] == ["old"]
    assert contents(place / "old") == contents(tiny_folder)


def test_a_folder_that_cannot_be_synced_is_no_failure(fast, place, monkeypatch, tiny_folder):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, errno.EINVAL, 9))  # eight files, their folder; the parent fails
        fast(place / "new")
    assert contents(place / "new") == contents(tiny_folder)


def test_a_file_system_without_locks_is_no_failure(fast, place, monkeypatch, tiny_folder):
    monkeypatch.setattr(bundle_folder.fcntl, "flock", failing(None, errno.ENOLCK, 0))
    (place / ".new.0123456789ab.partial").mkdir()
    fast(place / "new")
    assert contents(place / "new") == contents(tiny_folder)
    assert (place / ".new.0123456789ab.partial").exists()  # nobody can say whether it is still being written


def test_everything_is_on_the_disk_before_the_name_is(fast, place, monkeypatch):
    steps = []
    real_sync, real_rename = os.fsync, Path.rename

    def synced(descriptor):
        steps.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real_sync(descriptor)

    def renamed(path, target):
        steps.append(f"-> {target}")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    fast(place / "new")
    *before, folder, rename, parent = steps
    assert sorted(Path(path).name for path in before) == sorted(contents(place / "new"))
    assert folder.endswith(".partial")
    assert rename == f"-> {place / 'new'}"
    assert parent == str(place)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, BundleError("planted")])
def test_interrupted(fast, place, monkeypatch, error):
    def interrupt(*_):
        raise error

    monkeypatch.setattr(bundle_folder, "_record", interrupt)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        fast(place / "new")
    assert [path.name for path in place.iterdir()] == ["old"]


def make_file(path):
    path.write_bytes(b"mine")


def make_folder(path):
    path.mkdir()


def make_dangling(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [make_file, make_folder, make_dangling, os.mkfifo])
def test_what_exists_is_not_touched(fast, place, make):
    make(place / "new")
    before = (place / "new").lstat()
    with pytest.raises(OutputError, match="exists already: remove it, or choose another --output"):
        fast(place / "new")
    assert (place / "new").lstat() == before
    assert sorted(path.name for path in place.iterdir()) == ["new", "old"]


def test_the_old_bundle_is_not_replaced(fast, place, tiny_folder):
    with pytest.raises(OutputError, match="exists already"):
        fast(place / "old")
    assert contents(place / "old") == contents(tiny_folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere/new", "does not exist: create it"),
        ("old/manifest.json/new", "does not exist: create it"),
        ("n" * 250, "File name too long"),
        ("n" * 300, "File name too long"),
        ("loop/new", "does not exist: create it|symbolic links"),
    ],
)
def test_places_that_cannot_be_written(fast, place, name, why):
    (place / "loop").symlink_to("loop")
    before = sorted(path.name for path in place.iterdir())
    with pytest.raises(OutputError, match=why):
        fast(place / name)
    if len(name) != 250:  # the name of the folder itself would do
        with pytest.raises(OutputError, match=why):
            check_output(place / name)
    assert sorted(path.name for path in place.iterdir()) == before


def test_only_the_leftovers_of_the_same_name_are_removed(fast, place):
    gone = [".[a]*.0123456789ab.partial", ".[a]*.ffffffffffff.partial"]
    kept = [
        ".a*.0123456789ab.partial",  # what a pattern would match
        ".[a]*.x.0123456789ab.partial",
        ".[a]*.0123456789ab.partial.x",
        ".[a]*.0123456789aX.partial",
        ".[a]*.partial",
    ]
    for name in gone + kept:
        (place / name / "deep").mkdir(parents=True)
    (place / ".[a]*.aaaaaaaaaaaa.partial").symlink_to("old")
    fast(place / "[a]*")
    left = {path.name for path in place.iterdir()}
    assert left == {*kept, "old", "[a]*", ".[a]*.aaaaaaaaaaaa.partial"}
    check_all(place / "old")


def test_of_two_exports_at_once_one_wins(fast, place, tiny_folder):
    """The second does not take the first's folder for a leftover; the first does not replace what the second wrote."""

    def second(folder):
        (folder / "mine").write_bytes(b"")
        fast(place / "new")
        assert contents(folder) == {"mine": b""}
        assert contents(place / "new") == contents(tiny_folder)

    def first():
        with bundle_folder.new_folder(place / "new") as folder:
            second(folder)

    with pytest.raises(OutputError, match="Directory not empty"):
        first()
    assert contents(place / "new") == contents(tiny_folder)
    assert sorted(path.name for path in place.iterdir()) == ["new", "old"]


def test_a_notice_of_any_length_that_fits(fast, place):
    fast(place / "new", notice="n" * 50_000)
    assert open_bundle(place / "new").manifest.origin.notice == "n" * 50_000
    with pytest.raises(BundleError, match="more than 65536: shorten the notice"):
        fast(place / "other", notice="n" * 65_000)
    assert sorted(path.name for path in place.iterdir()) == ["new", "old"]


@pytest.mark.parametrize("notice", ["n" * 65_535, "\N{EIGHTH NOTE}" * 11_000])
def test_a_notice_that_no_manifest_holds_is_refused_before_the_work(fast, place, monkeypatch, notice):
    with monkeypatch.context() as patch:
        patch.setattr(bundle_writer, "_write_graphs", None)
        with pytest.raises(OptionError, match="a manifest at most 65536: shorten the notice"):
            bundle_writer.export_bundle(fast.checkpoint, place / "new", notice=notice)
    assert [path.name for path in place.iterdir()] == ["old"]


@pytest.mark.parametrize("notice", ["two\nlines", "\x1b[31mred", "\udc80", "tab\t"])
def test_a_notice_that_a_terminal_would_act_on(fast, place, notice):
    with pytest.raises(OptionError, match="give one line of text"):
        fast(place / "new", notice=notice)
    assert [path.name for path in place.iterdir()] == ["old"]


@pytest.mark.parametrize("name", ["\x1b[2Jweights.pth", "two\nlines.pth", "\udcff.pth"])
def test_odd_names_of_checkpoints_are_spelled_out(fast, place, monkeypatch, name):
    monkeypatch.setattr(fast, "checkpoint", replace(fast.checkpoint, source=name))
    fast(place / "new")
    assert open_bundle(place / "new").manifest.origin.checkpoint == ascii(name)


def test_what_no_runtime_would_read_is_not_written(fast, place, monkeypatch):
    odd = replace(fast.checkpoint, features=replace(TINY_FEATURES, f_min=20))  # written as 20, read as 20.0
    monkeypatch.setattr(fast, "checkpoint", odd)
    with pytest.raises(BundleError):
        fast(place / "new")
    assert [path.name for path in place.iterdir()] == ["old"]


def renamed(tensor):
    return replace(tensor, name=f"{tensor.name}x")


def retyped(tensor):
    return replace(tensor, dtype={"float32": "int32", "int32": "float32"}[tensor.dtype])


def resized(tensor):
    return replace(tensor, shape=(*tensor.shape[:-1], 7))


def freed(tensor):
    return replace(tensor, shape=("free", *tensor.shape[1:]))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("change", [renamed, retyped, resized, freed])
def test_graphs_that_do_not_keep_their_contract(tiny_folder, name, change):
    graph, spec = ir.load(tiny_folder / f"{name}.fp32.ort.onnx").graph, SPECS[name]
    _check_contract(graph, spec)
    for side in ("inputs", "outputs"):
        tensors = getattr(spec, side)
        for index, tensor in enumerate(tensors):
            other = (*tensors[:index], change(tensor), *tensors[index + 1 :])
            with pytest.raises(BundleError, match=f"{name} was traced with"):
                _check_contract(graph, replace(spec, **{side: other}))
        for other in (tensors[1:], (*tensors, tensors[0]), ()):
            with pytest.raises(BundleError, match=f"{name} was traced with"):
                _check_contract(graph, replace(spec, **{side: other}))


@pytest.mark.skipif("CI" not in os.environ, reason="traces everything again, 15 s: set CI=1")
def test_a_second_export_is_the_same_to_the_byte(tiny_folder, tmp_path):
    """In another process, with another hash seed."""
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, TESTS / "export_again.py", tmp_path / "tiny"], env=environment, check=True)
    assert contents(tmp_path / "tiny") == contents(tiny_folder)


def test_each_family_has_its_vocabulary():
    """YourMT3: as many shifts as a segment has steps, where MT3 has 1001; its tokens are all of its head's."""
    for family, samples, head, count in (
        ("mt3", 2_048, 1_536, 1_391), ("yourmt3", 32_767, 596, 596), ("yourmt3", 65_535, 801, 801),
        ("yourmt3", 2_048, 40, 596), ("yourmt3", 65_535, 596, 596),
    ):  # fmt: skip
        model = SimpleNamespace(family=family, vocab_size=head)
        features = SimpleNamespace(segment_samples=samples, sample_rate=16_000)
        assert len(Vocabulary(bundle_writer.vocabulary_of(model, features))) == count
    with pytest.raises(BundleError, match=r"a head of 700 tokens is none of YourMT3's, 596 or 801: use another"):
        bundle_writer.vocabulary_of(
            SimpleNamespace(family="yourmt3", vocab_size=700),
            SimpleNamespace(segment_samples=65_535, sample_rate=16_000),
        )


@pytest.mark.parametrize("name", ["a\nb", "\udcff", "n" * 201])
def test_names_that_are_none_are_refused_before_any_work(tiny_checkpoint, tmp_path, name):
    odd = replace(tiny_checkpoint, model=replace(TINY_MODEL, name=name))
    with pytest.raises(OptionError, match=r"which is no name: give another one by --name$"):
        bundle_writer.export_bundle(odd, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_heads_that_no_backend_runs_are_refused_before_any_work(tiny_checkpoint, tmp_path):
    odd = replace(tiny_checkpoint, model=replace(TINY_MODEL, num_heads=8, d_kv=4))
    with pytest.raises(BundleError, match="heads of width 4 are no multiple of 8"):
        bundle_writer.export_bundle(odd, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
