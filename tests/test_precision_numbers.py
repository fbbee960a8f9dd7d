"""Half precision computes the same network, but for its rounding, and survives what plain fp16 does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx.helper import tensor_dtype_to_np_dtype
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from bundle_cases import copied, forge
from conftest import TINY_FEATURES, TINY_MODEL
from graph_cases import one_thread, relative_error
from half_cases import HALF_MODEL, emulated, half_checkpoint
from memory_cases import CONTEXT, PREFIX_MEMORY, memory_checkpoint
from mt3_export import cli
from mt3_export.checkpoint import load_checkpoint
from mt3_export.lowering import Eager
from mt3_export.network import build_modules
from mt3_export.precision import PLANS
from mt3_export.reference import Comparison, Reference
from mt3_export.verify import RELATIVE_LIMIT, ROUTED_FACTOR, chord_features, verify_bundle
from mt3_runtime.backends.ort import open_session
from mt3_runtime.bundle import open_bundle
from mt3_runtime.graphs import GRAPH_NAMES, graph_specs
from small_yourmt3 import channel_checkpoint

LIMITS = {"fp16": 1e-3, "bf16": 8e-3}  # a few roundings: 2**-11 and 2**-8 each
FLOORS = {"fp16": 1e-4, "bf16": 8e-4}  # what is closer was not computed in half
WEIGHTS = "weights.fp16.bin"


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


def modules_of(checkpoint, ops, tensors=None):
    tensors = checkpoint.tensors if tensors is None else tensors
    return build_modules(checkpoint.model, checkpoint.features, tensors, ops, checkpoint.design)


def reference_of(checkpoint, steps, segments=1, tensors=None):
    features = chord_features(checkpoint.features, segments, seed=0)
    return Reference(modules_of(checkpoint, Eager(), tensors), features, steps, checkpoint.model)


def compared(reference, graph, runner):
    compare = Comparison()
    reference.run(graph, runner, compare)
    return compare


def check_close(compare, precision, factor=1):
    assert FLOORS[precision] < compare.relative < factor * LIMITS[precision]
    count, equal, ties = compare.counts
    assert equal + ties == count
    assert equal >= 0.95 * count


# ---- the plan in torch, against float64 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_reference(tiny_checkpoint):
    return reference_of(tiny_checkpoint, steps=40, segments=3)


@pytest.mark.parametrize("precision", LIMITS)
def test_every_graph_of_the_tiny_model(tiny_checkpoint, tiny_reference, precision):
    modules = modules_of(tiny_checkpoint, Eager(PLANS[precision]))
    for graph in GRAPH_NAMES:
        compare = compared(tiny_reference, graph, emulated(modules[graph], graph, precision))
        check_close(compare, precision)
        assert compare.counts[0] == (120 if graph == "decode_step" else 0)


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("memory", [CONTEXT, PREFIX_MEMORY], ids=["context", "prefix"])
def test_every_graph_of_a_memory(memory, precision):
    checkpoint = memory_checkpoint(TINY_MODEL, memory)
    reference = reference_of(checkpoint, steps=8)
    modules = modules_of(checkpoint, Eager(PLANS[precision]))
    assert set(modules) >= {*GRAPH_NAMES, "memory"}
    for graph, module in modules.items():
        check_close(compared(reference, graph, emulated(module, graph, precision)), precision)


def test_full_size():
    checkpoint = load_checkpoint("random:0", model="mt3")
    reference = reference_of(checkpoint, steps=3)
    for precision in LIMITS:
        for graph, module in modules_of(checkpoint, Eager(PLANS[precision])).items():
            check_close(compared(reference, graph, emulated(module, graph, precision)), precision)


class Routed(Eager):
    """Sends every token to the experts that it was sent to before."""

    def __init__(self, plan, told=None):
        super().__init__(plan)
        self.told, self.seen = told, []

    def experts(self, tokens, probabilities, experts, chosen):
        self.seen.append(probabilities)
        if self.told is not None:
            probabilities = self.told[len(self.seen) - 1]
        return super().experts(tokens, probabilities.to(tokens.dtype), experts, chosen)


@pytest.mark.parametrize("precision", LIMITS)
def test_experts(precision):
    """Where rounding sends a token elsewhere it differs as a whole; everywhere else errors are as small as ever."""
    checkpoint = channel_checkpoint()
    features = torch.from_numpy(chord_features(checkpoint.features, 1, seed=0))
    first = Routed(PLANS["fp32"])
    plain, told = (Routed(PLANS[precision]), Routed(PLANS[precision], first.seen))
    with torch.inference_mode():
        exact = modules_of(checkpoint, first)["encoder"].double()(features.double()).numpy()
        found = [modules_of(checkpoint, ops)["encoder"](features).float().numpy() for ops in (plain, told)]
    errors = [relative_error(states, exact) for states in found]
    assert errors[1] < 4 * LIMITS[precision]  # convolutions: their outputs have a mean of many deviations
    assert errors[1] < 0.7 * errors[0] < 0.7 * RELATIVE_LIMIT[precision] * ROUTED_FACTOR
    moved = [
        (a.topk(2).indices.sort().values != b.topk(2).indices.sort().values).any(-1).sum().item()
        for a, b in zip(first.seen, plain.seen, strict=True)
    ]
    assert sum(moved) > 0


# ---- the graphs themselves ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_bundle(half_folder):
    return open_bundle(half_folder)


@pytest.fixture(scope="module")
def half_reference():
    return reference_of(half_checkpoint(), steps=12, segments=2)


def on_onnxruntime(bundle, graph, lowering):
    """A graph of fp16 as ONNX Runtime has it on a CPU: with casts around what it can do in float32 only."""
    session = open_session(bundle, bundle.graph(graph, lowering, "fp16"), threads=1)
    spec = graph_specs(HALF_MODEL, TINY_FEATURES)[graph].typed("fp16")

    def run(arrays):
        pairs = zip(spec.inputs, arrays, strict=True)
        return session.run(None, {tensor.name: array.astype(tensor.dtype) for tensor, array in pairs})

    return run


@pytest.mark.parametrize("lowering", ["tensorrt", "cuda"])
@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_graphs_of_fp16(half_bundle, half_reference, graph, lowering):
    check_close(compared(half_reference, graph, on_onnxruntime(half_bundle, graph, lowering)), "fp16")


class Attention(OpRun):
    """The standard's operator with sums and softmax in float32, as devices have it; onnx's own rounds every sum."""

    op_domain = ""

    def _run(self, query, key, value, mask=None, scale=None, **_):
        assert scale == 1.0
        scores = query.astype(np.float32) @ key.astype(np.float32).swapaxes(-1, -2)
        if mask is not None:
            assert mask.dtype == bool
            scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).astype(query.dtype)
        return ((weights.astype(np.float32) @ value.astype(np.float32)).astype(query.dtype),)


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_graphs_by_the_standards_own_evaluator(half_folder, graph, precision):
    """They are the plan in torch, but for the order of sums: the same roundings in the same places."""
    model = onnx.load(half_folder / f"{graph}.{precision}.tensorrt.onnx")
    evaluator = ReferenceEvaluator(model, new_ops=[Attention])
    kinds = {value.name: tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in model.graph.input}
    plan = emulated(modules_of(half_checkpoint(), Eager(PLANS[precision]))[graph], graph, precision)
    differences = []

    def run(arrays):
        pairs = zip(kinds.items(), arrays, strict=True)
        found = evaluator.run(None, {name: array.astype(kind) for (name, kind), array in pairs})
        wanted = plan(arrays)
        for array, its in zip(found, wanted, strict=True):
            if its.dtype == np.float32 and its.ndim > 1:
                differences.append(relative_error(array.astype(np.float32), its))
        return wanted

    compared(reference_of(half_checkpoint(), steps=3), graph, run)
    assert 0 <= max(differences) < LIMITS[precision] / 4


def test_verify(half_bundle, capsys):
    reports = verify_bundle(half_bundle, half_checkpoint(), segments=1, steps=4)
    assert len(reports) == 3 * (3 + 2 + 2) + 1  # the features are one graph for all
    for report in reports:
        assert report.passed
        assert report.ran == (report.precision != "bf16")
        assert (report.relative_error > 0) == report.ran
        assert ("not run here" in report.to_text()) == (not report.ran)
    options = ["--checkpoint", "random:0"]
    assert cli.build_parser().parse_args(["verify", str(half_bundle.path), *options]).model == "mt3"
    assert capsys.readouterr().err == ""


def test_verify_finds_a_wrong_weight(half_folder, tmp_path):
    folder = copied(half_folder, tmp_path / "half")
    weights = np.fromfile(folder / WEIGHTS, np.float16)
    weights[:256] *= 2
    forge(folder, {WEIGHTS: weights.tobytes()})
    reports = verify_bundle(open_bundle(folder), half_checkpoint(), segments=1, steps=2)
    assert {report.precision for report in reports if not report.passed} == {"fp16"}


# ---- activations too large for fp16 -------------------------------------------------------------------------------

LOUD, QUIET = 13, 8  # wi_1 by 2**13, wo by 2**-8: gelu(wi_0 x) * wi_1 x passes 65504, no matrix and no product does
ALMOST_ALL_FEED_FORWARD = 2  # that is what is left of the residual stream, and it has more roundings than the rest
CLEAR = 2  # wi_0 by 2**2, so that gelu lets more through


def scaled(tensors, value, output):
    """Matrices of every feed-forward times powers of two."""
    powers = {"wi_0.weight": CLEAR, "wi_1.weight": value, "wo.weight": output}
    return {
        name: tensor * 2.0 ** powers.get(name.rpartition("DenseReluDense.")[2], 0) for name, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def loud_checkpoint():
    checkpoint = half_checkpoint()
    return replace(checkpoint, tensors=scaled(checkpoint.tensors, LOUD, -QUIET))


@pytest.fixture(scope="module")
def same_checkpoint():
    """The same network without loud activations: the powers of two cancel."""
    checkpoint = half_checkpoint()
    return replace(checkpoint, tensors=scaled(checkpoint.tensors, 0, LOUD - QUIET))


@pytest.fixture(scope="module")
def loud_reference(loud_checkpoint):
    return reference_of(loud_checkpoint, steps=8)


def test_plain_fp16_overflows(loud_checkpoint, same_checkpoint, loud_reference):
    """Everything in half, as a converter would write it; and the plan itself without its divisions."""
    for checkpoint, survives in ((loud_checkpoint, False), (same_checkpoint, True)):
        encoder = modules_of(checkpoint, Eager())["encoder"].half()
        plan = replace(PLANS["fp16"], balanced=False)
        planned = modules_of(checkpoint, Eager(plan))["encoder"]
        with torch.inference_mode():
            assert encoder(loud_reference.features.half()).isfinite().all() == survives
            assert planned(loud_reference.features.float()).isfinite().all() == survives


@pytest.mark.parametrize("graph", ["encoder", "decode_step"])
def test_the_plan_survives(loud_checkpoint, same_checkpoint, loud_reference, graph):
    errors = []
    for checkpoint in (same_checkpoint, loud_checkpoint):
        module = modules_of(checkpoint, Eager(PLANS["fp16"]))[graph]
        compare = compared(loud_reference, graph, emulated(module, graph, "fp16"))
        check_close(compare, "fp16", ALMOST_ALL_FEED_FORWARD)
        errors.append(compare.relative)
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("lowering", ["tensorrt", "cuda"])
@pytest.mark.parametrize("graph", ["encoder", "decode_step"])
def test_the_graphs_survive(half_folder, tmp_path, loud_reference, graph, lowering):
    """The same graphs over louder weights."""
    folder = copied(half_folder, tmp_path / "loud")
    model = onnx.load(folder / f"{graph}.fp16.{lowering}.onnx", load_external_data=False)
    weights = np.fromfile(folder / WEIGHTS, np.float16)

    def matrix(name):
        [tensor] = [tensor for tensor in model.graph.initializer if tensor.name.endswith(f"feed_forward.{name}")]
        place = {entry.key: int(entry.value) // 2 for entry in tensor.external_data if entry.key != "location"}
        return weights[place["offset"] :][: place["length"]].reshape(tuple(tensor.dims))

    matrix("gates")[:, : HALF_MODEL.d_ff] *= np.float16(2.0**CLEAR)
    matrix("gates")[:, HALF_MODEL.d_ff :] *= np.float16(2.0**LOUD)
    matrix("output")[:] *= np.float16(2.0**-QUIET)
    forge(folder, {WEIGHTS: weights.tobytes()})
    check_close(
        compared(loud_reference, graph, on_onnxruntime(open_bundle(folder), graph, lowering)),
        "fp16",
        ALMOST_ALL_FEED_FORWARD,
    )
