"""The commands as a user meets them: what is written, what is said, and one line for everything that can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pretty_midi
import pytest
import soundfile
from mir_eval import transcription, util
from safetensors.torch import save_file

from mt3_export import cli as export_cli
from mt3_runtime import cli, transcribe_command
from mt3_runtime.bundle import demo_bundle_path, demo_clip_path
from mt3_runtime.console import UNREAD
from mt3_runtime.errors import OutputError
from mt3_runtime.files import atomic_write
from mt3_runtime.midi_reading import read_midi

RATE = 16_000


@pytest.fixture
def tone(tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone_samples(RATE), RATE)
    return path


def tone_samples(rate, seconds=0.5):
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


def run(capsys, *arguments):
    """Exit code, standard output and the lines of standard error of `mt3-run`."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def test_transcribe_writes_what_is_asked_for(capsys, tmp_path):
    clip = demo_clip_path() / "clip.flac"
    outputs = {"-o": tmp_path / "a.mid", "--json": tmp_path / "a.json", "--picture": tmp_path / "a.png"}
    options = [part for pair in outputs.items() for part in pair]
    code, out, lines = run(capsys, "transcribe", clip, *options)
    assert (code, out) == (0, "")
    assert f"{clip} -> " in lines[0]
    assert "demo model" in lines[1]
    assert "not for real music" in lines[1]
    document = json.loads(outputs["--json"].read_text())
    assert {"onset", "offset", "pitch", "velocity", "program", "is_drum", "confidence"} == set(document["notes"][0])
    assert document["provenance"]["bundle"] == "embedded demo"
    assert document["provenance"]["device"] == "cpu"
    midi = pretty_midi.PrettyMIDI(str(outputs["-o"]))
    assert sum(len(track.notes) for track in midi.instruments) > 0
    assert outputs["--picture"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("program", "arguments", "told"),
    [
        (cli, "transcribe x.wav --bundel y", "error: unrecognized arguments: --bundel y: did you mean --bundle?"),
        (cli, "transcribe --device cudaa x.wav", "transcribe: error: argument --device: device 'cudaa' does not exist"),
        (cli, "engines list --zzz", "engines list: error: unrecognized arguments: --zzz"),
        (cli, "transcirbe", "error: argument COMMAND: invalid choice: 'transcirbe'"),
        (cli, "", "error: the following arguments are required: COMMAND"),
        (export_cli, "quantize x --output y --precison=int8", "did you mean --precision?"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_the_command_that_explains(capsys, program, arguments, told):
    with pytest.raises(SystemExit) as ended:
        program.main(arguments.split())
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    (line,) = shown.err.splitlines()
    name, _, rest = line.partition(": error: ")
    assert told in line
    assert rest.endswith(f" (see {name} --help)")


def test_quiet_says_nothing(capsys, tone, tmp_path):
    options = ("--bundle", demo_bundle_path(), "--quiet")
    assert run(capsys, "transcribe", tone, "-o", tmp_path / "a.mid", *options) == (0, "", [])


def test_quiet_tells_that_the_model_may_have_been_forgotten(capsys, tone, tmp_path):
    code, out, lines = run(capsys, "transcribe", tone, "-o", tmp_path / "b.mid", "--quiet")
    assert (code, out) == (0, "")
    assert lines == ["note: no --bundle was given: demo model trained on synthesised notes: not for real music"]


def test_what_stands_under_a_name_that_was_not_given_is_kept(capsys, tone, tmp_path, monkeypatch):
    """Above all the reference beside a recording."""
    monkeypatch.chdir(tmp_path)
    other, reference = Path("other.wav"), tmp_path / "tone.mid"
    shutil.copy(tone, other)
    reference.write_bytes(b"played")
    code, out, (line,) = run(capsys, "transcribe", other, "tone.wav")
    assert (code, out) == (2, "")
    assert line.startswith(
        "mt3-run: error: tone.mid exists already, and nothing was done: give --overwrite to replace it, "
    )
    assert reference.read_bytes() == b"played"
    assert not other.with_suffix(".mid").exists()
    assert run(capsys, "transcribe", other, "tone.wav", "--overwrite")[0] == 0
    assert reference.read_bytes().startswith(b"MThd")
    *_, line = run(capsys, "transcribe", other, "tone.wav", "--formats", "json,mid")[2]
    assert "other.mid and 1 more exist already, and nothing was done: give --overwrite to replace them," in line
    assert not other.with_suffix(".json").exists()
    assert run(capsys, "transcribe", other, "-o", "other.mid")[0] == 0  # this name was given


def test_many_files_survive_a_bad_one(capsys, tone, tmp_path):
    bad, other = tmp_path / "bad.wav", tmp_path / "other.wav"
    bad.write_text("not audio")
    shutil.copy(tone, other)
    folder = tmp_path / "new" / "folder"
    code, _, lines = run(capsys, "transcribe", tone, bad, other, "--output-dir", folder, "--formats", "mid,json")
    assert code == 2
    assert sorted(path.name for path in folder.iterdir()) == ["other.json", "other.mid", "tone.json", "tone.mid"]
    assert sum("error" in line and "bad.wav" in line for line in lines) == 1
    assert lines[-1] == "mt3-run: 1 of 3 files failed, 2 were written"
    assert (
        json.loads((folder / "tone.json").read_text())["notes"]
        == json.loads((folder / "other.json").read_text())["notes"]
    )


def bad_audio(folder):
    """Name -> (path, words the error must hold)."""

    def write(name, data, rate=RATE, **kind):
        soundfile.write(folder / name, data, rate, **kind)
        return folder / name

    def raw(name, data):
        (folder / name).write_bytes(data)
        return folder / name

    samples = tone_samples(RATE)
    good = write("good.wav", samples).read_bytes()
    lie = bytearray(write("lie.flac", samples).read_bytes())
    lie[18:26] = struct.pack(">Q", struct.unpack(">Q", lie[18:26])[0] + 10_000_000)  # total samples in STREAMINFO
    nan = samples.copy()
    nan[100] = np.nan
    return {
        "missing": (folder / "missing.wav", "check the path"),
        "folder": (folder, ""),
        "empty": (raw("empty.wav", b""), ""),
        "text": (raw("text.wav", b"these are words, not sound\n" * 40), ""),
        "truncated": (raw("cut.wav", good[: len(good) // 2]), ""),
        "nan": (write("nan.wav", nan, subtype="FLOAT"), ""),
        "no samples": (write("none.wav", samples[:0]), ""),
        "one sample": (write("one.wav", samples[:1]), ""),
        "64 channels": (write("many.wav", np.zeros((1000, 64))), "64"),
        "384 kHz": (write("fast.wav", tone_samples(384_000), 384_000), "384000"),
        "header lie": (raw("lie2.flac", bytes(lie)), ""),
    }


BAD_AUDIO = ["missing", "folder", "empty", "text", "truncated", "nan", "no samples", "one sample"]
BAD_AUDIO += ["64 channels", "384 kHz", "header lie"]


@pytest.mark.parametrize("case", BAD_AUDIO)
def test_bad_audio_is_one_line_and_leaves_nothing(capsys, tmp_path, case):
    sources, results = tmp_path / "in", tmp_path / "out"
    sources.mkdir()
    results.mkdir()
    path, words = bad_audio(sources)[case]
    code, out, lines = run(capsys, "transcribe", path, "-o", results / "x.mid", "--json", results / "x.json")
    assert (code, out) == (2, "")
    assert len(lines) == 1
    assert lines[0].startswith("mt3-run: error: ")
    assert words in lines[0]
    assert ": " in lines[0].removeprefix("mt3-run: error: ")  # the fix follows
    assert list(results.iterdir()) == []


def changed_bundle(folder, change):
    bundle = folder / "bundle"
    shutil.copytree(demo_bundle_path(), bundle)
    change(bundle)
    return bundle


def rewrite_manifest(bundle, **changes):
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD_BUNDLES = {
    "no folder": shutil.rmtree,
    "no manifest": lambda bundle: (bundle / "manifest.json").unlink(),
    "manifest of another version": lambda bundle: rewrite_manifest(bundle, version=99),
    "unknown key": lambda bundle: rewrite_manifest(bundle, surprise=1),
    "no weights": lambda bundle: (bundle / "weights.fp32.bin").unlink(),
    "cut weights": lambda bundle: os.truncate(bundle / "weights.fp32.bin", 1000),
    "tampered graph": lambda bundle: (bundle / "encoder.fp32.ort.onnx").write_bytes(b"\0" * 100),
    "weights are a link": lambda bundle: relink(bundle / "weights.fp32.bin"),
}


def relink(path):
    target = path.rename(path.with_suffix(".moved"))
    path.symlink_to(target)


@pytest.mark.parametrize("case", BAD_BUNDLES)
def test_bad_bundle_is_one_line(capsys, tone, tmp_path, case):
    bundle = changed_bundle(tmp_path, BAD_BUNDLES[case])
    code, _, lines = run(capsys, "transcribe", tone, "-o", tmp_path / "x.mid", "--bundle", bundle)
    assert code == 2
    assert len(lines) == 1
    assert "bundle" in lines[0] or "manifest" in lines[0]
    assert not (tmp_path / "x.mid").exists()


def test_bad_options_are_refused_before_any_work(capsys, tone, tmp_path):
    twin = tmp_path / "twin" / "tone.flac"
    twin.parent.mkdir()
    soundfile.write(twin, tone_samples(RATE), RATE)
    (tmp_path / "file").write_text("")
    cases = [
        ([tone, twin, "-o", tmp_path / "x.mid"], "--output-dir"),
        ([tone, twin, "--output-dir", tmp_path / "out"], "use other folders"),  # both would be tone.mid
        ([tone, "-o", tmp_path / "x.txt"], "does not end in .mid"),
        ([tone, "--json", tone], "does not end in .json"),
        ([tone, "-o", tmp_path / "nowhere" / "x.mid"], "does not exist"),
        ([tone, "-o", tmp_path / "x.mid", "--output-dir", tmp_path], "give one of them"),
        ([tone, "--output-dir", tmp_path, "--formats", "mid,wav"], "unknown format 'wav'"),
        ([tone, "--output-dir", tmp_path / "file" / "deep"], "cannot create folder"),
        ([twin.parent, "-o", twin.parent], "does not end in .mid"),
    ]
    for options, words in cases:
        code, _, lines = run(capsys, "transcribe", *options)
        assert code == 2, options
        assert len(lines) == 1, options
        assert words in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_unknown_device_exits_with_2(capsys, tone):
    with pytest.raises(SystemExit) as error:
        cli.main(["transcribe", str(tone), "--device", "gpu"])
    assert error.value.code == 2
    assert "device 'gpu' does not exist: use auto, cpu, cuda" in capsys.readouterr().err


def test_full_disk_is_said_and_the_old_result_stays(capsys, tone, tmp_path, monkeypatch):
    target = tmp_path / "x.mid"
    target.write_bytes(b"old")

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("mt3_runtime.files.os.fsync", full)
    code, _, lines = run(capsys, "transcribe", tone, "-o", target)
    assert code == 2
    assert "disk is full" in lines[-1]
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tone.wav", "x.mid"]


def test_a_target_that_cannot_be_replaced_is_found_before_the_work(capsys, tone, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x.mid")
    monkeypatch.setattr(transcribe_command, "load", lambda *_, **__: pytest.fail("work"))
    code, _, errors = run(capsys, "transcribe", tone, "-o", tmp_path / "x.mid")
    assert (code, len(errors)) == (2, 1)
    assert "it is a device or a pipe: choose an ordinary file" in errors[0]


def test_one_file_that_cannot_be_written_keeps_no_other_from_being_written(capsys, tone, tmp_path, monkeypatch):
    monkeypatch.setattr(transcribe_command, "check_writable", lambda _: None)
    code, _, errors = run(
        capsys, "transcribe", tone, "-o", tmp_path / "none" / "x.mid", "--json", tmp_path / "x.json",
        "--picture", tmp_path / "nowhere" / "x.png",
    )  # fmt: skip
    assert (code, len(errors)) == (2, 1)
    assert [f"{tmp_path}/{folder}/x" in errors[0] for folder in ("none", "nowhere")] == [True, True]
    assert json.loads((tmp_path / "x.json").read_text())


def test_bench_prints_one_json_object(capsys, tiny_folder):
    options = ("--segments", 3, "--steps", 5, "--repeat", 2, "--json")
    code, out, lines = run(capsys, "bench", "--bundle", tiny_folder, *options)
    result = json.loads(out)
    assert (code, lines) == (0, [])
    assert set(result["decode_ms_per_step"]) == {"1", "3"}
    assert 0 < result["encode_s"] < result["total_s"]
    assert result["load_s"] > 0
    assert result["peak_rss_mb"] > 10
    assert result["versions"]["onnxruntime"]
    assert run(capsys, "bench", "--bundle", tiny_folder, "--steps", 97)[0] == 2  # the tiny model has 96 positions


def test_bench_of_rows_that_end_early(capsys, tiny_folder, tmp_path):
    options = ("bench", "--bundle", tiny_folder, "--segments", 5, "--repeat", 1)
    code, out, lines = run(capsys, *options, "--lengths", "20,20,2", "--json")
    found = json.loads(out)["lengths"]
    assert (code, lines) == (0, [])
    assert found["lengths"] == [20, 20, 2, 20, 20]
    rows = {name: (found[name]["rows"], found[name]["row_steps"]) for name in ("given", "long_alone", "all_long")}
    assert rows == {"given": (5, 82), "long_alone": (4, 80), "all_long": (5, 100)}
    assert all(found[name][key] > 0 for name in rows for key in ("admit_s", "decode_s"))
    assert found["ratio"] == found["given"]["decode_s"] / found["long_alone"]["decode_s"]
    (tmp_path / "lengths.txt").write_text("20, 20\n2\n")
    code, out, _ = run(capsys, *options, "--lengths", tmp_path / "lengths.txt")
    assert code == 0
    assert "that of the long rows alone" in out.splitlines()[-2]


@pytest.mark.parametrize("lengths", ["", "3,x", "0,1", "-2", "2.5", "9" * 30, "nowhere.txt", "1,,\0", "."])
def test_lengths_that_are_none_are_one_line(capsys, tmp_path, monkeypatch, tiny_folder, lengths):
    monkeypatch.chdir(tmp_path)
    code, _, lines = run(capsys, "bench", "--bundle", tiny_folder, "--lengths", lengths)
    assert code == 2
    assert len(lines) == 1
    assert "32,32,2" in lines[0]
    (tmp_path / "words").write_bytes(b"\xff\xfe three")
    assert run(capsys, "bench", "--bundle", tiny_folder, "--lengths", "words")[0] == 2
    assert run(capsys, "bench", "--bundle", tiny_folder, "--lengths", "97")[0] == 2  # the tiny model has 96 positions


@pytest.mark.parametrize("options", [("--strict-upstream", "on"), ("--programs", "fine")])
def test_options_of_yourmt3_are_refused_for_another_model(capsys, tone, tmp_path, options):
    code, _, lines = run(capsys, "transcribe", tone, "-o", tmp_path / "x.mid", *options)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].endswith(": leave it out")
    assert not (tmp_path / "x.mid").exists()


def test_options_of_yourmt3_that_are_off_are_for_everyone(capsys, tone, tmp_path):
    options = ("--strict-upstream", "off", "--programs", "merged", "--bundle", demo_bundle_path())
    assert run(capsys, "transcribe", tone, "-o", tmp_path / "x.mid", "--quiet", *options) == (0, "", [])


def test_files_are_written_as_they_are_finished(capsys, tone, tmp_path, monkeypatch):
    """A result that cannot be written costs its own file only, also when others are under way."""
    for name in ("a", "b", "c"):
        shutil.copy(tone, tmp_path / f"{name}.wav")
    written = []

    def full(path, content, original=atomic_write):
        if path.name == "b.mid":
            raise OutputError(f"cannot write {path} (no room): free some")
        written.append(path.name)
        original(path, content)

    monkeypatch.setattr("mt3_runtime.midi.atomic_write", full)
    sources = [tmp_path / f"{name}.wav" for name in ("a", "b", "c")]
    code, _, lines = run(capsys, "transcribe", *sources, "--output-dir", tmp_path / "out")
    assert code == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.mid", "c.mid"] == sorted(written)
    assert sum(line.startswith("mt3-run: error: ") for line in lines) == 1
    assert sum(" -> " in line for line in lines) == 2
    assert lines[-1] == "mt3-run: 1 of 3 files failed, 2 were written"


def test_a_progress_bar_is_gone_before_words(capsys, tone, tmp_path, monkeypatch):
    monkeypatch.setattr("mt3_runtime.transcribe_command.LONG_SECONDS", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    other = tmp_path / "other.wav"
    shutil.copy(tone, other)
    code = cli.main(["transcribe", str(tone), str(other), "--output-dir", str(tmp_path / "out")])
    shown = capsys.readouterr().err
    assert code == 0
    assert "2 files" in shown
    for line in shown.split("\n"):
        assert "segment/s" not in line.rpartition("\r")[2]  # what stays on the screen


def test_doctor_reports_on_the_demo_bundle(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "its graphs start" in out
    assert json.loads(run(capsys, "doctor", "--json")[1])["exit_code"] == 0


def test_doctor_finds_a_broken_bundle(capsys, tmp_path):
    bundle = changed_bundle(tmp_path, BAD_BUNDLES["cut weights"])
    code, out, _ = run(capsys, "doctor", "--bundle", bundle)
    assert code == 1
    assert "copy it again" in out


def test_demo_writes_three_files_and_says_how_good_it_is(capsys, tmp_path):
    code, out, _ = run(capsys, "demo", "--output-dir", tmp_path / "demo")
    assert code == 0
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"demo.mid", "demo.json", "demo.png"}
    assert "onset F1" in out
    assert "not for real music" in out
    assert "encode" in out


def test_demo_f1_is_mir_evals(capsys, tmp_path):
    """The figure the demo prints, computed by the library of the field from the file the demo wrote."""
    _, out, _ = run(capsys, "demo", "--output-dir", tmp_path)
    notes = json.loads((tmp_path / "demo.json").read_text())["notes"]
    reference = read_midi(demo_clip_path() / "reference.mid").notes
    matched = 0
    for drums in (False, True):
        found = [(n["onset"], n["offset"], n["pitch"]) for n in notes if n["is_drum"] is drums]
        wanted = [(n.onset, n.offset, n.pitch) for n in reference if n.is_drum is drums]
        intervals, pitches = zip(
            *[(np.array([n[:2] for n in side]), np.array([n[2] for n in side])) for side in (wanted, found)],
            strict=True,
        )
        hertz = [util.midi_to_hz(side) for side in pitches]
        pairs = transcription.match_notes(
            intervals[0], hertz[0], intervals[1], hertz[1], onset_tolerance=0.05, offset_ratio=None
        )
        matched += len(pairs)
    f1 = 2 * matched / (len(notes) + len(reference))
    assert f"onset F1 {f1:.2f} " in out
    assert f1 >= 0.93


def test_export_verify_inspect_round_trip(capsys, tmp_path, tiny_folder, tiny_checkpoint):
    model, features = tiny_checkpoint.model, tiny_checkpoint.features
    metadata = {
        "architecture": "mt3",
        "num_heads": str(model.num_heads),
        "frontend": features.frontend,
        "mel_norm": "false",
        "position_base": str(model.position_base),
        "max_length": str(model.max_length),
    }
    weights = tmp_path / "tiny.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tiny_checkpoint.tensors.items()}, weights, metadata)
    options = ["--checkpoint", str(weights), "--steps", "8"]
    assert export_cli.main(["verify", str(tiny_folder), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("ok") for line in lines)
    assert export_cli.main(["verify", str(tiny_folder), *options, "--json"]) == 0
    assert all(report["passed"] for report in json.loads(capsys.readouterr().out))
    assert export_cli.main(["verify", str(tiny_folder), "--checkpoint", "random:0"]) == 2
    capsys.readouterr()
    assert export_cli.main(["inspect", str(tiny_folder)]) == 0
    assert "GroupQueryAttention" in capsys.readouterr().out
    assert export_cli.main(["inspect", str(tiny_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["model"]["name"] == "tiny"


def test_export_refuses_an_existing_output_before_reading_weights(capsys, tmp_path):
    options = ["bundle", "--model", "mt3", "--checkpoint", str(tmp_path / "none.pth"), "--output", str(tmp_path)]
    assert export_cli.main(options) == 2
    assert "exists already" in capsys.readouterr().err


def test_export_refuses_a_long_notice_before_reading_weights(capsys, tmp_path):
    options = ["bundle", "--model", "mt3", "--checkpoint", str(tmp_path / "none.pth")]
    assert export_cli.main([*options, "--output", str(tmp_path / "out"), "--notice", "n" * 70_000]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": shorten the notice")


def test_export_says_what_a_foreign_file_is(capsys, tmp_path):
    page = tmp_path / "mt3.pth"
    page.write_text("<!DOCTYPE html><html><body>404</body></html>")
    options = ["bundle", "--model", "mt3", "--checkpoint", str(page), "--output", str(tmp_path / "out")]
    assert export_cli.main(options) == 2
    assert "web page" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_who_reads_no_more_gets_no_traceback():
    """As `mt3-run diff A B | head -1` has it, where `head` is the first to end."""
    reference = str(demo_clip_path() / "reference.mid")
    program = "import sys; from mt3_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", program, "diff", reference, reference], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == UNREAD
