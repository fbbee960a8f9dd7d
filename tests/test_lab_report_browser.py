"""The lab's report in headless Chromium: nothing it complains of, nothing fetched, nothing cut off or overlapping."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from chromium import Browser, find_chromium
from lab_cases import combination, example
from mt3_export.lab.overlays import Picture
from mt3_export.lab.report.page import write_report

EXAMPLE = Path(__file__).parent.parent / "docs" / "precision_example"
PHONE, DESKTOP, SMALLEST_TEXT = 390, 1280, 9.5  # pixels
OVERLAPS = """
[...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width).flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].filter(text => !text.closest('g[transform]'));
  const boxes = texts.map(text => text.getBoundingClientRect());
  return texts.flatMap((one, i) => texts.slice(i + 1).map((two, j) => [one, two, boxes[i], boxes[i + 1 + j]]))
    .filter(([, , a, b]) => a.left < b.right - 1 && b.left < a.right - 1
                         && a.top < b.bottom - 3 && b.top < a.bottom - 3)
    .map(([one, two]) => `${one.textContent} / ${two.textContent}`);
})
"""
SIZES = """
[...document.querySelectorAll('svg text')].filter(text => text.getBoundingClientRect().width)
  .map(text => [parseFloat(getComputedStyle(text).fontSize), text.getCTM()])
  .map(([size, to]) => size * Math.hypot(to.a, to.b))
"""
IMAGES = "[...document.images].map(image => [image.complete, image.naturalWidth, image.naturalHeight])"
CONTRAST = """
(() => {
  const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = light(getComputedStyle(document.querySelector('figure')).backgroundColor);
  return [...document.querySelectorAll('svg text')].map(text => {
    const ink = light(getComputedStyle(text).fill);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); });
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        give_up("no Chromium on the PATH: apt install chromium")
    probe = tmp_path_factory.mktemp("probe") / "probe.html"
    probe.write_text("<!doctype html><title>read</title>")
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(Browser(program))
            opened.open(probe, PHONE)
            seen = opened.evaluate("document.title")
        except (AssertionError, OSError) as error:
            give_up(f"{program} does not start: {error}")
        if seen != "read":
            give_up(f"{program} may not read temporary files")
        yield opened


def give_up(why):
    """A stranger need not have a browser; continuous integration must."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def png(width, height):
    buffer = BytesIO()
    Image.new("RGB", (width, height), "#4e79a7").save(buffer, "PNG")
    return buffer.getvalue()


def crowded():
    """Twelve more combinations, alike and with long names."""
    more = (combination(f"variant-of-int8-{i}", 0.02 + i / 500, 29 + i / 9, 90, 2e-4 * i, count=2) for i in range(12))
    results = example()
    return replace(results, model="m" * 80, command="x" * 400, combinations=(*results.combinations, *more))


CASES = {
    "whole": example(),
    "crowded": crowded(),
    "without reference": example(reference=False),
    "nothing": replace(example(), combinations=(), bisections=()),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    pictures = (Picture("Worst clip", "said", png(2400, 300)), Picture("Median clip", "said", png(900, 200)))
    for name, results in CASES.items():
        write_report(results, pictures, folder / f"{name}.html")
    return folder


def complaints(events):
    """What was logged, thrown, or failed to load."""
    found = []
    for event in events:
        parameters = event.get("params", {})
        if event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in {"error", "warning"}:
            found.append(parameters["entry"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in {"error", "warning", "assert"}:
            found.append(str(parameters["args"]))
        elif event["method"] in {"Runtime.exceptionThrown", "Network.loadingFailed"}:
            found.append(str(parameters))
    return found


def requested(events):
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("case", CASES)
def test_the_report_in_a_browser(browser, reports, case, width, dark):
    path = reports / f"{case}.html"
    browser.open(path, width, dark=dark)
    images = browser.evaluate(IMAGES)
    assert images == [[True, 2400, 300], [True, 900, 200]]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(OVERLAPS) == []
    sizes = browser.evaluate(SIZES)
    assert min(sizes, default=SMALLEST_TEXT) >= SMALLEST_TEXT
    assert bool(sizes) == bool(CASES[case].combinations)
    assert min(browser.evaluate(CONTRAST), default=4.5) >= 4.5, "WCAG AA"
    assert complaints(browser.events) == []
    assert [url for url in requested(browser.events) if not url.startswith("data:")] == [path.as_uri()]


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_example_in_the_documentation(browser, width):
    browser.open(EXAMPLE / "report.html", width)
    images = browser.evaluate(IMAGES)
    assert len(images) == 2
    assert all(complete and across > 800 and down > 100 for complete, across, down in images)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert complaints(browser.events) == []
    fetched = [url for url in requested(browser.events) if not url.startswith("data:")]
    assert fetched == [(EXAMPLE / "report.html").as_uri()]


def test_pictures_can_be_fitted_to_the_page(browser, reports):
    browser.open(reports / "whole.html", DESKTOP)
    shown = "document.images[0].getBoundingClientRect().width"
    assert browser.evaluate(shown) == 2400
    browser.evaluate("document.querySelector('.fit').click()")
    assert 600 < browser.evaluate(shown) < DESKTOP


def test_paper_has_no_more_than_it_can_show(browser, reports):
    browser.open(reports / "whole.html", 1000, media="print")
    assert browser.evaluate("document.querySelector('table.summary').getBoundingClientRect().right") <= 1000
    browser.open(reports / "whole.html", 690, media="print")
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.evaluate("document.images[0].getBoundingClientRect().right") <= 690
    assert browser.evaluate(OVERLAPS) == []
    assert browser.evaluate("[...document.querySelectorAll('.narrow svg')].every(svg => !svg.getClientRects().length)")


def test_what_is_wrong_with_a_page_would_be_seen(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><img src='http://127.0.0.1:9/a.png'><div style='width:3000px'>wide</div><figure></figure>"
        "<svg width=200 height=50><text x=5 y=20 style='font-size:5px'>one</text><text x=6 y=20>two</text>"
        "</svg><script>console.error('told'); throw new Error('thrown')</script>"
    )
    browser.open(path, PHONE)
    assert browser.evaluate(IMAGES) == [[True, 0, 0]]
    assert browser.evaluate("document.documentElement.scrollWidth") > PHONE
    assert browser.evaluate(OVERLAPS) == ["one / two"]
    assert min(browser.evaluate(SIZES)) == 5
    assert "http://127.0.0.1:9/a.png" in requested(browser.events)
    found = " ".join(complaints(browser.events))
    for what in ("told", "thrown", "ERR_"):
        assert what in found
