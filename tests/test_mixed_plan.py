"""Plans as files: what is written is what is read, and nothing else is; what is quantised by them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle_cases import no_blocking, no_open_files_left
from conftest import TINY_FEATURES, TINY_MODEL
from graph_cases import relative_error
from mt3_export import bundle_writer
from mt3_export.checkpoint import Checkpoint
from mt3_export.cli import main
from mt3_export.mixed_plan import (
    PLANNED,
    ROUNDED,
    MixedPlan,
    check_products,
    plans_by_precision,
    read_plan,
    said,
    write_plan,
)
from mt3_export.products import products
from mt3_export.quantize_bundle import quantize_bundle
from mt3_export.toml_file import LIMIT
from mt3_runtime.backends.ort import open_session
from mt3_runtime.bundle import demo_bundle_path, open_bundle
from mt3_runtime.errors import OptionError, OutputError

PLAN = MixedPlan(
    "tiny",
    "int8",
    {"encoder": ("layers.0.qkv",), "decode_step": ("layers.1.feed_forward.output", "head")},
    {"agreement_all": 0.981, "agreement_kept": 0.996, "clips": '12 of "mine"'},
)
GOOD = """# a comment
model = "tiny"
precision = "int8"
[keep]
encoder = ["layers.0.qkv"]
[measured]
runs = 12
"""

# ---- files ----------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
PLANS = st.builds(
    MixedPlan,
    TEXTS,
    st.sampled_from(ROUNDED),
    st.dictionaries(st.sampled_from(PLANNED), st.lists(TEXTS, max_size=4, unique=True).map(tuple)),
    st.dictionaries(TEXTS, st.floats(allow_nan=False, allow_infinity=False) | TEXTS),
)


@given(PLANS, st.text(max_size=60))
def test_what_is_written_is_read(tmp_path_factory, plan, comment):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    write_plan(plan, file, comment)
    assert read_plan(file) == plan
    assert read_plan(file).digest == plan.digest


def test_the_text_is_the_documented_one(tmp_path):
    write_plan(PLAN, tmp_path / "own.toml", "mt3-export precision --bisect int8\nsecond\x1b line\n")
    assert (tmp_path / "own.toml").read_text().splitlines() == [
        "# mt3-export precision --bisect int8",
        "# second\ufffd line",
        'model = "tiny"',
        'precision = "int8"',
        "",
        "[keep]",
        'encoder = ["layers.0.qkv"]',
        'decode_step = ["layers.1.feed_forward.output", "head"]',
        "",
        "[measured]",
        "agreement_all = 0.981",
        "agreement_kept = 0.996",
        'clips = "12 of \\"mine\\""',
    ]


def test_a_plan_that_nobody_could_read_is_not_written(tmp_path):
    file = tmp_path / "own.toml"
    for wrong, problem in [
        (replace(PLAN, keep={"encoder": ("a", "a")}), "names 'a' twice"),
        (replace(PLAN, keep={"features": ()}), "unknown key 'features'"),
        (replace(PLAN, precision="fp32"), "precision is 'fp32'"),
        (replace(PLAN, measured={"kl": float("nan")}), r"measured\.kl is nan"),
        (replace(PLAN, model="\udc80"), "half a character"),
    ]:
        with pytest.raises(OptionError, match=problem):
            write_plan(wrong, file)
        assert not file.exists()
    with pytest.raises(OutputError):
        write_plan(PLAN, tmp_path / "none" / "own.toml")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('model = "tiny"\n', "", "it has no model: add it"),
        ('"tiny"', "3", "model is 3: write a text"),
        ('"int8"', '"int4"', "precision is 'int4': use fp16, bf16, int8, w8, w4"),
        ('"int8"', "[]", "precision is []"),
        ("[keep]", "[kept]", "unknown key 'kept': use keep, measured, model, precision"),
        ("encoder =", "encoders =", "keep has an unknown key 'encoders': use cross_kv, decode_step, encoder"),
        ("encoder =", "features =", "keep has an unknown key 'features'"),
        ('["layers.0.qkv"]', '"layers.0.qkv"', "keep.encoder is not a list"),
        ('["layers.0.qkv"]', "[7]", "keep.encoder is 7: write a text"),
        ('["layers.0.qkv"]', '["a", "b", "a"]', "keep.encoder names 'a' twice: leave one out"),
        ("runs = 12", "runs = [12]", "measured.runs is [12]: write a number or a text"),
        ("runs = 12", "runs = inf", "measured.runs is inf"),
        ("runs = 12", "runs = true", "measured.runs is True"),
        ("runs = 12", "runs = 12:00:00", "measured.runs is datetime.time"),
        ("[keep]", "[keep", "is not TOML"),
        ("runs = 12", f"runs = {'[' * 9000}", "is not TOML"),
        ("runs = 12", f"runs = {'9' * 400}", "is not TOML (a whole number takes more than 64 bits): correct it"),
        ('"tiny"', f"0x{'f' * 9000}", "is not TOML (a whole number takes more than 64 bits)"),
        ("runs = 12", f"runs{'.a' * 2000} = 12", "is not TOML"),
    ],
)
def test_what_is_no_plan_is_refused_with_its_place(tmp_path, old, new, problem):
    assert GOOD.count(old) >= 1
    (tmp_path / "own.toml").write_text(GOOD.replace(old, new, 1))
    with pytest.raises(OptionError) as caught:
        read_plan(tmp_path / "own.toml")
    text = str(caught.value)
    assert "own.toml" in text
    assert problem in text
    assert text.isprintable()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match=r"cannot read plan .*none\.toml .*: name a readable file"):
        read_plan(tmp_path / "none.toml")


def test_what_is_no_small_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.toml").symlink_to("/dev/zero")
    with no_blocking(), no_open_files_left():
        for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path / "link.toml", tmp_path):
            with pytest.raises(OptionError, match=r"^plan [^ ]* is a folder, a pipe or a device: name a file$"):
                read_plan(path)
        (tmp_path / "long.toml").write_text(f"{GOOD}\n#" + "x" * (LIMIT - len(GOOD) - 2))
        assert read_plan(tmp_path / "long.toml").model == "tiny"
        (tmp_path / "long.toml").write_text(f"{GOOD}\n#" + "x" * (LIMIT - len(GOOD) - 1))
        with pytest.raises(OptionError, match=r"^plan [^ ]* is larger than 1048576 bytes: name another file$"):
            read_plan(tmp_path / "long.toml")


def test_the_digest_is_of_what_is_obeyed():
    turned = {"decode_step": ("head", "layers.1.feed_forward.output"), "memory": (), "encoder": ("layers.0.qkv",)}
    assert replace(PLAN, keep=turned, measured={}).digest == PLAN.digest
    others = [
        replace(PLAN, model="other"),
        replace(PLAN, precision="w8"),
        replace(PLAN, keep={**PLAN.keep, "encoder": ("layers.1.qkv",)}),
        replace(PLAN, keep={"decode_step": PLAN.keep["encoder"], "encoder": PLAN.keep["decode_step"]}),
    ]
    assert len({plan.digest for plan in (PLAN, *others)}) == 5
    assert said([PLAN]) == {"plan int8": f"{PLAN.digest[:12]} (3 in fp32)"}


def test_plans_are_checked_against_the_model():
    graphs = ("encoder", "cross_kv", "decode_step")
    assert plans_by_precision([PLAN], "tiny", graphs) == {"int8": PLAN}
    with pytest.raises(OptionError, match="is of model 'tiny', not of mt3: give its own"):
        plans_by_precision([PLAN], "mt3", graphs)
    with pytest.raises(OptionError, match="two plans for int8: give one"):
        plans_by_precision([PLAN, PLAN], "tiny", graphs)
    with pytest.raises(OptionError, match="keeps 'prefix', no graph of the model: use"):
        plans_by_precision([replace(PLAN, keep={"prefix": ()})], "tiny", graphs)


def test_wrong_names_get_the_nearest_right_ones():
    names = ["layers.0.qkv", "layers.0.output", "layers.1.qkv", "head"]
    check_products(PLAN, "encoder", names)
    with pytest.raises(
        OptionError, match=r"keeps 'layer\.0\.qvk', no product of encoder: use layers\.0\.qkv, layers\.1"
    ):
        check_products(replace(PLAN, keep={"encoder": ("layer.0.qvk",)}), "encoder", names)
    with pytest.raises(OptionError, match=r"'#', no product of encoder: use layers\.0\.qkv, layers\.0\.output, layers"):
        check_products(replace(PLAN, keep={"encoder": ("#",)}), "encoder", names)
    with pytest.raises(OptionError, match="leave it out"):
        check_products(PLAN, "encoder", [])


def test_plans_need_neither_torch_nor_onnx():
    code = "import sys, mt3_export.mixed_plan; print({'torch', 'onnx', 'onnx_ir'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- 8 and 4 bits ---------------------------------------------------------------------------------------------------


def kept_of(bundle, graph, precision):
    """Products that are left with weights in float32."""
    return list(products(ir.load(bundle.path / bundle.graph(graph, "ort", precision).file).graph))


def test_products_that_stay_as_they_are_cannot_be_kept(tiny_bundle, tmp_path):
    plan = replace(PLAN, precision="w8", keep={"encoder": ("layers.0.qkv",)})
    with pytest.raises(OptionError, match="keeps products of encoder, which w8 leaves in fp32 anyway: leave them out"):
        quantize_bundle(tiny_bundle, tmp_path / "new", (), plans=[plan])
    assert list(tmp_path.iterdir()) == []


def test_quantize_keeps_what_the_plan_names(tiny_folder, tmp_path, capsys):
    write_plan(PLAN, tmp_path / "int8.toml")
    write_plan(replace(PLAN, precision="w8", keep={"decode_step": ("layers.1.qkv",)}), tmp_path / "w8.toml")
    plans = ["--plan", str(tmp_path / "int8.toml"), "--plan", str(tmp_path / "w8.toml")]
    assert main(["quantize", str(tiny_folder), *plans, "--precision", "w4", "--output", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().err.endswith(" and w4, int8, w8\n")
    bundle = open_bundle(tmp_path / "new")
    assert kept_of(bundle, "encoder", "int8") == ["layers.0.qkv"]
    assert kept_of(bundle, "decode_step", "int8") == ["layers.1.feed_forward.output", "head"]
    assert kept_of(bundle, "cross_kv", "int8") == kept_of(bundle, "decode_step", "w4") == []
    assert bundle.graph("encoder", "ort", "w8").file == bundle.graph("encoder", "ort", "fp32").file
    tools = bundle.manifest.origin.tools
    assert tools["plan int8"] == f"{PLAN.digest[:12]} (3 in fp32)"
    assert [name for name in tools if name.startswith("plan")] == ["plan int8", "plan w8"]
    assert main(["inspect", str(tmp_path / "new")]) == 0
    assert f"plan int8 {PLAN.digest[:12]} (3 in fp32)" in capsys.readouterr().out


def test_with_a_plan_alone_its_precision_is_written(tiny_folder, tmp_path):
    write_plan(replace(PLAN, precision="w8", keep={}), tmp_path / "w8.toml")
    plan = ["--plan", str(tmp_path / "w8.toml")]
    assert main(["quantize", str(tiny_folder), *plan, "--output", str(tmp_path / "new")]) == 0
    assert {entry.precision for entry in open_bundle(tmp_path / "new").manifest.graphs} == {"fp32", "w8"}


def test_a_graph_with_all_products_kept_computes_as_in_fp32(tiny_bundle, tmp_path):
    names = tuple(kept_of(tiny_bundle, "encoder", "fp32"))
    plan = MixedPlan("tiny", "int8", {"encoder": names})
    plain, kept = (
        open_bundle(quantize_bundle(tiny_bundle, tmp_path / name, ["int8"], plans=plans))
        for name, plans in (("plain", ()), ("kept", (plan,)))
    )
    features = np.random.default_rng(3).standard_normal((1, 256, 512)).astype(np.float32)

    def states(bundle, precision):
        session = open_session(bundle, bundle.graph("encoder", "ort", precision), threads=1)
        return session.run(None, {"features": features})[0]

    exact = states(tiny_bundle, "fp32")
    assert relative_error(states(plain, "int8"), exact) > 1e-3
    np.testing.assert_array_equal(states(kept, "int8"), exact)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"keep": {"encoder": ("layers.0.qvk",)}}, "keeps 'layers.0.qvk', no product of encoder: use layers.0.qkv"),
        # w8 leaves the encoder as it is, and its products have names all the same
        ({"precision": "w8", "keep": {"encoder": ("head",)}}, "keeps 'head', no product of encoder"),
        ({"keep": {"memory": ()}}, "keeps 'memory', no graph of the model: use"),
        ({"model": "mt3"}, "is of model 'mt3', not of tiny"),
        ({"precision": "fp16"}, "'fp16' is nothing to quantise to"),
    ],
)
def test_quantize_refuses_what_it_cannot_obey(tiny_folder, tmp_path, capsys, changes, problem):
    write_plan(replace(PLAN, **changes), tmp_path / "own.toml")
    command = ["quantize", str(tiny_folder), "--plan", str(tmp_path / "own.toml"), "--output", str(tmp_path / "new")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["own.toml"]


def test_the_command_bundle_reads_plans_before_the_work(monkeypatch, tmp_path, capsys):
    given = {}
    checkpoint = Checkpoint(TINY_MODEL, TINY_FEATURES, {}, "random:7", None)
    monkeypatch.setattr("mt3_export.checkpoint.load_checkpoint", lambda *_, **__: checkpoint)
    monkeypatch.setattr(bundle_writer, "export_bundle", lambda *_, **options: given.update(options))
    write_plan(PLAN, tmp_path / "own.toml")
    command = ["bundle", "--model", "mt3", "--checkpoint", "random:7", "--output", str(tmp_path / "new")]
    assert main([*command, "--plan", str(tmp_path / "own.toml")]) == 0
    assert given["plans"] == [PLAN]
    assert main([*command, "--plan", str(tmp_path / "none.toml")]) == 2
    assert "cannot read plan" in capsys.readouterr().err


def test_plans_that_come_with_the_project_fit_their_models(tmp_path):
    folder = Path(__file__).parent.parent / "engines" / "plans"
    plans = [read_plan(path) for path in sorted(folder.glob("*.toml"))]
    assert [(plan.model, plan.precision) for plan in plans] == [("mt3-demo", "int8")]
    made = quantize_bundle(open_bundle(demo_bundle_path()), tmp_path / "planned", [], plans=plans)
    encoder = open_bundle(made).graph("encoder", "ort", "int8").file
    assert set(products(ir.load(made / encoder).graph)) >= set(plans[0].keep["encoder"])
