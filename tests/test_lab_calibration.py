"""Where scales of qdq come from in a run of the lab, and what is refused before any work."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from bundle_cases import check_message
from mt3_export.calibration import Calibration, calibrate, choose_passages
from mt3_export.cli import main
from mt3_export.lab import worker
from mt3_export.lab.results import Combination
from mt3_export.lab.run import SHORTEST, Options, collect, find_all, open_laboratory
from mt3_export.lab.variants import parse_variants
from mt3_export.quantize_bundle import quantize_bundle
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import OptionError

RATE = 16_000


@pytest.fixture(scope="module")
def calibrated(musical_folder, audio, tmp_path_factory):
    output = tmp_path_factory.mktemp("bundles") / "calibrated"
    return quantize_bundle(open_bundle(musical_folder), output, ["qdq"], calibration=[audio])


def refused(capfd, folder, *arguments):
    """The error of a run, which must not have made a folder."""
    assert main(["precision", *map(str, arguments), "--output", str(folder)]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    text = said[-1].removeprefix("mt3-export: error: ")
    check_message(OptionError(text))
    assert not folder.exists()
    return text


def laboratory(bundle, audio, folder, **options):
    asked = Options(bundle, (audio,), None, parse_variants(["qdq"]), ("cpu",), folder, threads=1, **options)
    return open_laboratory(asked, find_all(asked), open_bundle(bundle), lambda *_: None)


def test_scales_are_not_made_for_a_bundle_that_has_them(calibrated, audio, tmp_path, capfd):
    words = (calibrated, "--audio", audio, "--precisions", "qdq", "--calibration", audio)
    text = refused(capfd, tmp_path / "out", *words)
    assert text.endswith("leave --calibration out, or give a bundle without qdq")


def test_scales_are_not_made_for_devices(musical_folder, audio, tmp_path, capfd):
    words = (musical_folder, "--audio", audio, "--precisions", "qdq", "--devices", "cuda", "--calibration", audio)
    assert "scales are made for the CPU only" in refused(capfd, tmp_path / "out", *words)


def test_the_report_says_whose_the_scales_are(calibrated, musical_folder, audio, tmp_path):
    found = [Combination(name, "cpu", emulated=False, outcome="failed", problem="x") for name in ("fp32", "qdq")]

    def heard(name, bundle, combinations=found, **options):
        ready = laboratory(bundle, audio, tmp_path / name, **options)
        return collect(ready, combinations, [], allowed_loss=0.0, command="").audio

    assert heard("own", calibrated) == f"{audio}; scales of qdq are the bundle's own"
    assert heard("clips", musical_folder) == f"{audio}; scales of qdq from the same clips"
    assert heard("given", musical_folder, calibration=(audio,)) == f"{audio}; scales of qdq from {audio}"
    assert heard("none", musical_folder, found[:1]) == str(audio)


@pytest.mark.parametrize("memory", [False, True])
def test_scales_of_the_beginning_are_those_of_a_file_that_was_cut(memory, tiny_bundle, context_bundle, audio, tmp_path):
    """Of 1.5 segments, where the file has 4 and gets louder."""
    bundle, seconds = context_bundle if memory else tiny_bundle, 3.072
    noise = np.random.default_rng(2).normal(0, 0.05, 4 * 32_768).astype(np.float32)
    noise *= np.linspace(1, 10, len(noise), dtype=np.float32)
    for name, samples in (("whole", noise), ("cut", noise[: round(seconds * RATE)])):
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE, subtype="FLOAT")
    whole, cut = [tmp_path / "whole.wav"], [tmp_path / "cut.wav"]
    found = calibrate(bundle, whole, threads=1, seconds=seconds)
    assert found == calibrate(bundle, cut, threads=1)
    assert found.segments == 2
    assert found != calibrate(bundle, whole, threads=1)
    assert list(choose_passages(bundle, whole, 64, seconds).values()) == [[0] if memory else [0, 1]]


def test_of_clips_what_is_measured_makes_the_scales_of_other_audio_all(musical_folder, audio, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(worker, "calibrate", lambda *_, seconds=None, **__: asked.append(seconds) or Calibration({}, 1))
    for name, options in (("clips", {}), ("given", {"calibration": (audio,)})):
        job = laboratory(musical_folder, audio, tmp_path / name, seconds=1.5, **options).jobs[-1]
        worker._scales(job, open_bundle(job.bundle))
    assert asked == [1.5, None]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--precisions", "qdq", "--calibration", "nowhere.wav"), "'nowhere.wav' cannot be read"),
        (("--seconds", "0.001"), "--seconds 0.001 is too short to be heard: give at least 0.01"),
        (("--threads", "99999"), "--threads 99999 is more than 1024: give one for each core at most"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_export(arguments, words, audio, tmp_path, capfd):
    given = ["--checkpoint", "nowhere.pth", "--model", "mt3", "--audio", str(audio), *arguments]
    assert main(["precision", *given, "--output", str(tmp_path / "out")]) == 2
    assert words in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_least_seconds_are_enough(musical_folder, audio, tmp_path):
    ready = laboratory(musical_folder, audio, tmp_path / "out", seconds=SHORTEST)
    assert worker.run(ready.jobs[0], lambda *_: None).outcome == "done"


def test_a_broken_file_to_calibrate_with_is_found_before_any_work(musical_folder, audio, tmp_path, capfd):
    whole, broken = audio.read_bytes(), tmp_path / "broken.flac"
    for data in (whole[: len(whole) // 2], b"no sound"):
        broken.write_bytes(data)
        words = (musical_folder, "--audio", audio, "--precisions", "qdq", "--calibration", broken)
        assert main(["precision", *map(str, words), "--output", str(tmp_path / "out")]) == 2
        assert "broken.flac" in capfd.readouterr().err
        assert not (tmp_path / "out").exists()
