"""Engines with products kept in float32: what TensorRT is given, what it makes of that, and which entry is found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from graph_cases import relative_error
from half_cases import HALF_MODEL
from mt3_export.cli import main
from mt3_export.engine_builder import Target, build_engine, engine_key, make_logger
from mt3_export.mixed_plan import MixedPlan, write_plan
from mt3_export.recipes import plan_engines, recipe_for
from mt3_export.trt_graph import ready_graph
from mt3_export.trt_network import parse
from mt3_runtime.bundle import open_bundle
from mt3_runtime.engine_cache import Built, EngineCache
from mt3_runtime.engine_key import FLAGS
from mt3_runtime.engine_lookup import Host, find_engines
from mt3_runtime.errors import OptionError
from mt3_runtime.trt import import_tensorrt

GATES, QKV = "layers.0.feed_forward.gates", "layers.0.qkv"
KEPT = MixedPlan(HALF_MODEL.name, "fp16", {"encoder": (GATES, QKV), "decode_step": ("head", QKV)})


@pytest.fixture(scope="module")
def bundle(half_folder):
    return open_bundle(half_folder)


@pytest.fixture(scope="module")
def trt():
    return import_tensorrt("tensorrt-rtx")


def plans_of(bundle, precision="fp16"):
    recipe = recipe_for(bundle.manifest)
    return {plan.spec.name: plan for plan in plan_engines(bundle, recipe, precision, "latency")}


def target_of(trt, *targets):
    return Target("tensorrt-rtx", trt.__version__, targets or ("sm_89",), None)


def weights_in(graph) -> dict[str, np.ndarray]:
    tensors = onnx.load_from_string(graph.model).graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}


def test_tensorrt_gets_weights_of_the_graph_in_fp32(bundle):
    plan = plans_of(bundle)["encoder"]
    half, kept = ready_graph(bundle, plan), ready_graph(bundle, plan, mixed=KEPT)
    exact = weights_in(ready_graph(bundle, plans_of(bundle, "fp32")["encoder"]))
    assert kept.spec == half.spec
    held = weights_in(kept)
    for name in (GATES, QKV):
        np.testing.assert_array_equal(held[f"weights.{name}.fp32"], exact[f"weights.{name}"])
        assert held[f"weights.{name}.fp32"].dtype == np.float32
        assert f"weights.{name}" not in held
    others = {name for name in held if not name.endswith(".fp32")}
    assert others == {name for name in weights_in(half) if name not in {f"weights.{GATES}", f"weights.{QKV}"}}
    counts = half.products["half+"], kept.products["half+"], kept.products["float32"]
    assert counts == (5, 3, 2)
    assert {kept.types[name] for name in ("features",)} == {TensorProto.FLOAT}


def test_what_is_kept_brings_an_encoder_nearer_to_fp32(bundle):
    features = np.random.default_rng(1).standard_normal((2, 256, 512)).astype(np.float32)

    def states(precision, mixed=None):
        graph = ready_graph(bundle, plans_of(bundle, precision)["encoder"], mixed=mixed)
        session = onnxruntime.InferenceSession(graph.model, providers=["CPUExecutionProvider"])
        return session.run(None, {"features": features})[0]

    exact = states("fp32")
    names = ("projection", QKV, "layers.0.output", GATES, "layers.0.feed_forward.output")
    every = replace(KEPT, keep={"encoder": names})
    errors = [relative_error(states("fp16", mixed), exact) for mixed in (None, KEPT, every)]
    assert errors == sorted(errors, reverse=True)
    rounding = relative_error(exact.astype(np.float16), exact)  # of the states: once in any case
    assert errors[0] > 1.35 * rounding
    assert errors[2] < 1.15 * rounding


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_tensorrt_takes_the_graphs_with_their_types(bundle, trt, precision):
    mixed = replace(KEPT, precision=precision)
    for plan in plans_of(bundle, precision).values():
        logger = make_logger(trt)
        parsed = parse(trt, trt.Builder(logger), logger, ready_graph(bundle, plan, mixed=mixed))
        assert parsed.compared > len(plan.spec.outputs)


@pytest.mark.parametrize("targets", [("sm_89",), ("sm_75",)])
def test_an_engine_holds_what_is_kept_in_full(bundle, trt, targets):
    """Strong typing is a promise: the bytes of weights in the engine are the proof."""
    plan, target = plans_of(bundle)["encoder"], target_of(trt, *targets)
    names = ("projection", GATES)
    mixed = replace(KEPT, keep={"encoder": names})
    half, kept = build_engine(trt, bundle, plan, target).report, build_engine(trt, bundle, plan, target, mixed).report
    weights = weights_in(ready_graph(bundle, plan))
    more = sum(weights[f"weights.{name}"].nbytes for name in names)
    grown = kept["weights_bytes"] - half["weights_bytes"]
    assert more <= grown < 1.25 * more
    assert kept["products"]["half+"] == half["products"]["half+"] - 2
    if targets == ("sm_89",):
        assert kept["products"]["float32"] == 2
        assert kept["layers"]["MATRIX_MULTIPLY FLOAT"] == half["layers"]["MATRIX_MULTIPLY FLOAT"]
    assert not kept["warnings"]


def test_a_graph_that_a_recipe_has_in_fp32_stays_it(bundle):
    plan = replace(plans_of(bundle, "fp32")["encoder"], precision="fp16")
    assert ready_graph(bundle, plan, mixed=KEPT).model == ready_graph(bundle, plan).model


# ---- keys and the command -------------------------------------------------------------------------------------------


def test_engines_with_a_plan_are_other_ones_and_the_newest_is_found(bundle, trt, tmp_path, monkeypatch):
    host = Host("tensorrt-rtx", trt.__version__, "sm_89", "NVIDIA L4", "13.0", "580.65")
    cache, clock = EngineCache(tmp_path / "engines"), iter(range(1000, 9000))
    monkeypatch.setattr("mt3_runtime.engine_cache.time.time", lambda: next(clock))
    for mixed in (None, KEPT):
        for plan in plans_of(bundle).values():
            cache.get(engine_key(bundle, plan, target_of(trt), mixed), lambda: Built(b"engine", {}))
        flags = {name: entries[0].key.flags for name, entries in find_engines(cache, bundle, host, "fp16").items()}
        extra = () if mixed is None else (f"plan {KEPT.digest[:12]}",)
        assert flags.pop("features") == FLAGS  # in float32 anyway
        assert set(flags.values()) == {(*FLAGS, *extra)}
    assert len(cache.entries()) == 4 + 3
    other = replace(KEPT, keep={"encoder": (GATES,)})
    turing = [engine_key(bundle, plans_of(bundle)["encoder"], target_of(trt, "sm_75"), plan) for plan in (KEPT, other)]
    assert turing[0].digest != turing[1].digest
    assert turing[0].flags[-2:] == ("products as sums", f"plan {KEPT.digest[:12]}")


@pytest.fixture
def command(bundle, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MT3_ENGINE_CACHE", str(tmp_path / "engines"))

    def run(plan, *options):
        write_plan(plan, tmp_path / "own.toml")
        code = main(["engines", str(bundle.path), "--target", "sm_89", "--plan", str(tmp_path / "own.toml"), *options])
        return code, capsys.readouterr().err

    return run


def test_the_command_builds_by_a_plan(command, tmp_path):
    code, _ = command(KEPT, "--profile", "latency")
    assert code == 0
    built = {entry.key.graph: entry for entry in EngineCache(tmp_path / "engines").entries()}
    assert [f"plan {KEPT.digest[:12]}" in built[graph].key.flags for graph in sorted(built)] == [
        True,
        True,
        True,
        False,
    ]
    assert built["encoder"].report["products"]["float32"] == 2
    assert built["cross_kv"].report["products"] == {"half+": 2}


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (replace(KEPT, precision="bf16"), "is a plan for bf16, not fp16: give --precision bf16"),
        (replace(KEPT, precision="int8"), "is a plan for int8, not fp16: give one for fp16"),
        (replace(KEPT, model="mt3"), "of model 'mt3', not of tiny-half"),
        (replace(KEPT, keep={"memory": ()}), "keeps 'memory', no graph of the model: use encoder, cross_kv"),
        (replace(KEPT, keep={"decode_step": ("layer.0.qkv",)}), f"no product of decode_step: use {QKV}"),
    ],
)
def test_the_command_refuses_before_it_builds(command, tmp_path, plan, problem):
    code, error = command(plan)
    assert code == 2
    assert problem in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "engines").exists()


def test_a_name_that_no_graph_has_is_refused_by_the_graph_too(bundle):
    wrong = replace(KEPT, keep={"encoder": ("head",)})
    with pytest.raises(OptionError, match="keeps 'head', no product of encoder"):
        ready_graph(bundle, plans_of(bundle)["encoder"], mixed=wrong)
