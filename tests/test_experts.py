"""Experts: which are chosen, in what shares, and that a token's result is its own."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from graph_cases import one_thread, relative_error
from mt3_export.experts import Experts, kept
from mt3_export.lowering import LOWERINGS, Eager
from mt3_export.onnx_graph import trace
from mt3_export.weights import Weights
from mt3_runtime.graphs import GraphSpec, TensorSpec
from perceiver_numpy import mixed

WIDTH, INNER, COUNT = 16, 24, 8
SPEC = GraphSpec(
    "experts", (TensorSpec("tokens", "float32", ("rows", WIDTH)),), (TensorSpec("mixed", "float32", ("rows", WIDTH)),)
)
CHOSEN = 2
LIMIT = 2e-6  # of float32 against float64


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def tensors():
    generator = np.random.default_rng(1)
    shapes = {"gate": (COUNT, WIDTH)}
    for i in range(COUNT):
        parts = {"w1": (INNER, WIDTH), "gate": (INNER, WIDTH), "w2": (WIDTH, INNER)}
        shapes |= {f"experts.{i}.{part}": shape for part, shape in parts.items()}
    arrays = {name: generator.normal(size=shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    return {f"mlp.{name}.weight": torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}


def some_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(count, WIDTH)).astype(np.float32)


def wanted(tensors: dict[str, torch.Tensor], tokens: np.ndarray, chosen: int = CHOSEN) -> np.ndarray:
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    results = [mixed(token, arrays, "mlp", chosen) for token in tokens.astype(np.float64)]
    assert min(margin for _, margin in results) > 1e-6  # ties are exact, or there is none
    return np.stack([output for output, _ in results])


def experts(tensors: dict[str, torch.Tensor], lowering: str, chosen: int = CHOSEN) -> Experts:
    return Experts(Weights(tensors, "mlp."), chosen, LOWERINGS.get(lowering, Eager()))


@pytest.fixture(scope="module")
def models(tensors):
    """Traced once: another router takes the place of its weights."""
    return {lowering: ir.to_proto(trace(experts(tensors, lowering), SPEC)) for lowering in LOWERINGS}


@pytest.fixture(params=["eager", *LOWERINGS])
def mix(request, models, tensors):
    """The experts in one form: tokens [n, d] and another router's weights, if any -> [n, d]."""

    def run(tokens: np.ndarray, router: np.ndarray | None = None) -> np.ndarray:
        replaced = tensors if router is None else routed(tensors, router)
        if request.param == "eager":
            return experts(replaced, "eager")(torch.from_numpy(tokens)).numpy()
        model = onnx.ModelProto()
        model.CopyFrom(models[request.param])
        [weight] = [weight for weight in model.graph.initializer if weight.name == "weights.router"]
        matrix = np.ascontiguousarray(replaced["mlp.gate.weight"].numpy().T)
        weight.CopyFrom(onnx.numpy_helper.from_array(matrix, weight.name))
        session = onnxruntime.InferenceSession(model.SerializeToString())
        return session.run(None, {"tokens": tokens})[0]

    return run


def routed(tensors: dict[str, torch.Tensor], router: np.ndarray) -> dict[str, torch.Tensor]:
    return tensors | {"mlp.gate.weight": torch.from_numpy(router.astype(np.float32))}


PLAIN = np.random.default_rng(3).normal(size=(COUNT, WIDTH))
ROUTERS = {
    "equal in pairs": PLAIN[[0, 0, 1, 1, 2, 2, 3, 3]],
    "equal, apart": PLAIN[[4, 0, 4, 1, 4, 2, 1, 0]],
    "all equal": np.zeros((COUNT, WIDTH)),
    "three alone, five equal": np.concatenate([PLAIN[:3], PLAIN[[4] * 5]]),
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_of_equals_the_first_is_chosen(mix, tensors, router):
    tokens = some_tokens(50)
    assert relative_error(mix(tokens, router), wanted(routed(tensors, router), tokens)) < LIMIT


@pytest.mark.parametrize("pair", [(0, 1), (6, 7), (2, 5)])
def test_experts_that_nobody_needs(mix, tensors, pair):
    """All tokens go to the same two, and the matrices of the others are empty."""
    router = np.full((COUNT, WIDTH), -1.0)
    router[list(pair)] = 1.0
    tokens = np.abs(some_tokens(40))
    assert relative_error(mix(tokens, router), wanted(routed(tensors, router), tokens)) < LIMIT


@pytest.mark.parametrize("count", [1, 2, 3, 200])
def test_any_number_of_tokens(mix, tensors, count):
    tokens = some_tokens(count)
    assert relative_error(mix(tokens), wanted(tensors, tokens)) < LIMIT


def test_order_and_company_of_tokens_change_nothing(mix):
    tokens = some_tokens(60)
    order = np.random.default_rng(4).permutation(60)
    together = mix(tokens)
    np.testing.assert_allclose(mix(tokens[order]), together[order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mix(tokens[[7, 7, 7]]), together[[7, 7, 7]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chosen", [1, 3])
def test_other_numbers_of_experts(tensors, chosen):
    tokens = some_tokens(30)
    model = ir.to_proto(trace(experts(tensors, "ort", chosen), SPEC))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert relative_error(session.run(None, {"tokens": tokens})[0], wanted(tensors, tokens, chosen)) < LIMIT


def test_only_what_was_chosen_is_computed(models, tensors):
    """Weights of an expert that no token chose may be anything."""
    router = np.full((COUNT, WIDTH), -1.0)
    router[[1, 4]] = 1.0
    spoiled = routed(tensors, router)
    tokens = np.abs(some_tokens(20))
    result = wanted(spoiled, tokens)
    model = onnx.ModelProto()
    model.CopyFrom(models["ort"])
    for weight in model.graph.initializer:
        if weight.name == "weights.router":
            weight.CopyFrom(onnx.numpy_helper.from_array(router.T.astype(np.float32), weight.name))
        elif weight.name in {f"weights.{part}.{i}" for part in ("up", "gate", "down") for i in (0, 2, 3, 5, 6, 7)}:
            shape = tuple(weight.dims)
            weight.CopyFrom(onnx.numpy_helper.from_array(np.full(shape, np.nan, np.float32), weight.name))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert relative_error(session.run(None, {"tokens": tokens})[0], result) < LIMIT


@pytest.mark.parametrize("chosen", range(1, 5))
def test_shares(chosen):
    """Every row of equal, unequal and vanishing probabilities: as many as wanted, summing to one."""
    values = (0.4, 0.3, 0.3, 0.0)
    rows = np.array(list(permutations(values)), np.float32)
    found = kept(torch.from_numpy(rows), chosen).numpy()
    for row, shares in zip(rows, found, strict=True):
        best = sorted(range(4), key=lambda i: (-row[i], i))[:chosen]
        np.testing.assert_allclose(shares[best], row[best] / row[best].sum(), rtol=1e-6)
        assert (np.delete(shares, best) == 0).all()
