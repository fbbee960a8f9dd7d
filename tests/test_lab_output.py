"""The folder of a run: one run at a time, no work lost when one is killed, nothing left where nothing was done."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bundle_cases import seal
from mt3_export.cli import main
from mt3_export.lab import bisections, child, command, speed
from mt3_export.lab.child import run_child
from mt3_export.lab.exported import export_once
from mt3_export.lab.folder import EXPORTED, IDENTITY, LOCK, alone_in, check_folder
from mt3_export.lab.job import Job
from mt3_export.lab.listening import Said
from mt3_export.lab.material import read_rows, save_rows
from mt3_export.lab.results import Speed, read_results, to_json
from mt3_export.lab.run import Options, find_all, open_laboratory, read_combination
from mt3_export.lab.variants import parse_variants
from mt3_export.lab.worker import run as run_job
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import OptionError, OutputError


def ignored(*_):
    pass


def run(bundle, audio, folder, *options):
    words = ["--audio", str(audio), "--output", str(folder), "--threads", "1"]
    return main(["precision", str(bundle), *words, *map(str, options)])


def options(bundle, audio, folder):
    return Options(bundle, (audio,), None, parse_variants(["fp32"]), ("cpu",), folder, threads=1)


def refused(capfd, *given):
    """The error of a run: its last words."""
    assert run(*given) == 2
    begin, text = capfd.readouterr().err.strip().splitlines()[-1].split("error: ", 1)
    assert begin == "mt3-export: "
    return text


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_is_refused_and_touches_nothing(musical_folder, audio, tmp_path, capfd):
    folder = tmp_path / "out"
    with alone_in(folder):
        (folder / IDENTITY).write_text("{}")
        (folder / "work").mkdir()
        (folder / "work" / "bundle").write_bytes(b"under way")
        before = content(folder)
        text = refused(capfd, musical_folder, audio, folder)
        assert text == f"another run is writing to {folder}: wait for it, or give another --output"
        assert content(folder) == before


def test_the_lock_goes_with_a_process_that_is_killed(tmp_path):
    folder = tmp_path / "out"
    script = (
        "import pathlib, sys, time; from mt3_export.lab.folder import alone_in\n"
        "with alone_in(pathlib.Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(OptionError, match="another run is writing"), alone_in(folder):
            pass
        process.kill()
        process.wait()
    assert [path.name for path in folder.iterdir()] == [LOCK]
    check_folder(folder)
    with alone_in(folder):
        pass
    assert list(folder.iterdir()) == []  # it was not this run that made the folder


def test_what_stays_empty_vanishes_and_nothing_else(tmp_path):
    with alone_in(tmp_path / "deep" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
    with alone_in(tmp_path / "deep" / "out"):
        (tmp_path / "deep" / "out" / "file").touch()
    assert list(tmp_path.rglob("*")) == [tmp_path / name for name in ("deep", "deep/out", "deep/out/file")]


def test_a_lock_that_was_removed_before_it_was_taken_is_none(tmp_path, monkeypatch):
    """Between opening the file and locking it, the run that held it may have ended."""
    folder, opened = tmp_path / "out", Path.open

    def open_and_lose(path, *arguments, **options):
        file = opened(path, *arguments, **options)
        path.unlink()
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_and_lose)
        with pytest.raises(OptionError, match="another run is writing"), alone_in(folder):
            pass


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="give another --output"), alone_in(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize(
    ("name", "words"), [("n" * 300, "the name is too long"), ("", "it is a folder"), ("/dev/null", "device")]
)
def test_a_plan_that_cannot_be_written_is_found_before_the_work(name, words, musical_folder, audio, tmp_path, capfd):
    options = ("--bisect", "int8", "--plan-output", tmp_path / name)
    assert words in refused(capfd, musical_folder, audio, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_plan_in_a_protected_folder_is_found_before_the_work(musical_folder, audio, tmp_path, capfd, monkeypatch):
    plan = tmp_path / "protected" / "plan.toml"
    plan.parent.mkdir()
    monkeypatch.setattr(bisections.os, "access", lambda path, mode, **_: Path(path) != plan.parent)
    options = ("--bisect", "int8", "--plan-output", plan)
    assert "write-protected" in refused(capfd, musical_folder, audio, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_plan_that_could_not_be_written_is_an_error_and_the_bisection_stays(
    musical_folder, audio, tmp_path, capfd, monkeypatch
):
    """Its folder vanishes meanwhile."""
    folder, plan = tmp_path / "out", tmp_path / "plans" / "plan.toml"
    plan.parent.mkdir()
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(command, "_read_references", lambda *_: plan.parent.rmdir())
    options = ("--precisions", "fp32", "--bisect", "w8", "--plan-output", plan)
    assert "create the folder first" in refused(capfd, musical_folder, audio, folder, *options)
    results = read_results(folder / "results.json")
    assert [(found.precision, found.plan) for found in results.bisections] == [("w8", "not written")]
    assert results.combinations[0].speed is not None  # the rest was finished
    plan.parent.mkdir()
    monkeypatch.undo()
    assert run(musical_folder, audio, folder, *options) == 0
    assert "bisection of w8: kept from an earlier run" in capfd.readouterr().err
    assert plan.is_file()
    assert read_results(folder / "results.json").bisections[0].plan == plan.name


def test_what_fp32_said_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "fp32-cpu.rows.npz"
    save_rows(path, [[Said(0, 0, np.arange(3, dtype=np.int32), "ended", fell_back=False, is_silent=False)]])
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        save_rows(path, [])
    assert content(tmp_path) == {Path(path.name): before}
    [[said]] = read_rows(path, 1)
    assert said.tokens.tolist() == [0, 1, 2]


def test_damaged_files_of_fp32_are_made_again(musical_folder, audio, tmp_path):
    asked = options(musical_folder, audio, tmp_path / "out")
    job = open_laboratory(asked, find_all(asked), open_bundle(musical_folder), ignored).jobs[0]
    found = run_job(job, ignored)
    assert found.outcome == "done"
    job.result.write_bytes(to_json(replace(found, speed=Speed(1.0, 1.0, 1.0, 1.0, 1, 1.0, 1.0, 1.0))))
    assert read_combination(job)
    for path in (job.reference_rows, job.reference_notes):
        whole = path.read_bytes()
        for damaged in (whole[:-7], b"", b"[]", whole[: len(whole) // 2] + b"\x00\x07" + whole[len(whole) // 2 :]):
            path.write_bytes(damaged)
            assert read_combination(job) is None, (path.name, damaged[:9])
        path.write_bytes(whole)
        assert read_combination(job)


def test_a_folder_of_a_killed_export_is_gone_on_in(tiny_checkpoint, tmp_path, monkeypatch):
    """What a process that has the time cleans up is looked at before it does."""
    folder, killed = tmp_path / "out", tmp_path / "killed"

    def leftovers(path):
        return [each.name for each in path.glob(".bundle.*.partial")]

    def interrupted(*_, **__):
        if not killed.exists():
            shutil.copytree(folder, killed)
        seen.append(leftovers(folder))
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr("mt3_export.bundle_writer._write_graphs", interrupted)
    with pytest.raises(KeyboardInterrupt), alone_in(folder):
        export_once(tiny_checkpoint, folder, gpus=False)
    (killed / ".mt3-0123456789abcdef.tmp").touch()
    assert [leftovers(killed)] == seen
    check_folder(killed)
    folder = killed
    with pytest.raises(KeyboardInterrupt), alone_in(folder):
        export_once(tiny_checkpoint, folder, gpus=False)
    assert [len(names) for names in seen] == [1, 1]  # the other export's is gone
    assert seen[0] != seen[1]
    (killed / ".bundle.mine.partial").touch()
    with pytest.raises(OptionError, match="no folder of results"):
        check_folder(killed)


def test_a_run_killed_before_its_first_result_is_resumed(musical_folder, audio, tmp_path, monkeypatch):
    asked, bundle = options(musical_folder, audio, tmp_path / "out"), open_bundle(musical_folder)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mt3_export.lab.folder.atomic_write", killed)
        with pytest.raises(KeyboardInterrupt):
            open_laboratory(asked, find_all(asked), bundle, ignored)
    check_folder(asked.output)
    open_laboratory(asked, find_all(asked), bundle, ignored)
    assert {path.name for path in asked.output.iterdir()} == {IDENTITY, "combinations"}


def test_a_bundle_of_other_random_weights_is_not_taken(tiny_folder, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / EXPORTED)
    assert export_once(tiny_checkpoint, tmp_path, gpus=False) == tmp_path / EXPORTED
    with pytest.raises(OptionError, match="is of another checkpoint than random:8"):
        export_once(replace(tiny_checkpoint, source="random:8"), tmp_path, gpus=False)


def test_a_bundle_of_a_file_is_known_by_its_content(tiny_folder, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / EXPORTED)
    manifest = json.loads((tmp_path / EXPORTED / "manifest.json").read_bytes())
    manifest["origin"] |= {"checkpoint": "a.pth", "checkpoint_sha256": "0" * 64}
    (tmp_path / EXPORTED / "manifest.json").write_bytes(seal(manifest))
    renamed = replace(tiny_checkpoint, source="b.pth", sha256="0" * 64)
    assert export_once(renamed, tmp_path, gpus=False) == tmp_path / EXPORTED
    for other in (replace(renamed, source="a.pth", sha256="1" * 64), tiny_checkpoint):
        with pytest.raises(OptionError, match="is of another checkpoint"):
            export_once(other, tmp_path, gpus=False)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """Here no file may have a byte, which stops logs as well."""
    script = (
        "import resource, sys; from mt3_export.lab.worker import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); sys.exit(main())"
    )
    monkeypatch.setattr(child, "WORKER", [sys.executable, "-c", script])
    job = Job(str(tmp_path / "none"), "fp32", "cpu", "", str(tmp_path), (), (), None, 1, 1)
    job.results.mkdir()
    found = run_child(job, ignored)
    assert found.outcome == "failed"
    words = f"cannot write '{job.result}': the file would exceed the size limit: raise the limit or choose another disk"
    assert found.problem == f"its process ended with exit code 1 ({words[:300]}): see fp32-cpu.log"
    job.result.with_suffix(".log").unlink()
    job.results.rmdir()
    with pytest.raises(OutputError, match=r"fp32-cpu.log .*: free some space or give another --output"):
        run_child(job, ignored)
