"""The encoders of the YourMT3 models in every form against their formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from graph_cases import one_thread, relative_error
from mt3_export.conv_block import conv_front
from mt3_export.conv_strips import StripFront
from mt3_export.lowering import LOWERINGS, Eager
from mt3_export.network import build_modules
from mt3_export.onnx_graph import trace
from mt3_export.perceiver_attention import Norm
from mt3_export.random_weights import random_tensors
from mt3_export.weights import Weights
from mt3_runtime.graphs import GraphSpec, TensorSpec, encoder_spec
from mt3_runtime.specs import FeatureSpec, ModelSpec
from perceiver_cases import TINY_SIZES, TINY_SPECTRUM, TINY_SPECTRUM_ODD, design, draw, tiny_model
from perceiver_numpy import NumpyPerceiver
from t5_numpy import NumpyT5

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mt3_export.design import PerceiverDesign

SEGMENTS = 3
LIMIT = 2e-6  # of float32 graphs against float64; they come to 1.1e-6
TINY_MEL = FeatureSpec(
    "yourmt3_mel", mel_norm=False, hop_length=10, fft_length=80, bins=32, f_min=50.0, f_max=8000.0, segment_samples=105
)


@dataclass(frozen=True)
class Case:
    """A tiny network, its features and what its encoder makes of them."""

    model: ModelSpec
    features: FeatureSpec
    plan: PerceiverDesign | None
    tensors: Mapping[str, torch.Tensor]
    given: np.ndarray
    wanted: np.ndarray  # [segments, channels, frames, d_model]


def perceiver_case(
    plan: PerceiverDesign,
    channels: int,
    layers: tuple[tuple[int, int], ...] = TINY_SIZES.layers,
    spec: FeatureSpec = TINY_SPECTRUM,
) -> Case:
    tensors, given = draw(replace(TINY_SIZES, bins=spec.bins, layers=layers), plan, channels, 1), spectra(spec)
    reference = NumpyPerceiver(tensors, plan, channels)
    wanted = np.stack([reference.encode(segment) for segment in given])
    assert reference.closest_call > 1e-6  # or float32 might choose other experts than float64
    model = tiny_model(channels)
    tensors |= decoder_tensors(model)
    return Case(model, spec, plan, tensors, given, wanted)


def ymt3_case() -> Case:
    model, generator = replace(tiny_model(1), encoder_layers=1), np.random.default_rng(3)
    tensors = random_tensors(model, 1)
    del tensors["proj.weight"]
    # no sinusoid, to see that the table is read and not computed
    tensors["encoder.positions"] = torch.from_numpy(generator.normal(size=(13, model.d_model)).astype(np.float32))
    tensors |= decoder_tensors(model)
    given = spectra(TINY_MEL)
    network = NumpyT5(model, tensors)
    return Case(model, TINY_MEL, None, tensors, given, np.stack([network.encode(segment)[None] for segment in given]))


def spectra(spec: FeatureSpec) -> np.ndarray:
    """Features of 0 to 1 [segments, frames, bins]."""
    shape = (SEGMENTS, spec.segment_frames, spec.bins)
    return np.random.default_rng(2).uniform(size=shape).astype(np.float32)


def decoder_tensors(model: ModelSpec) -> dict[str, torch.Tensor]:
    tensors = random_tensors(model, 1)
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(("decoder", "lm_head"))}
    table = np.random.default_rng(4).normal(size=(model.max_length + 10, model.d_model))
    return found | {"decoder.positions": torch.from_numpy(table.astype(np.float32))}


# whole tiles in every block: ONNX Runtime's convolutions go by them
TILED_SPECTRUM = replace(TINY_SPECTRUM, fft_length=96, bins=48)
MOE, MLP = design(heads=2, moe=True), design(heads=2, moe=False)
# Few layers, because tracing takes seconds; every design is tested with more of them, untraced.
CASES = {
    "ymt3plus": ymt3_case,
    "yptf_single": lambda: perceiver_case(MLP, 1, ((1, 0),), TINY_SPECTRUM_ODD),
    "yptf_multi": lambda: perceiver_case(MLP, 3, ((0, 1), (1, 0)), TILED_SPECTRUM),
    "yptf_moe": lambda: perceiver_case(MOE, 3, ((0, 1), (1, 0)), TILED_SPECTRUM),
}
FORMS = [(name, lowering) for name in CASES for lowering in LOWERINGS]


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def cases():
    return {name: make() for name, make in CASES.items()}


@pytest.fixture(scope="module")
def models(cases):
    """Every encoder in every lowering, as a file holds it."""
    found = {}
    for name, lowering in FORMS:
        case = cases[name]
        modules = build_modules(case.model, case.features, case.tensors, LOWERINGS[lowering], case.plan)
        graph = trace(modules["encoder"], encoder_spec(case.model, case.features))
        found[name, lowering] = ir.to_proto(graph)
    return found


@pytest.fixture(scope="module")
def encoders(models):
    """The same as functions of features on ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def function(model: onnx.ModelProto):
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        return lambda features: session.run(["states"], {"features": features})[0]

    return {form: function(model) for form, model in models.items()}


@pytest.fixture(params=FORMS, ids="-".join)
def form(request):
    return request.param


