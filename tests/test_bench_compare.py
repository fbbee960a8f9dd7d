"""Earlier figures beside new ones: ratios of planted numbers, all that differs named, and files that are no results."""

from __future__ import annotations

import json

import pytest

from mt3_runtime import bench as bench_module
from mt3_runtime import cli
from mt3_runtime.bench_compare import FIX, SIZE_LIMIT, compare, compare_lines, measured, read_result
from mt3_runtime.bundle import demo_bundle_path
from mt3_runtime.errors import OptionError

OLD = {
    "steps": 64,
    "encode_s": 0.8,
    "decode_ms_per_step": {"1": 6.0, "8": 10.0},
    "total_s": 2.0,
    "load_s": 0.5,
    "peak_rss_mb": 600.0,
    "segments": 8,
    "repeat": 5,
    "slots": 8,
    "model": "random-0",
    "bundle_sha256": "ab" * 32,
    "device": "cpu",
    "provider": "CPUExecutionProvider",
    "precision": "fp32",
    "threads": 2,
    "cpu": "one",
    "gpu": None,
    "notices": [],
    "command": "mt3-run bench --json",
    "versions": {"mt3-runtime": "0.1", "numpy": "2.0", "soxr": "1.0"},
}
NEW = {
    **OLD,
    "encode_s": 0.4,
    "decode_ms_per_step": {"1": 4.5, "4": 5.0},
    "total_s": 2.5,
    "load_s": 0.0,
    "bundle_sha256": "ab" * 31 + "cd",
    "precision": "int8",
    "threads": 1,
    "cpu": "two",
    "steps": 32,
    "versions": {"mt3-runtime": "0.2", "numpy": "2.0", "tqdm": "4.0"},
}


@pytest.fixture
def written(tmp_path):
    def write(document):
        path = tmp_path / "old.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    return write


def compared(path):
    return compare(read_result(path), measured(NEW), path)


def test_planted_figures_and_all_that_differs(written):
    found = compared(written(OLD))
    ratios = {name: row["new_over_old"] for name, row in found["figures"].items()}
    wanted = {"encode_s": 0.5, "total_s": 1.25, "peak_rss_mb": 1.0, "decode_ms_per_step, rows 1": 0.75}
    assert ratios == wanted
    assert found["figures"]["encode_s"] == {"old": 0.8, "new": 0.4, "new_over_old": 0.5}
    assert found["only_old"] == ["load_s", "decode_ms_per_step, rows 8"]  # nothing can be said of a new 0
    assert found["only_new"] == ["decode_ms_per_step, rows 4"]
    assert found["differs"] == {
        "cpu": {"old": "one", "new": "two"},
        "precision": {"old": "fp32", "new": "int8"},
        "threads": {"old": 2, "new": 1},
        "bundle_sha256": {"old": "ab" * 32, "new": "ab" * 31 + "cd"},
        "steps": {"old": 64, "new": 32},
        "mt3-runtime version": {"old": "0.1", "new": "0.2"},
        "tqdm version": {"old": None, "new": "4.0"},
        "soxr version": {"old": "1.0", "new": None},
    }


def test_the_text_hides_nothing(written):
    found = compared(written(OLD))
    text = "\n".join(compare_lines(found))
    for name, row in found["differs"].items():
        for value in row.values():
            assert f"    {name}: " in text
            assert ("unknown" if value is None else str(value)) in text
    assert all(name in text for which in ("only_old", "only_new") for name in found[which])
    line = next(line for line in text.splitlines() if "encode_s" in line)
    assert line.split() == ["encode_s", "0.8", "0.4", "0.500"]
    assert "nothing else that is recorded differs" not in text
    same = compare(measured(OLD), measured(OLD), written(OLD))
    assert compare_lines(same)[-1] == "  nothing else that is recorded differs"


def test_medians_of_the_first_command_of_bench_against(written):
    runs = [{**OLD, "encode_s": seconds} for seconds in (0.9, 0.2, 0.8)]
    peer = {"encode_s": 7.0, "decode_ms_per_step": 9.0, "segments": 8}
    found = compared(written({"medians": {}, "runs": {"ours": runs, "peer": [peer]}}))
    assert found["figures"]["encode_s"] == {"old": 0.8, "new": 0.4, "new_over_old": 0.5}
    assert found["differs"]["precision"] == {"old": "fp32", "new": "int8"}
    first = compared(written({"runs": {"peer": [peer]}}))
    assert first["figures"]["encode_s"]["old"] == 7.0
    assert first["only_old"] == ["decode_ms_per_step, rows 8"]  # one number, of all rows


