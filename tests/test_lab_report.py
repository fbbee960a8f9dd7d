"""The lab's report: its structure, its tables, and what it makes of missing parts and hostile text."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from lab_cases import LAYERS, example, fp32
from mt3_export.lab import wording
from mt3_export.lab.overlays import Picture
from mt3_export.lab.report.page import page, write_report
from mt3_export.lab.results import Combination, FreeRun, Scored, Suspect, read_results, to_json
from mt3_runtime.errors import OutputError
from report_pages import NUMBER, Node, Tree, parse, png, summary_rows, tips, walk, wide


def test_every_figure_has_a_title_and_says_what_it_shows():
    root = parse(example(), (Picture("Worst clip: a", "said", png()),))
    figures = list(root.all("figure"))
    assert len(figures) == 1 + 2 + 1 + len(LAYERS) + 1 + 1
    for figure in figures:
        caption = next(figure.all("figcaption"))
        assert len(next(caption.all("b")).text) > 5
        assert len(next(caption.all("span")).text) > 3
    for svg in root.all("svg"):
        assert svg.attributes["role"] == "img"
        assert len(svg.attributes["aria-label"]) > 30
    titles = [section.attributes["id"] for section in root.all("section") if "id" in section.attributes]
    assert titles == [link.attributes["href"][1:] for link in next(root.all("nav")).all("a")]
    ids = [node.attributes["id"] for tag in ("section", "input") for node in root.all(tag) if "id" in node.attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("reference", [True, False])
def test_no_number_has_more_digits_than_people_read(reference):
    texts = parse(example(reference=reference)).text
    assert not re.search(r"\d\.\d{7,}", re.sub(r"\b[0-9a-f]{64}\b", "", texts))
    assert "e-0" not in texts


def test_the_table_has_every_combination_with_its_numbers():
    results = example()
    heads, rows = summary_rows(parse(results))
    assert list(rows) == [c.name for c in results.combinations]
    assert heads[:6] == ["Size", "Load", "Segment", "Step", "Throughput", "Memory"]
    for c in results.combinations:
        cells = rows[c.name]
        if c.outcome != "done":
            assert len(cells) == 1
            assert c.problem in cells[0].text
            continue
        shown = dict(zip(enumerate(heads), cells, strict=True))
        by_head = {}
        for (_, head), cell in shown.items():
            by_head.setdefault(head, []).append(cell.text)
        if c.speed:
            assert by_head["Throughput"] == [f"{c.speed.times_realtime:g}\u202f\u00d7"]
            assert by_head["Size"] == [f"{c.size_bytes / 1e6:g} MB"]
            assert by_head["Segment"] == [f"{c.speed.latency_ms:.1f}".removesuffix(".0") + " ms"]
        else:
            assert by_head["Throughput"] == by_head["Size"] == by_head["Memory"] == [wording.NONE]
        for head, name in (("Onset F1", "onset"), ("Drums", "drums"), ("Leakage", "leakage")):
            for cell, scored in zip(by_head[head], (c.against_reference, c.against_fp32), strict=True):
                if c.name == "fp32-cpu" and scored is c.against_fp32:
                    assert cell == wording.NONE
                    continue
                score = scored.scores[name]
                told = f"{score.mean:.3f}{score.low:.3f}{wording.DASH}{score.high:.3f}"
                if scored.loss:
                    numbers = [f"{100 * getattr(scored.loss[name], end):.2f}" for end in ("mean", "low", "high")]
                    wanted = [float(text) for text in numbers]
                    found = NUMBER.findall(cell.removeprefix(told).replace(wording.MINUS, "-"))
                    assert [float(text) for text in found] == pytest.approx(wanted, abs=0.06)
                assert cell.startswith(told)


def test_the_best_of_each_column_is_marked():
    results = example()
    heads, rows = summary_rows(parse(results))

    def best(head):
        column = heads.index(head)
        cells = {name: cells[column] for name, cells in rows.items() if len(cells) > 1}
        return {name for name, cell in cells.items() if any(cell.all("span", "best"))}

    assert best("Throughput") == best("Size") == best("Segment") == {"int8-cpu"}
    assert best("Memory") == best("Load") == set(), "all are alike"
    assert best("KL, nats") == {"fp16-cpu"}
    assert "w4-cpu" not in best("Onset F1")


def test_the_recommended_row_is_marked():
    root = parse(example())
    chosen = list(root.all("tr", "chosen"))
    assert len(chosen) == 1
    assert "w8" in chosen[0].text
    assert "recommended" in chosen[0].text
    emulated = [row.text for row in next(root.all("table", "summary")).all("tr") if "emulated" in row.text]
    assert [row[:4] for row in emulated] == ["fp16", "bf16"]


def test_suspects_are_ranked_and_what_is_kept_is_marked():
    results = example()
    bisection = results.bisections[0]
    root = parse(results)
    items = list(next(root.all("ol", "suspects")).all("li"))
    assert [next(item.all("span", "what")).text for item in items] == [
        f"{s.graph} {s.layer}" for s in bisection.suspects[: len(items)]
    ]
    for item, suspect in zip(items, bisection.suspects, strict=False):
        kept = suspect.layer in bisection.kept.get(suspect.graph, ())
        assert ("kept" in item.attributes.get("class", "")) == kept
        width = float(NUMBER.search(next(item.all("i")).attributes["style"]).group())
        assert width == pytest.approx(100 * suspect.cost / bisection.suspects[0].cost, abs=0.06)
    assert "and 3 that cost less" in root.text
    none = replace(bisection, suspects=(), kept={})
    assert "No product was singled out" in parse(replace(results, bisections=(none,))).text
    overflow = replace(bisection, suspects=(Suspect("encoder", "projection", 0.0, 0.0, 12), *bisection.suspects))
    first = next(next(parse(replace(results, bisections=(overflow,))).all("ol", "suspects")).all("li"))
    assert "12 steps not finite" in first.text
    assert "100.0%" in next(first.all("i")).attributes["style"]


HOSTILE = "</style></title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\u202e\x07"


def hostile(value):
    """The same results with hostile text wherever there is text of data."""
    free = value.combinations[3].free
    layers = tuple(replace(layer, layer=f"{layer.layer}{HOSTILE}") for layer in value.combinations[3].layers)
    clips = tuple(replace(clip, name=f"{clip.name}{HOSTILE}") for clip in value.combinations[3].clips)
    worse = replace(
        value.combinations[3],
        free=replace(free, names=tuple(name + HOSTILE for name in free.names)),
        layers=layers,
        clips=clips,
        precision=f"int8{HOSTILE}",
        device=f"cpu{HOSTILE}",
    )
    failed = replace(value.combinations[-1], problem=HOSTILE, precision=HOSTILE)
    bisection = value.bisections[0]
    suspects = tuple(replace(s, layer=s.layer + HOSTILE, graph=s.graph + HOSTILE) for s in bisection.suspects)
    kept = {graph + HOSTILE: tuple(name + HOSTILE for name in names) for graph, names in bisection.kept.items()}
    return replace(
        value, model=HOSTILE, bundle=HOSTILE, audio=HOSTILE, machine=HOSTILE, command=HOSTILE, bundle_sha256=HOSTILE,
        versions={HOSTILE: HOSTILE},
        combinations=(*value.combinations[:3], worse, *value.combinations[4:-1], failed),
        bisections=(replace(bisection, precision=HOSTILE, suspects=suspects, kept=kept, plan=HOSTILE),),
    )  # fmt: skip


def test_hostile_text_stays_text():
    pictures = (Picture("Worst clip", "said", png()),)
    plain = Counter(node.tag for node in walk(parse(example(), pictures)))
    source = page(hostile(example()), (Picture(HOSTILE, HOSTILE, png()), Picture(HOSTILE, HOSTILE, b"")))
    root = Tree(source).root
    nodes = list(walk(root))
    assert set(plain) >= {node.tag for node in nodes}
    for tag in ("script", "iframe", "object", "form"):
        assert not any(root.all(tag))
    assert len(list(root.all("style"))) == 1
    assert [child.tag for child in next(root.all("head")).children if isinstance(child, Node)][-2:] == [
        "title",
        "style",
    ]
    assert len(list(root.all("img"))) == 1
    for node in nodes:
        assert not any(name.startswith("on") for name in node.attributes)
        for name in ("src", "href"):
            assert (node.attributes.get(name) or "#").startswith(("#", "data:"))
    assert "alert(1)" in root.text
    assert "\u202e" not in source
    assert "\x07" not in source


def test_nothing_is_fetched_and_no_script_runs():
    source = page(example(), (Picture("a", "b", png()),))
    assert "default-src 'none'" in source
    assert not re.search(r"<script|javascript:|https?://|url\(|@import", source)


def nothing_but(results, *names):
    return replace(results, combinations=tuple(c for c in results.combinations if c.name in names), bisections=())


@cache
def missing_parts():
    full = example()
    alone = nothing_but(full, "fp32-cpu")
    failed = replace(full, combinations=tuple(
        Combination(c.precision, c.device, c.emulated, "failed", "broke: mend it") for c in full.combinations
    ))  # fmt: skip
    bare = tuple(replace(Combination(c.precision, c.device, c.emulated, "done"), problem="") for c in full.combinations)
    empty = Scored({}, {})
    unscored = tuple(
        replace(c, against_fp32=empty, against_reference=empty, clips=(), free=FreeRun((), (), ()))
        for c in full.combinations
    )
    tokens_only = tuple(
        replace(c, forced=replace(c.forced, kl_mean=None, kl_p99=None, kl_max=None), layers=()) if c.forced else c
        for c in full.combinations
    )
    exact = replace(
        full.combinations[3],
        graphs=tuple(replace(g, max=0.0, relative=0.0, cosine=1.0, psnr_db=None) for g in full.combinations[3].graphs),
        layers=tuple(replace(layer, relative=0.0, largest=0.0) for layer in full.combinations[3].layers),
        free=replace(full.combinations[3].free, first=(-1,) * 200),
    )
    one = replace(full.combinations[3], layers=full.combinations[3].layers[:1])
    return {
        "nothing": replace(full, combinations=(), bisections=(), versions={}),
        "fp32 alone": alone,
        "all failed": failed,
        "bare": replace(full, combinations=bare, bisections=()),
        "unscored": replace(full, combinations=unscored),
        "tokens only": replace(full, combinations=tokens_only),
        "exact": replace(full, combinations=(full.combinations[0], exact)),
        "one layer": replace(full, combinations=(full.combinations[0], one)),
        "emulated only": nothing_but(full, "fp32-cpu", "fp16-cpu", "bf16-cpu"),
        "no reference": example(reference=False),
        "one clip": example(count=1),
    }


@pytest.mark.parametrize("case", list(missing_parts()))
def test_missing_parts_are_left_out_or_named(case):
    results = missing_parts()[case]
    root = parse(results)
    for svg in root.all("svg"):
        marks = [mark for tag in ("circle", "path", "polygon") for mark in svg.all(tag)]
        assert marks, "no empty chart"
    for section in root.all("section", "block"):
        assert len(section.text) > len(next(section.all("h2")).text) + 20
    assert len(list(next(next(root.all("table", "summary")).all("tbody")).all("tr"))) == len(results.combinations)
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", root.text.lower())


def test_missing_parts_are_said():
    cases = missing_parts()
    texts = {case: parse(results).text for case, results in cases.items()}
    assert "Nothing was both timed and scored" in texts["nothing"]
    assert "Nothing was bisected" in texts["fp32 alone"]
    assert "broke: mend it" in texts["all failed"]
    assert "There are no piano rolls" in texts["no reference"]
    assert "there was no reference MIDI" in texts["no reference"]
    assert "Speed, size and memory of fp16, bf16" in texts["emulated only"]
    assert "KL, nats" not in texts["tokens only"], "a column without numbers"
    drawn = {case: len(list(parse(results).all("svg"))) for case, results in cases.items()}
    assert drawn["nothing"] == drawn["fp32 alone"] == drawn["all failed"] == 0


def test_pictures_are_embedded_with_words():
    data = png(123, 45)
    root = parse(example(), (Picture("Worst clip: x", "three notes", data), Picture("Median", "Not drawn: gone", b"")))
    image = next(root.all("img"))
    assert (image.attributes["width"], image.attributes["height"]) == ("123", "45")
    assert "Worst clip: x" in image.attributes["alt"]
    assert "three notes" in image.attributes["alt"]
    assert len(list(root.all("img"))) == 1
    assert "Not drawn: gone" in root.text


def test_the_report_is_made_of_what_the_json_holds(tmp_path):
    results = example()
    path = tmp_path / "results.json"
    path.write_bytes(to_json(results))
    write_report(read_results(path), (), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == page(results, ())
    with pytest.raises(OutputError, match="create the folder"):
        write_report(results, (), tmp_path / "missing" / "report.html")


def test_fp32_is_perfect_against_itself_although_it_was_not_scored():
    results = example(reference=False)
    silent = replace(fp32(reference=False), against_fp32=None)
    root = parse(replace(results, combinations=(silent, *results.combinations[1:])))
    found = tips(wide(root, "Speed against accuracy"))
    assert any(tip.startswith("fp32-cpu: onset F1 1.000") for tip in found)
    assert sum(y for tip, (_, y) in found.items() if tip.startswith("fp32-cpu")) == min(y for _, y in found.values())
