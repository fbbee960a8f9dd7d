"""Engines of every recipe, built for GPUs that are not here; and that no graph turns into another one on the way.

A build proves nothing about numbers: those are compared on a GPU, by scripts/gpu_check.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from mt3_export import engine_builder
from mt3_export.cli import main
from mt3_export.engine_builder import Target, build_engine, check_targets, engine_key, make_logger
from mt3_export.recipes import EnginePlan, plan_engines, recipe_for
from mt3_export.trt_graph import ReadyGraph, ready_graph
from mt3_export.trt_network import parse
from mt3_runtime.bundle import open_bundle
from mt3_runtime.engine_cache import PLAN, EngineCache
from mt3_runtime.engine_lookup import Host, find_engines
from mt3_runtime.errors import BundleError, DependencyError, DeviceError, Mt3Error, OptionError
from mt3_runtime.graphs import FEATURES, TensorSpec
from mt3_runtime.trt import MODULES, import_tensorrt
from recipe_cases import Exporter

RECIPES = ("mt3", "mr-mt3", "mr-mt3-v1", "ymt3plus", "yptf-single", "yptf-multi", "yptf-moe-multi")
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120")
F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16
# Products that half precision leaves in float32, and sm_75 as sums: the head, a prefix's own scores, two routers.
IN_FLOAT32 = {"decode_step": 1, "prefix": 1, "encoder of yptf-moe-multi": 2}


@pytest.fixture(scope="module")
def mt3(half_folder):
    return open_bundle(half_folder)


@pytest.fixture(scope="module")
def export(mt3, tmp_path_factory):
    return Exporter(tmp_path_factory.mktemp("recipes"), mt3)


@pytest.fixture(scope="module")
def trt():
    return import_tensorrt("tensorrt-rtx")


def target_of(trt, *targets: str) -> Target:
    return Target("tensorrt-rtx", trt.__version__, targets or ("sm_89",), None)


def plans_of(bundle, profile: str = "latency", precision: str = "fp16") -> dict[str, EnginePlan]:
    return {plan.spec.name: plan for plan in plan_engines(bundle, recipe_for(bundle.manifest), precision, profile)}


def onnx_counts(bundle, plan: EnginePlan) -> dict[str, int]:
    nodes = onnx.load_from_string(bundle.read(plan.file.file)).graph.node
    names = [node.op_type for node in nodes]
    return {name: names.count(name) for name in set(names)}


# ---- every recipe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_for_every_target(export, trt, recipe):
    bundle = export(recipe)
    assert recipe_for(bundle.manifest).name == recipe
    for name, plan in plans_of(bundle, "throughput").items():
        audio = name == FEATURES  # in float32, which sm_75 has no products of: the command leaves it out there
        built = build_engine(trt, bundle, plan, target_of(trt, *TARGETS[audio:]))
        counts, report = onnx_counts(bundle, plan), built.report
        assert len(built.plan) == report["plan_bytes"] > report["weights_bytes"] > 0
        layers = report["layers"]
        assert layers.get("KV_CACHE_UPDATE HALF", 0) == counts.get("TensorScatter", 0)
        assert layers.get("ATTENTION_OUTPUT HALF", 0) == counts.get("Attention", 0)
        assert layers.get("CONVOLUTION HALF", 0) == counts.get("Conv", 0)
        assert not [kind for kind in layers if kind.endswith(" BF16")]
        assert report["compared_tensors"] > len(plan.spec.outputs)
        assert not [text for text in report["warnings"] if "Unused Input" not in text and "is unused" not in text]
        wide = IN_FLOAT32.get(name, 0) + IN_FLOAT32.get(f"{name} of {recipe}", 0)
        products = sum(report["products"].values())
        assert products == sum(counts.get(kind, 0) for kind in ("MatMul", "Conv", "Attention")) - wide


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wider_types_build_from_ampere_on(mt3, trt, precision):
    wrong = (" HALF", " BF16") if precision == "fp32" else (" HALF",)
    for plan in plans_of(mt3, precision=precision).values():
        built = build_engine(trt, mt3, plan, target_of(trt, *TARGETS[1:]))
        assert not [kind for kind in built.report["layers"] if kind.endswith(wrong)]
    with pytest.raises(DeviceError, match=r"leave sm_75 out, or ask for fp16$"):
        build_engine(trt, mt3, plan, target_of(trt, *TARGETS))


def test_sizes_and_length_are_those_of_the_plan(mt3, trt):
    plan = plans_of(mt3)["decode_step"]
    network = parsed(mt3, plan, trt).network
    shapes = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    assert shapes["self_key.0"] == (-1, 2, 96, 16)
    assert shapes["token"] == (-1,)
    assert list(shapes) == plan.spec.input_names


# ---- planted faults -------------------------------------------------------------------------------------------------


def parsed(bundle, plan, trt, change=lambda graph: graph):
    logger = make_logger(trt)
    return parse(trt, trt.Builder(logger), logger, change(ready_graph(bundle, plan)))


def refusal(bundle, plan, trt, change) -> str:
    with pytest.raises(BundleError) as caught:
        parsed(bundle, plan, trt, change)
    assert str(caught.value).isprintable()
    return str(caught.value)


def edited(change):
    """Change the ONNX graph that the parser gets, and not what is expected of it."""

    def edit(graph: ReadyGraph) -> ReadyGraph:
        model = onnx.load_from_string(graph.model)
        change(model.graph)
        return replace(graph, model=model.SerializeToString())

    return edit


def test_a_dropped_input_is_noticed(mt3, trt):
    def drop(graph):
        (place,) = [i for i, value in enumerate(graph.input) if value.name == "position"]
        value = graph.input.pop(place)
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int32), value.name))

    assert "position" in refusal(mt3, plans_of(mt3)["decode_step"], trt, edited(drop))


def test_inputs_in_another_order_are_noticed(mt3, trt):
    plan = plans_of(mt3)["decode_step"]
    spec = plan.spec.typed("fp16")
    turned = replace(spec, inputs=spec.inputs[1::-1] + spec.inputs[2:])
    assert "their order" in refusal(mt3, plan, trt, lambda graph: replace(graph, spec=turned))


@pytest.mark.parametrize(("dtype", "shape"), [("float32", ("rows", 256, 32)), ("float16", ("rows", 256, 33))])
def test_an_input_of_another_type_or_size_is_noticed(mt3, trt, dtype, shape):
    plan = plans_of(mt3)["cross_kv"]
    spec = replace(plan.spec.typed("fp16"), inputs=(TensorSpec("states", dtype, shape),))
    assert "input states" in refusal(mt3, plan, trt, lambda graph: replace(graph, spec=spec))


def test_a_changed_type_inside_is_noticed(mt3, trt):
    plan = plans_of(mt3)["encoder"]
    graph = ready_graph(mt3, plan)
    halves = [name for name, kind in graph.types.items() if kind == F16 and name not in plan.spec.output_names]
    seen = {name for layer in parsed(mt3, plan, trt).layers for name, _ in layer.outputs}
    inside = [name for name in halves if name in seen]
    assert len(inside) > 5
    for name in inside[:3]:
        wrong = {**graph.types, name: F32}
        assert name in refusal(mt3, plan, trt, lambda ready, wrong=wrong: replace(ready, types=wrong))


def test_a_cache_that_is_no_cache_layer_is_noticed(mt3, trt):
    plan = plans_of(mt3)["decode_step"]
    more = {**ready_graph(mt3, plan).operators, "TensorScatter": 5}
    assert "KV_CACHE_UPDATE" in refusal(mt3, plan, trt, lambda graph: replace(graph, operators=more))


def test_a_cache_without_fixed_length_is_refused_in_one_line(mt3, trt):
    plan = plans_of(mt3)["decode_step"]
    moving = replace(plan, axes={**plan.axes, "length": (48, 96, 96)})
    assert "TensorRT cannot parse decode_step" in refusal(mt3, moving, trt, lambda graph: graph)


def replaced(bundle, file: str, data: bytes):
    """The bundle, with one file read as something else."""

    class Forged(type(bundle)):
        __slots__ = ()

        def read(self, name):
            return data if name == file else super().read(name)

    return Forged(bundle.path, bundle.manifest, bundle.sha256)


def test_an_input_that_tensorrt_ignores_is_refused(mt3):
    plan = plans_of(mt3)["decode_step"]
    model = onnx.load_from_string(mt3.read(plan.file.file))
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.input.extend([""] * (6 - len(node.input)) + ["position"])  # nonpad_kv_seqlen
    with pytest.raises(BundleError, match="TensorRT ignores"):
        ready_graph(replaced(mt3, plan.file.file, model.SerializeToString()), plan)


def test_operators_of_another_library_are_refused(mt3):
    plan = plans_of(mt3)["cross_kv"]
    model = onnx.load_from_string(mt3.read(plan.file.file))
    model.graph.node[0].domain = "com.microsoft"
    with pytest.raises(BundleError, match=r"holds com\.microsoft"):
        ready_graph(replaced(mt3, plan.file.file, model.SerializeToString()), plan)


def test_weights_are_verified_before_a_parser_sees_them(mt3, tmp_path):
    plan = plans_of(mt3)["cross_kv"]
    for name in (plan.file.file, plan.file.weights):
        (tmp_path / name).write_bytes((mt3.path / name).read_bytes())
    assert ready_graph(replace(mt3, path=tmp_path), plan).model
    data = bytearray((tmp_path / plan.file.weights).read_bytes())
    data[1000] ^= 1
    (tmp_path / plan.file.weights).write_bytes(data)
    with pytest.raises(BundleError, match="changed or cut off"):
        ready_graph(replace(mt3, path=tmp_path), plan)


# ---- precision of a graph -------------------------------------------------------------------------------------------


def test_a_graph_kept_in_fp32_has_the_border_of_half_precision(mt3, trt):
    plan = replace(plans_of(mt3, precision="fp32")["cross_kv"], precision="fp16")
    graph = ready_graph(mt3, plan)
    assert {tensor.dtype for tensor in (*graph.spec.inputs, *graph.spec.outputs)} == {"float16"}
    report = build_engine(trt, mt3, plan, target_of(trt)).report
    assert report["layers"]["MATRIX_MULTIPLY FLOAT"] == len(plan.spec.outputs)
    x = np.random.default_rng(9).standard_normal((2, *graph.spec.inputs[0].shape[1:])).astype(np.float16)
    session = onnxruntime.InferenceSession(graph.model, providers=["CPUExecutionProvider"])
    plain = ready_graph(mt3, replace(plan, precision="fp32"))
    reference = onnxruntime.InferenceSession(plain.model, providers=["CPUExecutionProvider"])
    for half, full in zip(
        session.run(None, {"states": x}), reference.run(None, {"states": x.astype("f4")}), strict=True
    ):
        np.testing.assert_array_equal(half, full.astype(np.float16))


# ---- commands and lookup --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(mt3, tmp_path_factory):
    """A cache that `mt3-export engines` filled."""
    folder = tmp_path_factory.mktemp("cache") / "engines"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MT3_ENGINE_CACHE", str(folder))
        assert main(["engines", str(mt3.path), "--target", "sm_86,sm_89", "--profile", "latency"]) == 0
    return EngineCache(folder)


@pytest.fixture
def command(mt3, filled, monkeypatch, capsys):
    monkeypatch.setenv("MT3_ENGINE_CACHE", str(filled.folder))

    def run(*options: str) -> tuple[int, str, str]:
        code = main(["engines", str(mt3.path), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command_builds_once_and_reports(command, filled):
    assert [entry.key.graph for entry in filled.entries()] == ["cross_kv", "decode_step", "encoder", "features"]
    code, out, _ = command("--target", "sm_86,sm_89", "--profile", "latency", "--json")
    assert code == 0
    reports = json.loads(out)
    assert [report["origin"] for report in reports] == ["cache"] * 4
    stored = {entry.key.title: entry.report for entry in filled.entries()}
    for report in reports:
        assert stored[report["title"]] == {key: report[key] for key in report.keys() - {"title", "origin"}}
        assert report["build_seconds"] > 0
        assert report["activation_bytes"] is None  # no GPU to load it


def test_the_command_builds_a_damaged_engine_again_and_says_so(command, filled):
    entry = filled.entries()[0]
    (filled.folder / entry.key.digest / PLAN).write_bytes(b"half")
    code, out, err = command("--target", "sm_86,sm_89", "--profile", "latency")
    assert code == 0
    assert "was changed or damaged: building it again" in err
    assert [line.split()[-1] for line in out.splitlines()[1:5]].count("rebuilt") == 1
    assert filled.load(entry.key).entry.key == entry.key


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--target", "sm_90"), "use sm_75, sm_80"),
        (("--target", "sm_89,,sm_80"), "no target ''"),
        (("--target", "sm_89", "--profile", "fast"), "use one of latency, throughput"),
        (("--target", "sm_89", "--recipe", "none.toml"), "cannot read recipe none.toml"),
    ],
)
def test_the_command_names_what_does_not_fit(command, options, text):
    code, _, err = command(*options, "--backend", "tensorrt-rtx")
    assert code == 2
    assert text in err
    assert len(err.splitlines()) == 1


def test_without_a_gpu_this_is_refused_with_the_fix(command, monkeypatch):
    def no_gpu(*_):
        raise DeviceError("NVIDIA's driver is not installed: install it")

    monkeypatch.setattr("mt3_runtime.backends.tensorrt.this_host", no_gpu)
    code, _, err = command("--backend", "tensorrt-rtx")
    assert code == 2
    assert "driver" in err
    assert "give --target sm_75,sm_80" in err


def test_tensorrt_itself_builds_for_the_gpu_at_hand_only(trt):
    with pytest.raises(OptionError, match="--target this"):
        check_targets(trt, "tensorrt", ["sm_89"])


def test_a_missing_tensorrt_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("mt3_runtime.trt.MODULES", {"tensorrt": ("no_such_tensorrt",)})
    with pytest.raises(DependencyError, match=r"pip install 'mt3-runtime\[tensorrt\]'$"):
        import_tensorrt("tensorrt")
    assert set(MODULES) == {"tensorrt", "tensorrt-rtx"}


def test_an_old_tensorrt_is_refused(monkeypatch):
    monkeypatch.setattr("mt3_runtime.trt.MODULES", {"tensorrt": ("json",)})
    with pytest.raises(DependencyError, match=r"10\.15"):
        import_tensorrt("tensorrt")


def host_of(trt, **parts: str) -> Host:
    given = {"backend": "tensorrt-rtx", "backend_version": trt.__version__, "target": "sm_89", "gpu": "NVIDIA L4"}
    return Host(**{**given, "cuda": "13.0", "driver": "580.65", **parts})


def test_turing_gets_no_engine_of_the_features_and_needs_none(command, mt3, trt, monkeypatch, tmp_path):
    monkeypatch.setenv("MT3_ENGINE_CACHE", str(tmp_path / "engines"))
    _, out, err = command("--target", "sm_75", "--profile", "latency")
    assert "features is left out: tensorrt-rtx has no float32 products for sm_75, the host computes it there" in err
    assert "features" not in out
    assert set(find_engines(EngineCache(), mt3, host_of(trt, target="sm_75"), "fp16")) == {
        "encoder",
        "cross_kv",
        "decode_step",
    }


def test_engines_for_this_gpu_are_found(filled, mt3, trt):
    found = find_engines(filled, mt3, host_of(trt), "fp16", rows=16)
    assert {name: [entry.key.length for entry in entries] for name, entries in found.items()} == {
        "features": [None],
        "encoder": [None],
        "cross_kv": [None],
        "decode_step": [96],
    }


def test_engines_for_something_else_are_not(filled, mt3, trt, export):
    def said(bundle=mt3, precision="fp16", host=None, **options) -> str:
        with pytest.raises(DeviceError) as caught:
            find_engines(filled, bundle, host or host_of(trt), precision, **options)
        assert "run mt3-export engines" in str(caught.value)
        return str(caught.value)

    assert "sm_86, sm_89" in said(host=host_of(trt, target="sm_120"))
    assert f"tensorrt-rtx {trt.__version__}" in said(host=host_of(trt, backend_version="1.8"))
    assert "precision fp16" in said(precision="bf16")
    assert "no engines of this bundle" in said(bundle=export("ymt3plus"))
    assert "profile fast" in said(profile="fast")


def test_more_rows_than_any_engine_takes_is_not_mended_by_building_again(filled, mt3, trt):
    with pytest.raises(DeviceError, match="take at most 16 rows, not 17: use --slots 16 or fewer"):
        find_engines(filled, mt3, host_of(trt), "fp16", rows=17)


@pytest.mark.parametrize("other", [{"version": "0.0.1"}, {"flags": ("strongly typed", "own casts")}])
def test_engines_of_another_version_or_builder_are_not_used(mt3, trt, tmp_path, other):
    cache, built = EngineCache(tmp_path / "engines"), engine_builder.Built(b"engine", {})
    target = Target("tensorrt-rtx", trt.__version__, ("sm_89",), host_of(trt))
    for plan in plans_of(mt3).values():
        cache.get(replace(engine_key(mt3, plan, target), **other), lambda: built)
    with pytest.raises(DeviceError, match="another version of this package"):
        find_engines(cache, mt3, host_of(trt), "fp16")


def test_an_engine_built_for_one_gpu_runs_on_no_other(mt3, trt, tmp_path):
    cache, own = EngineCache(tmp_path / "engines"), host_of(trt)
    target = Target("tensorrt-rtx", trt.__version__, ("sm_89",), own)
    built = engine_builder.Built(b"engine", {})
    for plan in plans_of(mt3).values():
        cache.get(engine_key(mt3, plan, target), lambda: built)
    assert len(find_engines(cache, mt3, own, "fp16")) == 4
    for part, value in (("gpu", "NVIDIA L40"), ("driver", "580.66"), ("cuda", "13.1")):
        with pytest.raises(Mt3Error, match="NVIDIA L4 with CUDA"):
            find_engines(cache, mt3, host_of(trt, **{part: value}), "fp16")


def test_engines_too_short_for_the_longest_row_are_not_enough(mt3, trt, tmp_path):
    cache, built = EngineCache(tmp_path / "engines"), engine_builder.Built(b"engine", {})
    plans = plans_of(mt3)
    longest = plans["decode_step"]
    length = longest.axes["length"][0]
    plans["decode_step"] = replace(longest, axes={**longest.axes, "length": (length // 2,) * 3})
    for plan in plans.values():
        cache.get(engine_key(mt3, plan, target_of(trt)), lambda: built)
    with pytest.raises(DeviceError, match="some graphs of that are missing"):
        find_engines(cache, mt3, host_of(trt), "fp16")
    cache.get(engine_key(mt3, longest, target_of(trt)), lambda: built)
    found = find_engines(cache, mt3, host_of(trt), "fp16")["decode_step"]
    assert [entry.key.length for entry in found] == [length // 2, length]


def test_the_key_knows_how_products_are_written(mt3, trt):
    plan = plans_of(mt3)["cross_kv"]
    turing, ada = (engine_key(mt3, plan, target_of(trt, name)).flags for name in ("sm_75", "sm_89"))
    assert set(turing) - set(ada) == {"products as sums"}