def test_figures_of_lengths_songs_and_streams(written):
    lengths = {
        "given": {"admit_s": 1.0, "decode_s": 2.0, "rows": 3},
        "long_alone": {"admit_s": 3.0, "decode_s": 4.0},
        "all_long": {"admit_s": 5.0, "decode_s": 6.0},
        "lengths": [2, 3],
        "ratio": 0.5,
    }
    found = read_result(written({"lengths": lengths}))
    assert found.circumstances == {"lengths": [2, 3]}
    assert found.figures == {
        "lengths ratio": 0.5,
        "lengths given admit_s": 1.0,
        "lengths given decode_s": 2.0,
        "lengths long_alone admit_s": 3.0,
        "lengths long_alone decode_s": 4.0,
        "lengths all_long admit_s": 5.0,
        "lengths all_long decode_s": 6.0,
    }
    streams = {"steps": 3, "streams": 2, "counted": 8, "p50_ms": 1.0, "p99_ms": 2.0, "worst_ms": 3.0, "load": 0.1}
    found = read_result(written(streams))
    assert found.figures == {"p50_ms": 1.0, "p99_ms": 2.0, "worst_ms": 3.0, "load": 0.1}
    songs = {"steps": 3, "songs": 2, "one_s": 1.0, "all_s": 1.5, "ratio": 1.33}
    assert read_result(written(songs)).figures == {"one_s": 1.0, "all_s": 1.5, "ratio": 1.33}


@pytest.mark.parametrize(
    "document",
    [
        "", "{", "\0", "[]", "3", '"words"', "null", "{}", '{"encode_s": "fast"}', '{"encode_s": true}',
        '{"encode_s": NaN}', '{"encode_s": Infinity}', '{"encode_s": -1}', '{"encode_s": 0}', '{"runs": {}}',
        '{"runs": {"a": []}}', '{"runs": {"a": 3}}', '{"runs": {"a": [3]}}', '{"runs": {"a": [{}]}}',
        '{"runs": [3]}', '{"runs": [{"encode_s": 1}]}',
        '{"decode_ms_per_step": {"1": []}}', '{"lengths": 4}', '{"lengths": {"given": 4}}', "[" * 100_000,
        '{"encode_s": ' + "9" * 400 + "}", '{"encode_s": ' + "9" * 5000 + "}", '{"encode_s": 1e400}',
        '{"encode_s": 1e-320}', '{"encode_s": 1, "gpu": NaN}',
    ],
)  # fmt: skip
def test_files_that_are_no_results(written, document):
    with pytest.raises(OptionError) as caught:
        read_result(written(document))
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith("--compare ")
    assert message.endswith(f": {FIX}")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "huge").write_bytes(b" " * (SIZE_LIMIT + 1))
    for path in (tmp_path / "absent", tmp_path, tmp_path / "binary", tmp_path / "huge", tmp_path / "\0"):
        with pytest.raises(OptionError, match=r"^--compare [^\n]*: give one that [^\n]*$"):
            read_result(path)


def test_what_fits_no_memory_is_one_line(capsys):
    arguments = ["bench", "--bundle", str(demo_bundle_path()), "--steps", "1", "--repeat", "1", "--segments"]
    assert cli.main([*arguments, str(2**31 - 1)]) == 2
    assert capsys.readouterr().err == (
        "mt3-run: error: so much does not fit into memory at once: give fewer segments, songs or streams\n"
    )
    with pytest.raises(SystemExit):
        cli.main([*arguments, str(2**31)])
    assert "2147483648 is more than 2147483647" in capsys.readouterr().err


def test_the_command_compares_with_its_own_output(capsys, tmp_path):
    options = ["bench", "--bundle", str(demo_bundle_path()), "--segments", "1", "--steps", "2", "--repeat", "1"]
    assert cli.main([*options, "--threads", "1", "--json"]) == 0
    earlier = capsys.readouterr().out
    path = tmp_path / "earlier.json"
    path.write_text(earlier)
    assert cli.main([*options, "--threads", "2", "--json", "--compare", str(path)]) == 0
    result = json.loads(capsys.readouterr().out)
    old, found = json.loads(earlier), result["compared"]
    assert found["differs"] == {"threads": {"old": 1, "new": 2}}
    assert found["only_old"] == found["only_new"] == []
    assert found["command"] == old["command"]
    assert set(found["figures"]) == {
        "load_s", "encode_s", "total_s", "peak_rss_mb", "decode_ms_per_step, rows 1",
    }  # fmt: skip
    row = found["figures"]["decode_ms_per_step, rows 1"]
    values = (old["decode_ms_per_step"]["1"], result["decode_ms_per_step"]["1"])
    assert (row["old"], row["new"]) == values
    assert row["new_over_old"] == values[1] / values[0]
    assert f"threads: {1} -> {2}" in bench_module.to_text(result)


def test_a_wrong_file_is_told_before_anything_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_module, "load", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["bench", "--compare", str(tmp_path / "absent.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mt3-run: error: --compare ")
    assert captured.err.count("\n") == 1
