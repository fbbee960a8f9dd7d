"""The test set of the precision lab: its files hold what the clips are, and the lab finds them."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "make_test_set"
sys.path.insert(0, str(ROOT / "scripts"))

from demo_model.clip_files import choose, flac_bytes, write_test_set  # noqa: E402
from demo_model.clips import HELD_OUT, make_clip  # noqa: E402
from demo_model.held_out import ROWS, held_out_clips  # noqa: E402
from demo_model.scores import KINDS  # noqa: E402

from mt3_export.lab.dataset import find_clips, load_reference  # noqa: E402
from mt3_runtime.audio import load_audio  # noqa: E402
from mt3_runtime.errors import OptionError, OutputError  # noqa: E402
from mt3_runtime.scoring import score_notes  # noqa: E402

SECONDS = (2.0, 3.0)


def short_clips(kind, count):
    order = tuple(KINDS).index(kind)
    return [make_clip(KINDS[kind], SECONDS, (HELD_OUT, order, index)) for index in range(count)]


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory, told):
    path = tmp_path_factory.mktemp("sets") / "set"
    assert write_test_set(path, ROWS, 1, short_clips, told.append) == 5
    return path


def test_every_kind_has_audio_and_notes(folder, told):
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    kinds = ["band", "beat", "drums", "one", "two"]
    assert files == [
        "README.txt",
        *(f"audio/{kind}/0000.flac" for kind in kinds),
        *(f"midi/{kind}/0000.mid" for kind in kinds),
    ]
    assert [line.partition(":")[0] for line in told] == list(ROWS)


def test_the_lab_finds_all_clips_with_their_references(folder):
    clips = find_clips([folder / "audio"], folder / "midi")
    assert [clip.name for clip in clips] == [f"{kind}/0000" for kind in ("band", "beat", "drums", "one", "two")]
    assert all(clip.reference == folder / "midi" / f"{clip.name}.mid" for clip in clips)


def test_audio_is_the_clip_rounded_to_16_bits(folder):
    for kind in ROWS:
        path = folder / "audio" / kind / "0000.flac"
        info = soundfile.info(path)
        assert (info.format, info.subtype, info.channels, info.samplerate) == ("FLAC", "PCM_16", 1, 16_000)
        clip = short_clips(kind, 1)[0]
        heard = load_audio(path)
        assert heard.shape == clip.audio.shape
        assert np.abs(heard - clip.audio.astype(np.float64)).max() <= 0.5 / 32768
        # The noise that every clip has is 75 dB or less below its peak, and that no lower than -16 dB.
        rounding = (heard - clip.audio.astype(np.float64)).std()
        assert 20 * np.log10(rounding) < -75 - 16 - 9


def test_full_scale_does_not_wrap():
    audio = np.array([1.0, -1.0, 0.99999, 0.5, 0.0, -0.5], np.float32).repeat(50)
    samples, _ = soundfile.read(io.BytesIO(flac_bytes(audio)), dtype="int16")
    assert samples[::50].tolist() == [32767, -32768, 32767, 16384, 0, -16384]


def test_references_are_exact(folder):
    """Every note is there, its times within 0.05 ms: ticks of 0.1 ms are rounded to."""
    counted = 0
    for clip_file in find_clips([folder / "audio"], folder / "midi"):
        clip = short_clips(clip_file.name.partition("/")[0], 1)[0]
        notes = load_reference(clip_file)
        assert _kinds(notes) == _kinds(clip.notes)
        times = [np.array([(n.onset, n.offset) for n in _by_time(side)]) for side in (notes, clip.notes)]
        assert np.abs(times[0] - times[1]).max() <= 0.05e-3 + 1e-9
        scores = score_notes(notes, clip.notes)
        assert {scores.onset, scores.onset_offset_program, scores.drums} <= {1.0, None}
        counted += len(notes)
    assert counted > 40


def _by_time(notes):
    return sorted(notes, key=lambda n: (n.is_drum, n.program, n.pitch, n.onset))


def _kinds(notes):
    return [(n.is_drum, n.program, n.pitch, n.velocity) for n in _by_time(notes)]


def test_clips_are_the_held_out_ones():
    first = next(iter(held_out_clips("drums", 1)))
    again = make_clip(KINDS["drums"], (8.0, 20.0), (HELD_OUT, tuple(KINDS).index("drums"), 0))
    assert first.notes == again.notes
    assert (first.audio == again.audio).all()
    assert 8.0 <= len(first.audio) / 16_000 <= 20.0


def test_the_first_clips_can_be_left_out(folder, tmp_path):
    """For audio to calibrate with, which is not what is scored."""
    assert write_test_set(tmp_path / "two", {"one": "one voice"}, 2, short_clips, str) == 2
    assert write_test_set(tmp_path / "second", {"one": "one voice"}, 1, short_clips, str, skip=1) == 1
    assert [path.name for path in (tmp_path / "second" / "audio" / "one").iterdir()] == ["0001.flac"]
    for name in ("audio/one/0001.flac", "midi/one/0001.mid"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "--clips 1 --skip 1 --kinds one" in (tmp_path / "second" / "README.txt").read_text()


def test_the_readme_says_what_it_is_and_how_to_use_it(folder):
    text = (folder / "README.txt").read_text()
    for kind, name in ROWS.items():
        assert f"{kind}: 1 of {name}" in text
    seconds = sum(soundfile.info(path).duration for path in folder.rglob("*.flac"))
    assert text.startswith(f"Synthetic test set: 5 clips, {seconds:.0f} s of audio")
    assert "scripts/make_test_set --clips 1 --kinds one,two,beat,band,drums --output set\n" in text
    assert "--audio set/audio --reference-midi set/midi" in text


def test_an_existing_folder_is_refused_and_stays_as_it_is(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="exists already: remove it, or choose another --output"):
        write_test_set(folder, ROWS, 1, short_clips, print)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_fails_leaves_nothing(tmp_path):
    def broken(kind, count):
        yield short_clips(kind, 1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_test_set(tmp_path / "set", {"drums": "drums alone"}, 2, broken, print)
    assert list(tmp_path.iterdir()) == []


def test_kinds_are_chosen_in_the_order_asked():
    assert choose(None, ROWS) == ROWS
    assert list(choose("drums,one", ROWS)) == ["drums", "one"]
    for wrong in ("", "drums,,one", "choir", "one,one"):
        with pytest.raises(OptionError, match="is not a kind, or there twice: give some of one,two,beat,band,drums"):
            choose(wrong, ROWS)


def test_the_script_writes_a_set(tmp_path, monkeypatch, capsys):
    assert os.access(SCRIPT, os.X_OK)
    monkeypatch.setattr("demo_model.held_out.SECONDS", SECONDS)
    code = _run(monkeypatch, "--clips", "2", "--kinds", "drums", "--output", str(tmp_path / "set"))
    assert code == 0
    assert capsys.readouterr().err == f"drums: 2 of drums alone\n{tmp_path / 'set'}: 2 clips\n"
    assert [clip.name for clip in find_clips([tmp_path / "set" / "audio"])] == ["drums/0000", "drums/0001"]
    assert _run(monkeypatch, "--clips", "2", "--kinds", "drums", "--output", str(tmp_path / "set")) == 2
    assert "make_test_set: error: " in capsys.readouterr().err
    assert _run(monkeypatch, "--clips", "1", "--kinds", "choir", "--output", str(tmp_path / "other")) == 2
    assert not (tmp_path / "other").exists()


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def test_the_script_says_what_it_takes():
    command = [sys.executable, SCRIPT, "--clips", "0", "--output", "x"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("--clips 0: give 1 or more\n")
