"""The charts of the lab's report: marks are where the numbers are, inside the frame, with names apart."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from lab_cases import LAYERS, combination, estimate, example
from mt3_export.lab import wording
from mt3_export.lab.report.divergence import survival
from mt3_export.lab.report.markup import element
from mt3_export.lab.report.page import page
from mt3_export.lab.report.scales import Box, Scale, decimals, linear, logarithmic, place, spread, text_width
from mt3_export.lab.results import FreeRun, LayerError
from report_pages import Tree, parse, tips, wide


def coordinates(node):
    """All x and all y of a mark, whatever it is; slanted names are placed by their anchor."""
    a = {key: value for key, value in node.attributes.items() if value}
    if node.tag == "path":
        absolute = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", a["d"])
        return [float(x) for x, _ in absolute], [float(y) for _, y in absolute]
    if node.tag == "polygon":
        pairs = [tuple(map(float, pair.split(","))) for pair in a["points"].split()]
        return [x for x, _ in pairs], [y for _, y in pairs]
    xs = [float(a[key]) for key in ("x", "x1", "x2", "cx") if key in a]
    ys = [float(a[key]) for key in ("y", "y1", "y2", "cy") if key in a]
    if node.tag == "rect":
        assert float(a["width"]) >= 0
        assert float(a["height"]) >= 0
        xs.append(xs[0] + float(a["width"]))
        ys.append(ys[0] + float(a["height"]))
    return xs, ys


MARKS = ("path", "line", "circle", "rect", "text", "polygon")


@pytest.mark.parametrize("reference", [True, False])
def test_drawings_stay_inside_their_frames(reference):
    source = page(example(reference=reference), ())
    assert not re.search(
        r"\b(nan|inf|None)\b", re.sub(r"<[^>]*aria-label[^>]*>", "", source).lower().replace("none", "")
    )
    drawings = list(Tree(source).root.all("svg"))
    assert len(drawings) >= 2 + 5 + 2 + 2 * len(LAYERS)
    for svg in drawings:
        _, _, width, height = map(float, svg.attributes["viewbox"].split())
        assert (float(svg.attributes["width"]), float(svg.attributes["height"])) == (width, height)
        marks = [mark for tag in MARKS for mark in svg.all(tag)]
        assert len(marks) > 5
        for mark in marks:
            xs, ys = coordinates(mark)
            assert xs
            assert min(xs) >= -1e-6
            assert max(xs) <= width + 1e-6
            assert min(ys) >= -1e-6
            assert max(ys) <= height + 1e-6


def test_points_of_the_speed_plot_are_where_the_numbers_are():
    results = example()
    found = tips(wide(parse(results), "Speed against accuracy"))
    timed = [c for c in results.combinations if c.speed]
    places = np.array([next(at for tip, at in found.items() if tip.startswith(f"{c.name}:")) for c in timed])
    speeds = np.array([c.speed.times_realtime for c in timed])
    scores = np.array([c.against_reference.scores["onset"].mean for c in timed])
    for numbers, pixels, sign in ((speeds, places[:, 0], 1), (scores, places[:, 1], -1)):
        slope, offset = np.polyfit(numbers, pixels, 1)
        assert slope * sign > 0
        np.testing.assert_allclose(slope * numbers + offset, pixels, atol=0.02)
    emulated = [at for tip, at in found.items() if "emulated" in tip]
    assert len(emulated) == 2
    assert min(x for x, _ in emulated) > places[:, 0].max() + 10, "in a strip of their own"


def test_error_bars_are_those_of_the_difference_from_fp32():
    results = example()
    svg = wide(parse(results), "Speed against accuracy")
    bars = [mark.attributes for mark in svg.all("line", "bar")]
    found = tips(svg)
    c = next(c for c in results.combinations if c.name == "w4-cpu")
    x, y = next(at for tip, at in found.items() if tip.startswith("w4-cpu:"))
    bar = next(bar for bar in bars if float(bar["x1"]) == x)
    loss = c.against_reference.loss["onset"]
    scores = [each.against_reference.scores["onset"].mean for each in (c, results.combinations[0])]
    _, zero = next(at for tip, at in found.items() if tip.startswith("fp32-cpu:"))
    per_f1 = (y - zero) / (scores[1] - scores[0])
    length = float(bar["y1"]) - float(bar["y2"])
    assert length == pytest.approx(per_f1 * (loss.high - loss.low), abs=0.03)


def test_a_wide_range_of_speeds_is_logarithmic():
    results = example()
    slow = combination("slow", 1e-2, 1.5, 40, 0.0)
    found = tips(wide(parse(replace(results, combinations=(*results.combinations, slow))), "Speed against accuracy"))
    xs = [next(x for tip, (x, _) in found.items() if tip.startswith(f"{name}:")) for name in ("slow-cpu", "fp32-cpu")]
    third = next(x for tip, (x, _) in found.items() if tip.startswith("int8-cpu:"))
    assert (third - xs[1]) / (xs[1] - xs[0]) == pytest.approx(math.log(37.8 / 21) / math.log(21 / 1.5), abs=1e-3)


def test_layers_stand_in_order_at_the_logarithm_of_their_error():
    results = example()
    svg = wide(parse(results), "Error by layer: encoder")
    found = tips(svg)
    errors = [layer for layer in results.combinations[3].layers if layer.graph == "encoder"]
    places = np.array([next(at for tip, at in found.items() if tip.startswith(f"int8, {e.layer}:")) for e in errors])
    assert all(above < below for above, below in pairwise(places[:, 1]))
    slope, offset = np.polyfit([math.log(e.relative) for e in errors], places[:, 0], 1)
    assert slope > 0
    np.testing.assert_allclose(slope * np.log([e.relative for e in errors]) + offset, places[:, 0], atol=0.05)
    names = {next(group.all("title")).text for group in svg.all("g") if any(group.all("title"))}
    assert names == set(LAYERS["encoder"])


def test_layers_that_are_as_in_fp32_have_no_mark():
    results = example()
    w8 = results.combinations[5]
    kept = LAYERS["decode_step"][4]
    layers = tuple(
        replace(layer, relative=0.0) if layer.graph == "encoder" or layer.layer == kept else layer
        for layer in w8.layers
    )
    root = parse(replace(results, combinations=(results.combinations[0], replace(w8, layers=layers))))
    titles = [b.text for figure in root.all("figure") for b in figure.all("b") if "Error by layer" in b.text]
    assert titles == ["Error by layer: cross_kv", "Error by layer: decode_step"]
    svg = wide(root, "Error by layer: decode_step")
    marked = {tip.split(": ")[0].removeprefix("w8, ") for tip in tips(svg)}
    assert marked == set(LAYERS["decode_step"]) - {kept}
    lengths = [len(re.findall("[ML]", mark.attributes["d"])) for mark in svg.all("path", "trace")]
    assert lengths == [4, len(LAYERS["decode_step"]) - 5], "the line has a gap there"
    both = parse(replace(results, combinations=(*results.combinations[:2], replace(w8, layers=layers))))
    assert "w8 as in fp32" in next(f for f in both.all("figure") if "layer: encoder" in f.text).text


def test_what_is_not_finite_is_a_cross_at_the_edge():
    results = example()
    fp16 = results.combinations[1]
    layers = (*fp16.layers[:3], LayerError("encoder", fp16.layers[3].layer, 0.0, 1e5, 7), *fp16.layers[4:])
    graphs = (replace(fp16.graphs[0], non_finite=7), *fp16.graphs[1:])
    broken = replace(fp16, layers=layers, graphs=graphs, fallback_rows=3)
    root = parse(replace(results, combinations=(results.combinations[0], broken, *results.combinations[2:])))
    crosses = list(wide(root, "Error by layer: encoder").all("path", "cross"))
    assert [next(cross.all("title")).text for cross in crosses] == [
        f"fp16, {fp16.layers[3].layer}: 7 numbers not finite"
    ]
    assert [b.text for b in next(root.all("table", "graphs")).all("b")] == ["7"]
    assert "3 rows again in fp32" in root.text


def test_survival_is_the_share_of_rows_that_are_still_equal():
    rng = np.random.default_rng(3)
    first = tuple(int(step) for step in rng.integers(-1, 9, 50))
    corners = survival(FreeRun(tuple("x" * 50), first, (12,) * 50), 12)
    assert corners[0] == (0, 1.0)
    assert corners[-1][0] == 12
    for step in range(13):
        share = sum(at < 0 or at > step for at in first) / 50
        assert [value for at, value in corners if at <= step][-1] == pytest.approx(share, abs=1e-12)


def test_every_row_that_left_is_a_tick():
    results = example()
    root = parse(results)
    svg = wide(root, "Still equal to fp32 after n steps")
    ticks = [len(re.findall("M", path.attributes["d"])) for path in svg.all("path", "rug")]
    left = [sum(step >= 0 for step in c.free.first) for c in results.combinations if c.free]
    assert ticks == left
    assert all(f"{count} of 200 differ" in svg.text for count in left)


def test_many_combinations_have_names_that_do_not_overlap():
    results = example()
    more = tuple(combination(f"variant-{index}", 0.01 + index / 1e3, 30, 50, 1e-4 * index) for index in range(12))
    for drawing in parse(replace(results, combinations=(*results.combinations, *more))).all("svg"):
        if "Speed against" not in drawing.attributes["aria-label"]:
            continue
        names = [
            (float(t.attributes["x"]), float(t.attributes["y"]), t.text, t.attributes)
            for t in drawing.all("text", "name")
        ]
        assert len(names) == 20
        boxes = [name_box(*name) for name in names]
        assert not any(a.meets(b) for i, a in enumerate(boxes) for b in boxes[:i])


def name_box(x, y, text, attributes):
    size = float(attributes["font-size"])
    width = text_width(text, size) * 0.99
    left = x - width / 2 if attributes["text-anchor"] == "middle" else x
    return Box(left, y - 0.9 * size, left + width, y + 0.2 * size)


def test_spread_moves_labels_apart_and_no_further_than_needed():
    rng = np.random.default_rng(5)
    for _ in range(200):
        count = int(rng.integers(1, 9))
        sizes = rng.uniform(5, 20, count).tolist()
        wanted = rng.uniform(0, 200, count).tolist()
        centres = spread(wanted, sizes, 0, 200)
        order = np.argsort(centres)
        for before, after in pairwise(order):
            assert centres[after] - centres[before] >= (sizes[before] + sizes[after]) / 2 - 1e-9
        assert all(centre - size / 2 >= -1e-9 for centre, size in zip(centres, sizes, strict=True))
        assert all(centre + size / 2 <= 200 + 1e-9 for centre, size in zip(centres, sizes, strict=True))
    apart = [20.0, 60.0, 150.0]
    assert spread(apart, [10, 10, 10], 0, 200) == apart


def test_placed_boxes_meet_nothing():
    rng = np.random.default_rng(6)
    frame = Box(0, 0, 600, 400)
    for _ in range(20):
        points = [(float(x), float(y)) for x, y in rng.uniform((100, 100), (500, 300), (10, 2))]
        taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in points]
        boxes = place(points, [(70, 16)] * 10, frame, taken[:5], taken[5:])
        for index, box in enumerate(boxes):
            assert box.within(frame)
            assert not any(box.meets(other) for other in [*boxes[:index], *taken])


@pytest.mark.parametrize(("low", "high"), [(0.9, 0.93), (0, 1), (17, 41), (-0.004, 0.03), (0, 1024)])
def test_linear_ticks_are_round_and_inside(low, high):
    scale = Scale(low, high, 0, 100)
    ticks = scale.ticks(6)
    assert 2 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert np.ptp(np.diff(ticks)) < 1e-9
    shown = [f"{tick:.{decimals(ticks)}f}" for tick in ticks]
    assert [float(text) for text in shown] == pytest.approx(ticks, abs=1e-12)
    assert [scale.at(tick) for tick in (low, high)] == [0, 100]


@pytest.mark.parametrize(("low", "high"), [(1e-7, 1.0), (3.0, 4.5), (0.02, 0.9), (1.5, 40.0), (1e-30, 1e30)])
def test_logarithmic_ticks_are_round_and_inside(low, high):
    ticks = Scale(low, high, 0, 100, log=True).ticks(6)
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    assert [float(f"{tick:.2g}") for tick in ticks] == pytest.approx(ticks, rel=1e-12)


def test_scales_of_one_number_and_of_none():
    assert linear([0.5], 0, 100).at(0.5) == pytest.approx(50, abs=1e-4)
    assert logarithmic([7.0], 0, 100).at(7.0) == pytest.approx(50)
    assert logarithmic([0.0], 0, 100).at(1.0) == pytest.approx(50)
    assert logarithmic([1.0, 10.0], 0, 100, margin=0).at(math.sqrt(10)) == pytest.approx(50)


def test_coordinates_must_be_finite():
    with pytest.raises(ValueError, match="coordinate"):
        element("circle", cx=math.nan)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.size(203_400_000), "203 MB"),
        (wording.size(1_234_000_000), "1.23 GB"),
        (wording.size(12), "12 bytes"),
        (wording.duration(0.00482), "4.8 ms"),
        (wording.duration(0.0712), "71.2 ms"),
        (wording.duration(1.5), "1.5 s"),
        (wording.duration(560), "9 min"),
        (wording.duration(9000), "2 h 30 min"),
        (wording.percent(1.0), "100\u202f%"),
        (wording.percent(0.99999), "99.999\u202f%"),
        (wording.percent(0.0), "0\u202f%"),
        (wording.percent(0.5), "50\u202f%"),
        (wording.percent(1e-12), "under 0.001\u202f%"),
        (wording.points(-0.0012), "\u22120.12"),
        (wording.points(-1e-9), "0.00"),
        (wording.points(0.213), "21.3"),
        (wording.points_range(estimate(0.002, 0.003)), "[\u22120.10, 0.50]"),
        (wording.allowance(0.002), "0.2"),
        (wording.significant(0), "0"),
        (wording.significant(0.000123), "0.000123"),
        (wording.significant(3.3895e38), "3.4\u202f\u00d7\u202f10\u00b3\u2078"),
        (wording.significant(-2.5e-7, 2), "\u22122.5\u202f\u00d7\u202f10\u207b\u2077"),
        (wording.significant(65504, 5), "65,504"),
        (wording.factor(1.84), "1.8\u202f\u00d7"),
        (wording.factor(37.84), "37.8\u202f\u00d7"),
        (wording.counted(1, "clip"), "1 clip"),
        (wording.counted(1200, "clip"), "1,200 clips"),
    ],
)
def test_numbers_as_people_read_them(written, expected):
    assert written == expected
