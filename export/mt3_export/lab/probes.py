"""Looks into graphs: what every product reads and gives, in fp32 and in another precision side by side."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from mt3_export.graph_reading import read_graph
from mt3_export.lab.emulation import FULL
from mt3_export.lab.errors import ErrorSums
from mt3_export.lab.results import LayerError
from mt3_export.lab.variants import LOWERING
from mt3_export.products import is_gated, products, weights_of
from mt3_runtime.backends.sessions import PROVIDER, import_onnxruntime, session_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mt3_export.lab.variants import Variant
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.graphs import GraphSpec

EXPERT = re.compile(r"\.(up|gate|down)\.\d+$")


@dataclass(frozen=True, slots=True)
class Place:
    """A product in the graph of fp32: what it reads and gives, and its node, which others keep the name of.

    `compared`: not of experts, as which tokens they are given depends on what came before. `gated`: it reads what gates
    let through. `weights`: the largest number of its matrix.
    """

    layer: str
    reads: str
    gives: str
    node: str
    compared: bool
    gated: bool
    weights: float


def places_of(bundle: Bundle, graph: str) -> list[Place]:
    """Every product of a graph of fp32, in the order of computation."""
    found = products(read_graph(bundle, bundle.graph(graph, LOWERING, "fp32")).graph)
    return [
        Place(
            layer=layer,
            reads=str(node.inputs[0].name if node.inputs[0] else ""),
            gives=str(node.outputs[0].name),
            node=str(node.name),
            compared=EXPERT.search(layer) is None,
            gated=is_gated(node),
            weights=float(np.abs(weights_of(node)).max(initial=0.0)),
        )
        for layer, node in found.items()
    ]


class Probe:
    """A graph of a bundle that also gives what is inside of it. Weights were verified when it was loaded before."""

    def __init__(
        self, bundle: Bundle, graph: str, precision: str, names: Mapping[str, Sequence[str]], threads: int
    ) -> None:
        """Open it; `names`: by label, names that a value may have, the first that is there counts."""
        entry = bundle.graph(graph, LOWERING, precision)
        model = read_graph(bundle, entry)
        values = _values(model.graph)
        self.seen = {
            label: next((name for name in choices if name in values), None) for label, choices in names.items()
        }
        given = {output.name for output in model.graph.outputs} | {value.name for value in model.graph.inputs}
        wanted = {name for name in self.seen.values() if name is not None and name not in given}
        model.graph.outputs.extend(values[name] for name in sorted(wanted))
        text = ir.to_proto(model).SerializeToString()
        ort, options = import_onnxruntime(), session_options(bundle, threads)
        self.session: Any = ort.InferenceSession(text, options, providers=[PROVIDER])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, and the inputs, which a product may read."""
        return {**feed, **dict(zip(self.outputs, self.session.run(None, dict(feed)), strict=True))}

    def inside(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What was seen, by label."""
        return {label: outputs[name] for label, name in self.seen.items() if name is not None}


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    inner = {str(output.name): output for node in graph for output in node.outputs if output.name}
    return inner | {str(value.name): value for value in graph.inputs}


@dataclass(frozen=True, slots=True)
class Pair:
    """A bundle of fp32, and one of a variant with the precision as that lists it."""

    exact: Bundle
    other: Bundle
    variant: Variant
    label: str


class Watch:
    """One graph in fp32 and in another precision, given the same, layer by layer."""

    def __init__(self, pair: Pair, spec: GraphSpec, threads: int) -> None:
        self.spec, self.places, self.variant = spec, places_of(pair.exact, spec.name), pair.variant
        reads = {f"reads {place.layer}": [place.reads] for place in self.places}
        gives = {place.layer: [place.gives] for place in self.places}
        changed = {place.layer: [f"{place.node}.product", f"{place.gives}.back", place.gives] for place in self.places}
        self.exact = Probe(pair.exact, spec.name, "fp32", reads | gives, threads)
        self.other = Probe(pair.other, spec.name, pair.label, changed, threads)
        self._errors: defaultdict[str, ErrorSums] = defaultdict(ErrorSums)
        self._largest: defaultdict[str, float] = defaultdict(float)

    def run(self, inputs: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray] | None = None) -> Results:
        """Give both the same, or the other one `others`; both outputs by name."""
        wanted = self.exact.run(inputs)
        found = self.other.run(inputs if others is None else others)
        exact, changed = self.exact.inside(wanted), self.other.inside(found)
        for place in self.places:
            pair = (exact[f"reads {place.layer}"], exact[place.layer])
            largest = max(float(np.abs(array).max(initial=0.0)) for array in pair)
            self._largest[place.layer] = max(self._largest[place.layer], largest)
            if place.compared and place.layer in changed:
                self._errors[place.layer].add(exact[place.layer], changed[place.layer])
        return wanted, found

    @property
    def largest(self) -> float:
        """The largest number that products read or gave in fp32, as far as the precision has to hold it.

        In half precision that is not what stays float32, nor, in fp16, what is divided row by row; but weights are.
        """
        if not self.variant.is_half:
            return max(self._largest.values(), default=0.0)
        held = [place for place in self.places if FULL.isdisjoint(place.layer.split("."))]
        divided = self.variant.precision == "fp16"
        numbers = [self._largest[place.layer] for place in held if not (divided and place.gated)]
        return max([*numbers, *(place.weights for place in held)], default=0.0)

    def layers(self) -> Iterator[LayerError]:
        """What was found, in the order of computation."""
        for place in [place for place in self.places if place.compared]:
            error = self._errors[place.layer]
            largest = self._largest[place.layer]
            yield LayerError(self.spec.name, place.layer, error.relative, largest, error.non_finite)


Results = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
