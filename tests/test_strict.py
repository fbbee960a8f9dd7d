"""JSON in, frozen dataclasses out, and nothing but BundleError for everything else."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle_cases import check_message, refusal
from mt3_runtime.errors import BundleError
from mt3_runtime.strict import build, parse_json


@dataclass(frozen=True, slots=True)
class Leaf:
    count: int
    share: float
    flag: bool
    name: str


@dataclass(frozen=True, slots=True)
class Tree:
    kind: Literal["oak", "elm"]
    label: str | None
    sizes: tuple[int | str, ...]
    leaves: tuple[Leaf, ...]
    table: dict[str, Leaf]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")))
LEAVES = st.builds(
    Leaf, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), WORDS
)
TREES = st.builds(
    Tree,
    st.sampled_from(("oak", "elm")),
    st.none() | WORDS,
    st.lists(st.integers(-99, 99) | WORDS).map(tuple),
    st.lists(LEAVES, max_size=3).map(tuple),
    st.dictionaries(WORDS, LEAVES, max_size=3),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
SAMPLE = Tree("oak", None, (1, "rows"), (Leaf(1, 2.0, flag=True, name="x"),), {"a": Leaf(0, -1.5, flag=False, name="")})
GOOD = json.loads(json.dumps(dataclasses.asdict(SAMPLE)))


def parsed(text: str | bytes) -> object:
    return parse_json(text if isinstance(text, bytes) else text.encode(), "tree.json")


@settings(derandomize=True, deadline=None, max_examples=50)
@given(TREES)
def test_what_was_written_is_read_back(tree):
    assert build(Tree, parsed(json.dumps(dataclasses.asdict(tree))), "tree") == tree


@settings(derandomize=True, deadline=None, max_examples=150)
@given(JSON)
def test_any_other_json_is_refused_as_such(data):
    assert refusal(build, Tree, data, "tree").startswith("tree")


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.sampled_from(sorted(GOOD)), JSON)
def test_any_other_value_of_a_field_is_refused_or_taken_as_it_is(field, value):
    data = json.loads(json.dumps({**GOOD, field: value}))
    try:
        tree = build(Tree, data, "tree")
    except BundleError as error:
        message = check_message(error)
    else:
        message = field if json.loads(json.dumps(dataclasses.asdict(tree))) == data else "changed in silence"
    assert field in message


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.binary())
def test_arbitrary_bytes_never_raise_anything_else(text):
    try:
        json.loads(text.decode())
    except ValueError:
        assert refusal(parsed, text).startswith("tree.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("count",), True),
        (("count",), 1.0),
        (("count",), "1"),
        (("count",), None),
        (("count",), 2**63),
        (("count",), -(2**63) - 1),
        (("share",), 1),
        (("share",), True),
        (("share",), "nan"),
        (("share",), float("inf")),
        (("flag",), 1),
        (("flag",), "true"),
        (("name",), 1),
        (("name",), ["x"]),
        (("name",), "two\nlines"),
        (("name",), "\x1b[31mred"),
        (("name",), "\ud800"),
        (("name",), "\u202etxet"),
    ],
)
def test_types_are_exact(path, value):
    leaf = {**GOOD["leaves"][0], path[0]: value}
    assert refusal(build, Leaf, leaf, "leaf").startswith(f"leaf.{path[0]} is not")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "ash"),
        ("kind", ["oak"]),
        ("kind", {}),
        ("label", 1),
        ("label", False),
        ("label", "two\nlines"),
        ("sizes", [True]),
        ("sizes", [1.0]),
        ("sizes", [None]),
        ("sizes", "12"),
        ("sizes", {"0": 1}),
        ("leaves", {}),
        ("leaves", [[]]),
        ("table", []),
        ("table", {"a": None}),
        ("table", None),
    ],
)
def test_containers_and_choices_are_exact(field, value):
    assert refusal(build, Tree, {**GOOD, field: value}, "tree").startswith(f"tree.{field}")


@pytest.mark.parametrize("odd", ["extra", "", "__class__", "x" * 60_000, "a\nb", "\x1b[2J", "\ud800"])
def test_unknown_keys_are_named_but_never_printed_as_they_are(odd):
    message = refusal(build, Tree, {**GOOD, odd: 1}, "tree")
    assert message.startswith("tree: unknown key")
    assert len(message) < 200
    assert len(refusal(build, Tree, {**GOOD, "table": {odd: 1}}, "tree")) < 200


@pytest.mark.parametrize("name", GOOD)
def test_missing_keys_are_named(name):
    rest = {key: value for key, value in GOOD.items() if key != name}
    assert f"no key {name!r}" in refusal(build, Tree, rest, "tree")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 1}',
        '{"a": {"b": 1, "c": 2, "b": 3}}',
        '[{"a": 1}, {"x": 0, "\\u0061": 1, "a": 2}]',  # the same key, spelled in two ways
        '{"": 1, "": 2}',
    ],
)
def test_repeated_keys_are_refused(text):
    assert "stands twice" in refusal(parsed, text)


def test_a_repeated_key_of_any_length_is_cut_in_the_message():
    assert len(refusal(parsed, f'{{"{"k" * 30_000}": 1, "{"k" * 30_000}": 2}}')) < 200


def test_many_keys_take_no_quadratic_time():
    text = "{" + ",".join(f'"{i}":1' for i in range(60_000)) + ',"0":2}'
    start = time.process_time()
    assert "'0' stands twice" in refusal(parsed, text)
    assert time.process_time() - start < 2  # comparing every key with every other takes a minute


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_outside_json_are_refused(constant):
    assert f"{constant} is not JSON" in refusal(parsed, f'{{"a": [{constant}]}}')


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400, "1" * 5000, "-" + "9" * 5000])
def test_numbers_beyond_all_bounds_are_refused(number):
    def read() -> Leaf:
        return build(Leaf, parsed(f'{{"count": 1, "share": {number}, "flag": true, "name": ""}}'), "leaf")

    refusal(read)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"{",
        b"{}x",
        b"{} {}",
        b"'a'",
        b"{a: 1}",
        b"[1,]",
        b"// x\n{}",
        b"\xef\xbb\xbf{}",
        b"\xff",
        b"01",
        b'"\xed\xa0\x80"',
        b'{"a": "\x00"}',
        "{}".encode("utf-16"),
        b'"\n"',
    ],
)
def test_what_is_not_json_is_refused(text):
    assert refusal(parsed, text).startswith("tree.json is not valid JSON")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_of_any_depth_is_refused(opening, closing):
    def read(text: str) -> Tree:
        return build(Tree, parsed(text), "tree")

    good = json.dumps(GOOD)
    for depth in (1, 10, *range(100, 1500, 50), 3_000, 10_000):
        nested = opening * depth + "0" + closing * depth
        refusal(read, nested)
        refusal(read, good.replace('"label": null', f'"label": {nested}'))
        refusal(read, good.replace('"kind": "oak"', f'"kind": {nested}'))
        refusal(read, opening * depth)
