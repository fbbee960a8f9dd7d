"""The lab's CSV files, read back, and the piano rolls of the worst and the median clip."""

from __future__ import annotations

import csv
import struct
import sys
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
import pytest

from lab_cases import combination, example, fp32
from mt3_export.lab.advice import recommend
from mt3_export.lab.overlays import draw_overlays
from mt3_export.lab.results import F1s, read_results
from mt3_export.lab.spreadsheet import write_clips_csv, write_csv
from mt3_export.mixed_plan import read_plan
from mt3_runtime.errors import OutputError
from mt3_runtime.midi import write_midi
from mt3_runtime.notes import Note


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(text):
    return None if text == "" else float(text)


def test_combinations_come_back_exactly(tmp_path):
    results = example()
    write_csv(results, tmp_path / "results.csv")
    rows = read(tmp_path / "results.csv")
    assert [row["combination"] for row in rows] == [c.name for c in results.combinations]
    for row, c in zip(rows, results.combinations, strict=True):
        assert (row["outcome"], row["problem"], row["emulated"]) == (c.outcome, c.problem, str(int(c.emulated)))
        assert number(row["times_realtime"]) == (c.speed.times_realtime if c.speed else None)
        assert number(row["size_bytes"]) == c.size_bytes
        assert number(row["kl_p99_nats"]) == (c.forced.kl_p99 if c.forced else None)
        assert number(row["token_agreement_low"]) == (c.forced.agreement.low if c.forced else None)
        left = None if c.free is None else sum(step >= 0 for step in c.free.first)
        assert number(row["free_rows_diverged"]) == left
        for side, found in (("fp32", c.against_fp32), ("reference", c.against_reference)):
            loss = found.loss.get("drums") if found else None
            assert number(row[f"drums_f1_loss_vs_{side}_high"]) == (loss.high if loss else None)
            score = found.scores.get("leakage") if found else None
            assert number(row[f"leakage_vs_{side}"]) == (score.mean if score else None)


def test_columns_are_the_same_whatever_was_measured(tmp_path):
    heads = set()
    for index, results in enumerate((example(), example(reference=False), replace(example(), combinations=()))):
        for write, name in ((write_csv, "results"), (write_clips_csv, "clips")):
            write(results, tmp_path / f"{name}{index}.csv")
            heads.add((name, (tmp_path / f"{name}{index}.csv").read_text().partition("\n")[0]))
    assert len(heads) == 2
    assert all(len(set(head.split(","))) == len(head.split(",")) for _, head in heads)


def test_clips_come_back_exactly(tmp_path):
    results = example()
    odd = 'a,"b"\u00e9 =1'
    first = results.combinations[3]
    clips = (replace(first.clips[0], name=odd, against_fp32=F1s(None, 0.5, None, None, None)), *first.clips[1:])
    results = replace(results, combinations=(results.combinations[0], replace(first, clips=clips)))
    write_clips_csv(results, tmp_path / "clips.csv")
    rows = read(tmp_path / "clips.csv")
    assert len(rows) == 2 * len(clips)
    row = rows[len(clips)]
    assert (row["combination"], row["clip"], row["onset_f1_vs_fp32"]) == ("int8-cpu", odd, "")
    assert row["onset_offset_f1_vs_fp32"] == "0.5"
    assert number(rows[-1]["drums_f1_vs_reference"]) == clips[-1].against_reference.drums
    with pytest.raises(OutputError, match="create the folder"):
        write_clips_csv(results, tmp_path / "missing" / "clips.csv")


def note(onset, pitch, program=0):
    return Note(onset, onset + 0.3, pitch, 100, program, is_drum=False)


@pytest.fixture
def folder(tmp_path):
    """Notes of fp32 and of w8 for every clip of the example: w8 lacks one note, and has one of its own."""
    rng = np.random.default_rng(4)
    results = example()
    for clip in results.combinations[0].clips:
        notes = [note(0.5 * index, int(pitch)) for index, pitch in enumerate(rng.integers(50, 70, 6))]
        for name, written in (("fp32-cpu", notes), ("w8-cpu", [*notes[1:], note(9.0, 72)])):
            path = tmp_path / "midi" / name / f"{clip.name}.mid"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_midi(written, path)
    return tmp_path