@pytest.mark.parametrize("rows", [[0], [2, 1], [0, 1, 2], [1, 1, 0, 2, 1]])
def test_encoder(cases, encoders, form, rows):
    """Any number of segments in any order."""
    case = cases[form[0]]
    assert relative_error(encoders[form](case.given[rows]), case.wanted[rows]) < LIMIT


def test_a_spoiled_segment_leaves_the_others(cases, encoders, form):
    """Experts mix the tokens of all segments in one matrix."""
    case = cases[form[0]]
    spoiled = case.given.copy()
    spoiled[1, 3, 7] = np.nan
    states = encoders[form](spoiled)
    assert np.isnan(states[1]).any()
    assert relative_error(states[[0, 2]], case.wanted[[0, 2]]) < LIMIT


@pytest.mark.parametrize("name", CASES)
def test_eager_torch(cases, name):
    case = cases[name]
    encoder = build_modules(case.model, case.features, case.tensors, Eager(), case.plan)["encoder"]
    given = torch.from_numpy(case.given)
    with torch.inference_mode():
        assert relative_error(encoder(given).numpy(), case.wanted) < LIMIT
        # what was folded is stored in float32
        assert relative_error(encoder.double()(given.double()).numpy(), case.wanted) < 5e-7


@pytest.mark.parametrize(
    "plan",
    [
        MOE,
        MLP,
        replace(MOE, norm="rms"),
        replace(MOE, residual=False),
        replace(MOE, chosen=3),
        replace(MLP, residual=True),
        replace(MLP, norm="rms"),
    ],
    ids=str,
)
def test_every_design(plan):
    case = perceiver_case(plan, 3)
    encoder = build_modules(case.model, case.features, case.tensors, Eager(), plan)["encoder"]
    with torch.inference_mode():
        states = encoder.double()(torch.from_numpy(case.given).double())
    assert relative_error(states.numpy(), case.wanted) < 5e-7


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_root_mean_square_norms_in_graphs(lowering):
    generator = np.random.default_rng(6)
    x, update, gain = (generator.normal(size=shape).astype(np.float32) for shape in ((9, 32), (9, 32), (32,)))
    weights = Weights({"norm.weight": torch.from_numpy(gain)})
    tensors = (TensorSpec(name, "float32", ("rows", 32)) for name in ("x", "update", "sum", "normed"))
    spec = GraphSpec("norm", (next(tensors), next(tensors)), tuple(tensors))
    norm = Norm(weights, "norm", replace(MLP, norm="rms"), LOWERINGS[lowering])
    session = onnxruntime.InferenceSession(ir.to_proto(trace(norm, spec)).SerializeToString())
    total, normed = session.run(None, {"x": x, "update": update})
    wanted = x.astype(np.float64) + update
    assert relative_error(total, wanted) < LIMIT
    assert relative_error(normed, wanted / np.sqrt((wanted**2).mean(-1, keepdims=True) + 1e-5) * gain) < LIMIT


@pytest.mark.parametrize("frames", [1, 4, 6, 11])
@pytest.mark.parametrize("bins", [16, 32, 40])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_convolutions(lowering, bins, frames):
    """By whatever products and sums, in float64, at the edges too."""
    tensors = draw(replace(TINY_SIZES, bins=bins), MLP, 3, 8)
    given = np.random.default_rng(9).normal(size=(2, frames, bins))
    front = conv_front(Weights(tensors, "pre_encoder.0.blocks."), frames, bins, LOWERINGS[lowering])
    assert isinstance(front, StripFront) == (lowering == "ort" and bins % 16 == 0)
    with torch.inference_mode():
        found = front.double()(torch.from_numpy(given)).numpy()
    reference = NumpyPerceiver(tensors, MLP, 3)
    wanted = np.stack([reference.spectrum(segment).swapaxes(0, 1) for segment in given])
    np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max())  # kernels are stored in float32


def test_operators(models, form):
    """The engines' own, but for TensorRT's, which gets the standard's."""
    model = models[form]
    allowed = {"", "com.microsoft"} if form[1] == "ort" else {""}
    assert {node.domain for node in model.graph.node} <= allowed
    assert {opset.domain for opset in model.opset_import} <= {*allowed, "ai.onnx"}
    assert not model.functions
    if form[1] == "tensorrt":
        onnx.checker.check_model(model, full_check=True)
        fickle = {"NonZero", "Compress", "Unique", "If", "Loop", "Scan"}  # sizes that depend on numbers
        assert not fickle & {node.op_type for node in model.graph.node}


def test_the_decoder_reads_the_stored_positions(cases):
    case = cases["yptf_moe"]
    step = build_modules(case.model, case.features, case.tensors, Eager(), case.plan)["decode_step"].double()
    tokens = np.random.default_rng(5).integers(case.model.vocab_size, size=4)
    states = case.wanted[0, 1]
    network = NumpyT5(case.model, case.tensors)
    logits, layers = network.decode(tokens, states), range(case.model.decoder_layers)
    cross = [torch.from_numpy(network.cross(states, layer, name))[None] for name in "kv" for layer in layers]
    cache = [torch.zeros(1, case.model.num_heads, 6, case.model.d_kv, dtype=torch.float64) for _ in cross]
    for position, token in enumerate(tokens):
        given = (torch.tensor([value], dtype=torch.int32) for value in (token, position))
        _, _, *cache, found = step(*given, *cross, *cache)
        assert relative_error(found.numpy()[0], logits[position]) < 1e-7
