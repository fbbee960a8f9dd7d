"""Bisection names what was planted, and its plan takes the cost away."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from bundle_cases import forge
from conftest import TINY_FEATURES, TINY_MODEL
from graph_cases import one_thread
from mt3_export.bundle_writer import export_bundle
from mt3_export.checkpoint import Checkpoint
from mt3_export.lab.bisection import LEFT, Cost, Trial, bisect, bisect_precision, plan_for
from mt3_export.lab.bisections import check_bisected
from mt3_export.lab.material import ForcedRow, Material
from mt3_export.lab.variants import VARIANTS
from mt3_export.quantize_bundle import quantize_bundle
from mt3_export.random_weights import random_tensors
from mt3_export.verify import chord_features
from mt3_runtime.bundle import open_bundle
from mt3_runtime.errors import OptionError

STEPS = 6


def material(rows=3):
    rng = np.random.default_rng(4)
    features = chord_features(TINY_FEATURES, rows, seed=1)
    told = [rng.integers(2, 1500, STEPS).astype(np.int32) for _ in range(rows)]
    return Material(features, tuple(ForcedRow(place, place, 0, told[place], None) for place in range(rows)))


def trial(bundle, name, folder):
    return Trial(bundle, VARIANTS[name], material(), folder / "work" / "trial", threads=1)


def quiet(_):
    pass


def test_corrupted_weights_of_one_layer_are_named_first(tiny_bundle, tmp_path):
    """Weights of a quantised bundle that no longer are what its fp32 has."""
    quantized = quantize_bundle(tiny_bundle, tmp_path / "quantized", ["int8"])
    entry = open_bundle(quantized).graph("decode_step", "ort", "int8")
    model = ir.load(quantized / entry.file)
    scales = model.graph.initializers["weights.layers.1.cross_query.scales"]
    wrong = scales.const_value.numpy() * np.float32(-3)
    scales.const_value = ir.tensor(wrong, name=scales.name)
    forge(quantized, {entry.file: ir.to_proto(model).SerializeToString()})
    said = []
    found = bisect_precision(trial(open_bundle(quantized), "int8", tmp_path), said.append)
    first = found.suspects[0]
    assert (first.graph, first.layer) == ("decode_step", "layers.1.cross_query")
    assert first.share > 0.5
    assert found.kept["decode_step"] == ("layers.1.cross_query",)
    assert found.cost_kept <= LEFT * found.cost_all
    assert found.agreement_kept >= found.agreement_all
    assert any("decode_step layers.1.cross_query" in line for line in said)
    assert not (tmp_path / "work" / "trial").exists()


def test_a_product_that_overflows_fp16_is_named_first(tmp_path):
    """The linear half of a gated layer a million times as large, and what follows it so much smaller: fp32's notes."""
    tensors = random_tensors(TINY_MODEL, seed=7)
    linear, output = (f"encoder.block.1.layer.1.DenseReluDense.{name}.weight" for name in ("wi_1", "wo"))
    loud = {**tensors, linear: tensors[linear] * 1e6, output: tensors[output] * 1e-6}
    checkpoint = Checkpoint(TINY_MODEL, TINY_FEATURES, loud, "random:7", None)
    with one_thread():
        bundle = open_bundle(export_bundle(checkpoint, tmp_path / "loud"))
    found = bisect_precision(trial(bundle, "fp16", tmp_path), quiet)
    first = found.suspects[0]
    assert (first.graph, first.layer) == ("encoder", "layers.1.feed_forward.gates")
    assert first.non_finite == 3 * STEPS
    assert [suspect.non_finite > 0 for suspect in found.suspects].count(True) == 1
    assert found.agreement_all == 0
    # What follows it is so small that fp16 loses it: the two belong together, and nothing else is kept.
    assert set(found.kept) == {"encoder"}
    assert "layers.1.feed_forward.gates" in found.kept["encoder"]
    assert set(found.kept["encoder"]) <= {"layers.1.feed_forward.gates", "layers.1.feed_forward.output"}
    assert found.agreement_kept > 0.9


