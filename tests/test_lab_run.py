"""The whole command: what it finds and writes; that it goes on where it was; that one failure stops nothing else."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mir_eval
import numpy as np
import pytest
import soundfile

from bundle_cases import check_message
from mt3_export.cli import main
from mt3_export.lab import child
from mt3_export.lab.bisection import HARMLESS, LEFT
from mt3_export.lab.clips import read_notes
from mt3_export.lab.job import Job, Sound, read_job
from mt3_export.lab.results import read_results, to_json
from mt3_export.lab.run import Options, find_all, measure, open_laboratory, read_combination
from mt3_export.lab.size import bytes_read
from mt3_export.lab.variants import VARIANTS, parse_variants
from mt3_export.mixed_plan import read_plan
from mt3_export.quantize_bundle import quantize_bundle
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import BundleError, DeviceError, OptionError
from mt3_runtime.loading import load
from mt3_runtime.midi import write_midi
from mt3_runtime.midi_reading import read_midi

SECONDS = 3.0
RATE = 16_000


@pytest.fixture(scope="module")
def clips(musical_folder, tmp_path_factory):
    """Two clips of noise, and as their reference two thirds of what fp32 hears in them."""
    folder = tmp_path_factory.mktemp("clips")
    transcriber = load(musical_folder, "cpu")
    for name, seed in (("a", 1), ("deeper/b", 2)):
        audio = (folder / "audio" / name).with_suffix(".flac")
        audio.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(audio, np.random.default_rng(seed).normal(0, 0.1, int(SECONDS * RATE)), RATE)
        midi = (folder / "midi" / name).with_suffix(".mid")
        midi.parent.mkdir(parents=True, exist_ok=True)
        write_midi([note for i, note in enumerate(transcriber.transcribe(audio).notes) if i % 3], midi)
    return folder


@pytest.fixture(scope="module")
def output(musical_folder, clips, tmp_path_factory):
    """What one run left: read it, never change it."""
    folder = tmp_path_factory.mktemp("lab") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mt3-export", "precision", "..."])
        assert run(musical_folder, clips, folder, "--bisect", "int8") == 0
    return folder


def ignored(*_):
    pass


def run(bundle, clips, folder, *options, precisions="fp16,int8", devices="cpu,cuda"):
    audio = ["--audio", str(clips / "audio"), "--reference-midi", str(clips / "midi")]
    rest = ["--precisions", precisions, "--devices", devices, "--output", str(folder), "--threads", "1"]
    return main(["precision", str(bundle), *audio, *rest, *options])


def found_in(folder):
    results = read_results(folder / "results.json")
    return results, {combination.name: combination for combination in results.combinations}


def test_what_is_found(output, musical_folder):
    results, found = found_in(output)
    assert (results.model, results.clips, results.has_reference) == ("tiny", 2, True)
    assert results.seconds == pytest.approx(2 * SECONDS, abs=0.1)
    done = [name for name, each in found.items() if each.outcome == "done"]
    assert done == ["fp32-cpu", "fp16-cpu", "int8-cpu", "int8+plan-cpu"]
    fp32, half, int8 = (found[name] for name in done[:3])
    assert (fp32.forced, fp32.free, fp32.graphs) == (None, None, ())
    assert fp32.against_fp32.scores["onset"].mean == 1
    assert fp32.against_reference.loss == {}
    assert (fp32.emulated, half.emulated, int8.emulated) == (False, True, False)
    assert half.speed is None
    for each in (fp32, int8):
        assert each.speed.times_realtime > 0
        assert each.speed.peak_mb > 10
    files = {entry.file: entry.weights for entry in load(musical_folder, "cpu").bundle.manifest.graphs}
    sizes = {name: (musical_folder / name).stat().st_size for name in {*files, *files.values()}}
    assert fp32.size_bytes <= sum(size for name, size in sizes.items() if "tensorrt" not in name)
    assert fp32.size_bytes > sum(size for name, size in sizes.items() if "ort.onnx" in name)
    assert int8.size_bytes < fp32.size_bytes
    assert 0 < half.forced.kl_mean < int8.forced.kl_mean
    assert [error.graph for error in int8.graphs] == ["encoder", "cross_kv", "decode_step"]
    assert {error.limit for error in half.graphs} == {65504.0}
    assert len(int8.free.first) == len(int8.free.lengths) == int8.forced.segments == 4


def test_devices_that_are_not_here_are_told_and_stop_nothing(output):
    _, found = found_in(output)
    others = {name: each for name, each in found.items() if name.endswith("-cuda")}
    assert set(others) == {"fp32-cuda", "fp16-cuda", "int8-cuda"}
    for each in others.values():
        assert each.outcome == "impossible"
        assert each.problem
    assert "for the CPU" in others["int8-cuda"].problem


def test_scores_are_those_of_mir_eval(output, clips, musical_folder, tmp_path):
    """Of notes that the runtime makes without the lab; `test_lab_scores.py` has all scores."""
    _, found = found_in(output)
    quantized = load(
        quantize_bundle(open_bundle(musical_folder), tmp_path / "int8", ["int8"]), precision="int8", threads=1
    )
    kept = read_notes(output / "combinations" / "fp32-cpu.notes.json")

    def arrays(notes):
        spans = np.array([[note.onset, note.offset] for note in notes if note.is_drum])  # most of what it hears
        return spans, 440 * 2.0 ** ((np.array([note.pitch for note in notes if note.is_drum], float) - 69) / 12)

    for clip, own in zip(found["int8-cpu"].clips, kept, strict=True):
        heard = quantized.transcribe(clips / "audio" / f"{clip.name}.flac").notes
        played = read_midi(clips / "midi" / f"{clip.name}.mid").notes
        assert clip.notes == len(heard)
        for reference, scores in ((own, clip.against_fp32), (played, clip.against_reference)):
            _, _, f1, _ = mir_eval.transcription.precision_recall_f1_overlap(
                *arrays(reference), *arrays(heard), offset_ratio=None
            )
            assert scores.drums == pytest.approx(f1, abs=1e-9)
            assert 0 < f1 < 1


def test_notes_are_those_of_the_runtime(output, clips, musical_folder):
    transcriber = load(musical_folder, "cpu", threads=1)
    kept = read_notes(output / "combinations" / "fp32-cpu.notes.json")
    for name, notes in zip(("a", "deeper/b"), kept, strict=True):
        wanted = transcriber.transcribe(clips / "audio" / f"{name}.flac").notes
        assert [replace(n, confidence=None) for n in notes] == [replace(n, confidence=None) for n in wanted]


def test_files(output):
    names = {path.name for path in output.iterdir()}
    assert names == {
        "lab.json", "combinations", "midi", "results.json", "results.csv", "clips.csv", "report.html", "plan.int8.toml"
    }  # fmt: skip
    rows = list(csv.DictReader((output / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 7
    assert len(list(csv.DictReader((output / "clips.csv").read_text(encoding="utf-8").splitlines()))) == 4 * 2
    assert "<h1" in (output / "report.html").read_text(encoding="utf-8")
    results, _ = found_in(output)
    plan = read_plan(output / "plan.int8.toml")
    assert (plan.model, plan.precision, plan.keep) == ("tiny", "int8", results.bisections[0].kept)
    assert plan.measured["agreement_all"] == results.bisections[0].agreement_all
    assert results.bisections[0].cost_kept <= max(LEFT * results.bisections[0].cost_all, HARMLESS)


def test_what_is_finished_is_kept_and_what_is_new_is_added(output, musical_folder, clips, tmp_path, capfd):
    folder = tmp_path / "out"
    subprocess.run(["cp", "-r", str(output), str(folder)], check=True)
    before = (folder / "combinations" / "int8-cpu.json").read_bytes()
    assert run(musical_folder, clips, folder, precisions="int8,bf16", devices="cpu") == 0
    said = capfd.readouterr().err
    assert "int8-cpu: kept from an earlier run" in said
    assert "bf16-cpu: done" in said
    assert (folder / "combinations" / "int8-cpu.json").read_bytes() == before
    _, found = found_in(folder)
    assert list(found) == ["fp32-cpu", "int8-cpu", "bf16-cpu"]


def test_results_of_something_else_are_never_mixed(output, musical_folder, clips, tmp_path, capfd):
    folder = tmp_path / "out"
    subprocess.run(["cp", "-r", str(output), str(folder)], check=True)
    assert run(musical_folder, clips, folder, "--seconds", "1.5") != 0
    assert "give another --output" in capfd.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert run(musical_folder, clips, tmp_path / "full") != 0
    assert "no folder of results: give another --output" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_folder_that_is_not_ours_is_left_alone_before_the_export(clips, tmp_path, capfd):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    arguments = ["--checkpoint", "random:0", "--model", "mt3", "--audio", str(clips / "audio")]
    assert main(["precision", *arguments, "--output", str(tmp_path / "full")]) == 2
    assert "no folder of results: give another --output" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    assert main(["precision", *arguments, "--output", str(tmp_path / ("n" * 300))]) == 2
    assert "File name too long" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--model", "mt3"), "--model is of a checkpoint, a bundle says it itself: leave it out"),
        (("--memory-length", "7"), "--memory-length is of a checkpoint"),
        (("--name", "x"), "--name is of a checkpoint"),
        (("--calibration", "x"), "no precision listed is calibrated: leave --calibration out, or add qdq"),
    ],
)
def test_options_that_would_do_nothing_are_refused(musical_folder, clips, tmp_path, capfd, option, words):
    assert run(musical_folder, clips, tmp_path / "out", *option) == 2
    assert words in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_are_of_graphs_that_were_checked(musical_folder, tmp_path):
    folder = tmp_path / "changed"
    subprocess.run(["cp", "-r", str(musical_folder), str(folder)], check=True)
    data = bytearray((folder / "encoder.fp32.tensorrt.onnx").read_bytes())
    data[100:200] = b"\xff" * 100
    (folder / "encoder.fp32.tensorrt.onnx").write_bytes(data)
    assert bytes_read(open_bundle(folder), "ort", "fp32") == bytes_read(open_bundle(musical_folder), "ort", "fp32")
    with pytest.raises(BundleError, match="changed or cut off"):
        bytes_read(open_bundle(folder), "tensorrt", "fp32")


def test_a_process_that_dies_is_one_result(output, musical_folder, clips, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    subprocess.run(["cp", "-r", str(output), str(folder)], check=True)
    (folder / "combinations" / "int8-cpu.json").unlink()
    script = "import os, sys; print('words', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(child, "WORKER", [sys.executable, "-c", script])
    asked = options(musical_folder, clips, folder, "fp16,int8")
    laboratory = open_laboratory(asked, find_all(asked), open_bundle(musical_folder), ignored)
    said = []
    found = {each.name: each for each in measure(laboratory, said.append, ignored)}
    assert [each.outcome for each in found.values()] == ["done", "done", "failed"]
    assert found["int8-cpu"].problem == "its process ended with exit code -9 (words): see int8-cpu.log"
    assert (folder / "combinations" / "int8-cpu.log").read_text() == "words\n"
    assert not (folder / "combinations" / "int8-cpu.json").exists()  # so that the next run tries again
    for path in (folder / "combinations").glob("fp32-cpu*"):
        path.unlink()
    with pytest.raises(DeviceError, match="fp32 on the CPU, which all is compared with, failed") as caught:
        measure(laboratory, said.append, ignored)
    assert str(caught.value).endswith(": mend that")


def options(bundle, clips, folder, precisions):
    return Options(
        bundle=bundle,
        audio=(clips / "audio",),
        reference=clips / "midi",
        variants=parse_variants(precisions.split(",")),
        devices=("cpu",),
        output=folder,
        threads=1,
    )


def test_jobs_travel():
    job = Job("b", "int8", "cpu", "", "/o", (Sound("x/y", "/a.wav", ""),), (), None, 3, 0)
    assert read_job(job.to_json().encode()) == job
    strange = replace(job, output="/o/\u3000\udcff")  # signs that results may not hold
    assert read_job(strange.to_json().encode()) == strange
    assert job.midi("x/y") == Path("/o/midi/int8-cpu/x/y.mid")
    assert replace(job, plan="/p.toml").name == "int8+plan-cpu"
    assert job.variant is VARIANTS["int8"]


def test_results_travel(output, tmp_path):
    results, _ = found_in(output)
    (tmp_path / "again.json").write_bytes(to_json(results))
    assert read_results(tmp_path / "again.json") == results
    assert not re.search(r"NaN|Infinity", (output / "results.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder, or --checkpoint"),
        (["BUNDLE", "--checkpoint", "random:1"], "give the folder, or --checkpoint"),
        (["--checkpoint", "random:1"], "give --model"),
        (["BUNDLE", "--precisions", "fp9"], "unknown precision 'fp9'"),
        (["BUNDLE", "--devices", "auto"], "the lab does not choose a device"),
        (["BUNDLE", "--bisect", "qdq"], "cannot be bisected"),
        (["BUNDLE", "--plan-output", "x.toml"], "give --bisect with one precision"),
        (["BUNDLE", "--bisect", "int8", "--plan-output", "nowhere/x.toml"], "create it"),
        (["--checkpoint", "nowhere.pth", "--model", "mt3", "--precisions", "fp9"], "unknown precision 'fp9'"),
    ],
)
def test_refusals_come_before_any_work(arguments, message, musical_folder, clips, tmp_path, capfd):
    given = [str(musical_folder) if text == "BUNDLE" else text for text in arguments]
    assert main(["precision", *given, "--audio", str(clips / "audio"), "--output", str(tmp_path / "out")]) != 0
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert message in said
    check_message(OptionError(said.removeprefix("mt3-export: ")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--seconds", "-1"], ["--seconds", "nan"], ["--seconds", "inf"], ["--allow", "nan"], ["--allow", "2"]]
)
def test_numbers_that_mean_nothing_are_refused(arguments, musical_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["precision", str(musical_folder), "--audio", "a", "--output", str(tmp_path / "out"), *arguments])
    assert arguments[1] in capsys.readouterr().err


def test_a_plan_that_is_there_is_not_overwritten(musical_folder, clips, tmp_path, capfd):
    plan = tmp_path / "mine.toml"
    plan.write_text("by hand")
    words = ["--bisect", "int8", "--plan-output", str(plan), "--output", str(tmp_path / "out")]
    assert main(["precision", str(musical_folder), "--audio", str(clips / "audio"), *words]) != 0
    assert "exists already: remove it" in capfd.readouterr().err
    assert plan.read_text() == "by hand"


def test_a_broken_clip_is_found_before_any_work(musical_folder, clips, tmp_path, capfd):
    """And the folder is not taken by what cannot be done."""
    whole = (clips / "audio" / "a.flac").read_bytes()
    broken = tmp_path / "audio" / "b.flac"
    broken.parent.mkdir()
    broken.write_bytes(whole[: len(whole) // 2])
    words = ["--audio", str(broken.parent), "--output", str(tmp_path / "out")]
    assert main(["precision", str(musical_folder), *words]) != 0
    assert "b.flac" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_compared_with_another_fp32_or_unreadable_are_made_again(output, musical_folder, clips, tmp_path):
    folder = tmp_path / "out"
    subprocess.run(["cp", "-r", str(output), str(folder)], check=True)
    asked = options(musical_folder, clips, folder, "fp16,int8")
    jobs = {job.name: job for job in open_laboratory(asked, find_all(asked), open_bundle(musical_folder), ignored).jobs}
    assert all(read_combination(job) for job in jobs.values())
    (folder / "combinations" / "fp16-cpu.json").write_bytes(b"{}")
    assert read_combination(jobs["fp16-cpu"]) is None
    notes = jobs["int8-cpu"].reference_notes
    notes.write_bytes(notes.read_bytes() + b"\n")
    assert read_combination(jobs["int8-cpu"]) is None
    notes.unlink()
    assert read_combination(jobs["fp32-cpu"]) is None


def test_a_bundle_needs_no_torch(musical_folder, clips, tmp_path):
    """Also the processes of the lab run without."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch is not to be imported')")
    words = ["--audio", str(clips / "audio" / "a.flac"), "--precisions", "w8", "--bisect", "w8", "--threads", "1"]
    command = ["-c", "import sys; from mt3_export.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [sys.executable, *command, "precision", str(musical_folder), *words, "--output", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["combinations"][1]["outcome"] == "done"