def ranked(results, name):
    """The clips of a combination by their onset F1 against fp32."""
    combination = next(c for c in results.combinations if c.name == name)
    return [clip.name for clip in sorted(combination.clips, key=lambda clip: clip.against_fp32.onset)]


def test_the_worst_and_the_median_clip_are_drawn(folder):
    results = example()
    worst, median = draw_overlays(results, folder, "w8-cpu")
    names = ranked(results, "w8-cpu")
    assert worst.title == f"Worst clip: {names[0]}"
    assert median.title == f"Median clip: {names[20]}"
    for picture in (worst, median):
        assert "5 notes the same, 0 with another program or offset, 1 in fp32 only, 1 in w8-cpu only" in picture.caption
        width, height = struct.unpack(">II", picture.png[16:24])
        assert picture.png.startswith(b"\x89PNG")
        assert width > 900
        assert height > 100


def test_a_missing_file_is_said_and_the_other_drawn(folder):
    results = example()
    (folder / "midi" / "w8-cpu" / f"{ranked(results, 'w8-cpu')[0]}.mid").unlink()
    worst, median = draw_overlays(results, folder, "w8-cpu")
    assert worst.png == b""
    assert "cannot be read" in worst.caption
    assert median.png


def test_where_fp32_is_chosen_the_fastest_other_one_is_shown(folder):
    results = example()
    pictures = draw_overlays(results, folder, "fp32-cpu")
    assert pictures[0].title == f"Worst clip: {ranked(results, 'int8-cpu')[0]}"
    few = replace(results, combinations=(results.combinations[0], *results.combinations[1:3]))
    assert draw_overlays(few, folder, "fp32-cpu")[0].title.endswith(ranked(results, "bf16-cpu")[0]), "loses most"


def test_nothing_to_compare_is_said(tmp_path):
    draw = partial(draw_overlays, folder=tmp_path, choice="fp32-cpu")
    alone = replace(example(), combinations=(fp32(),))
    silent = combination("w8", 0.02, 30, 100, 0.0, count=2)
    clips = tuple(replace(clip, against_fp32=F1s(None, None, None, None, None)) for clip in silent.clips)
    unscored = replace(alone, combinations=(fp32(), replace(silent, clips=clips)))
    for results in (alone, unscored, replace(alone, combinations=())):
        (picture,) = draw(results)
        assert picture.png == b""
        assert "no notes" in picture.caption


def test_one_clip_is_shown_once(folder):
    results = replace(example(), combinations=(fp32(count=1), combination("w8", 0.02, 30, 100, 0.0, count=1)))
    assert len(draw_overlays(results, folder, "w8-cpu")) == 1


def test_without_pillow_the_report_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    (picture,) = draw_overlays(example(), folder, "w8-cpu")
    assert picture.png == b""
    assert "pip install 'mt3-runtime[picture]'" in picture.caption


def test_the_example_in_the_documentation_is_what_its_numbers_make():
    """Also by this version: its results are read, and its tables and recommendation made again."""
    folder = Path(__file__).parent.parent / "docs" / "precision_example"
    results = read_results(folder / "results.json")
    done = [each for each in results.combinations if each.outcome == "done"]
    assert results.clips >= 100
    assert results.has_reference
    assert {each.precision for each in done} >= {"fp32", "fp16", "bf16", "int8", "w8", "w4", "qdq", "int8+plan"}
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert escape(recommend(results).sentence, quote=False) in text.replace("&#x27;", "'")
    rows = list(csv.DictReader((folder / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["combination"] for row in rows] == [each.name for each in results.combinations]
    plan = read_plan(folder / "plan.int8.toml")
    assert plan.keep == results.bisections[0].kept