class Scripted:
    """A trial whose costs are given, product by product, and add up."""

    def __init__(self, costs, broken=()):
        self.costs, self.broken, self.variant, self.tried = costs, broken, VARIANTS["int8"], set()
        self.products = list(costs)

    def cost(self, lowered):
        chosen = frozenset(lowered)
        self.tried.add(chosen)
        return Cost(sum(product in self.broken for product in chosen), sum(self.costs[p] for p in chosen), 0.5)


def products(count):
    return [("encoder" if i < count // 2 else "decode_step", f"layers.{i}") for i in range(count)]


@pytest.mark.parametrize("guilty", [[3], [0, 40], [7, 8, 63], list(range(0, 64, 9))])
def test_halving_finds_all_that_is_to_blame_in_few_runs(guilty):
    every = products(64)
    costs = dict.fromkeys(every, 1e-06) | {every[i]: 1.0 + i / 100 for i in guilty}
    scripted = Scripted(costs)
    found = [product for product, _ in bisect(scripted, quiet)]
    assert found == [every[i] for i in sorted(guilty, reverse=True)]
    assert len(scripted.tried) <= 3 + len(guilty) * 2 * 6


def test_a_plan_keeps_as_few_as_are_enough():
    every = products(8)
    scripted = Scripted(dict(zip(every, (8.0, 4.0, 2.0, 1.0, 1e-9, 1e-9, 1e-9, 1e-9), strict=True)))
    kept, left = plan_for(scripted, bisect(scripted, quiet))
    assert kept == every[:2]
    assert left.kl == pytest.approx(3.0)


def test_what_is_not_finite_is_worse_than_any_divergence_and_always_kept():
    every = products(6)
    scripted = Scripted(dict.fromkeys(every, 1.0), broken={every[4]})
    suspects = bisect(scripted, quiet)
    assert suspects[0][0] == every[4]
    kept, left = plan_for(scripted, suspects)
    assert every[4] in kept
    assert left.non_finite == 0


def test_one_that_overflows_among_many_is_singled_out_alone():
    """With it nothing is finite, so that there is no divergence to compare others with."""

    class Overflowing(Scripted):
        def cost(self, lowered):
            cost = super().cost(lowered)
            return Cost(100, 0.0, 0.0) if cost.non_finite else cost

    every = products(120)
    scripted = Overflowing(dict.fromkeys(every, 2e-6), broken={every[77]})
    suspects = bisect(scripted, quiet)
    assert [product for product, _ in suspects] == [every[77]]
    assert len(scripted.tried) < 150
    assert plan_for(scripted, suspects)[0] == [every[77]]


def test_what_does_no_harm_is_not_kept():
    every = products(4)
    scripted = Scripted(dict(zip(every, (5e-5, 1e-5, 1e-6, 1e-9), strict=True)))
    suspects = bisect(scripted, quiet)
    assert [product for product, _ in suspects] == every[:2]
    assert plan_for(scripted, suspects)[0] == []


def test_nothing_is_to_blame_where_nothing_is_lost():
    scripted = Scripted(dict.fromkeys(products(6), 1e-12))
    assert bisect(scripted, quiet) == []
    assert plan_for(scripted, [])[0] == []


def test_refusals(tiny_bundle, tmp_path):
    with pytest.raises(OptionError, match="'fp32' cannot be bisected: use fp16, bf16, int8, w8, w4"):
        check_bisected(["fp32"])
    assert [variant.name for variant in check_bisected(["int8", "fp16", "int8"])] == ["int8", "fp16"]
    with pytest.raises(OptionError, match="give audio with music"):
        Trial(tiny_bundle, VARIANTS["int8"], Material(np.empty((0, 0, 0)), ()), tmp_path, 1)
    with pytest.raises(OptionError, match="changes no product"):
        Trial(tiny_bundle, VARIANTS["fp32"], material(), tmp_path, 1)
