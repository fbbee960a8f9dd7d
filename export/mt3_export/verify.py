"""Runs every graph of a bundle beside the torch network it was traced from and says how far they are apart.

Torch computes in float64, so that the distance is the graphs' own and not half the reference's.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mt3_export.lowering import Eager
from mt3_export.network import build_modules
from mt3_export.quantized import BLOCKS, DYNAMIC, FOUR_BITS, STATIC, Form, form_of
from mt3_export.reference import Comparison, Reference
from mt3_export.weights_file import stored_weights
from mt3_runtime.backends.ort import LOWERING, open_session
from mt3_runtime.errors import CheckpointError
from mt3_runtime.features import feature_extractor
from mt3_runtime.graphs import FEATURES, QUANTIZED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from mt3_export.checkpoint import Checkpoint
    from mt3_export.experts import Matrices
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.graphs import GraphSpec, Precision
    from mt3_runtime.manifest import GraphFile
    from mt3_runtime.specs import FeatureSpec

RELATIVE_LIMIT: dict[Precision, float] = {
    "fp32": 1e-5,
    "fp16": 2e-3,
    "bf16": 1.6e-2,
}  # norm of the difference over norm
# Of what is quantised; trained weights are harder than random ones (docs/quantization.md: 0.078, 0.026, 0.25, 0.06).
QUANTIZED_LIMIT: dict[Form, float] = {DYNAMIC: 0.15, BLOCKS: 0.05, FOUR_BITS: 0.4, STATIC: 0.12}
STATIC_ENCODER_LIMIT = 0.25  # with weights of 7 bits throughout: 0.13
ROUTED_QUANTIZED_LIMIT = 0.35  # of an encoder with experts: see ROUTED_FACTOR
FEATURES_LIMIT = 1e-5
ROUTED_FACTOR = 30  # of half precision with experts, where a few tokens are sent to another one and differ whole
NOT_HERE = "not run here (ONNX Runtime has no bfloat16 on the CPU)"
CLEAR_GAP = 1e-5  # in logits of about 1, which float32 gets wrong by a tenth of that
DRAWS = 6  # for every segment that is wanted; every third or so will do


@dataclass(frozen=True, slots=True)
class GraphReport:
    """How one graph in one form differs from torch.

    `relative_error` is the norm of the difference over the norm of the reference, the worst over outputs and steps;
    `max_error` the largest absolute difference. Tokens are counted for the decode step only: those that agree, those
    that differ where the reference's logits of the two tokens are within twice the error (`near_ties`), and the
    others. A graph that cannot be run on the CPU is listed with `ran` false; nothing is known of it.
    """

    graph: str
    lowering: str
    precision: str
    max_error: float
    relative_error: float
    limit: float
    tokens: int = 0
    equal_tokens: int = 0
    near_ties: int = 0
    ran: bool = True

    @property
    def passed(self) -> bool:
        """Whether no error is beyond its limit and every token agrees, near-ties aside, as far as the graph ran."""
        return self.relative_error <= self.limit and self.equal_tokens + self.near_ties == self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Fields and verdict, for JSON."""
        return {**asdict(self), "passed": self.passed}

    def to_text(self) -> str:
        """One line for a person."""
        if not self.ran:
            return f"--   {self.lowering:<9} {self.graph:<12} {self.precision}: {NOT_HERE}"
        tokens = f", tokens {self.equal_tokens} of {self.tokens} equal" if self.tokens else ""
        ties = f", {self.near_ties} near-ties" if self.near_ties else ""
        return (
            f"{'ok  ' if self.passed else 'FAIL'} {self.lowering:<9} {self.graph:<12} {self.precision}: relative error "
            f"{self.relative_error:.1e} (limit {self.limit:.0e}), largest {self.max_error:.1e}{tokens}{ties}"
        )


def verify_bundle(
    bundle: Bundle, checkpoint: Checkpoint, *, segments: int = 2, steps: int = 64, seed: int = 0
) -> list[GraphReport]:
    """Compare every graph of `bundle` with the torch network of `checkpoint` on features of synthetic chords.

    The decode step is fed the tokens that torch chose and its own cache, so errors add up as they do in use. Where
    the bundle stores weights in fp16, torch gets the same rounded weights: what is measured is the graphs. A memory is
    told of what comes before a first segment, then of any tokens. No more than `max_length` steps are taken.

    Raises:
        BundleError: a file is not what the manifest lists, or a graph gives arrays of other shapes.
        CheckpointError: the checkpoint is not the one the bundle was made from.
    """
    manifest = bundle.manifest
    model = replace(checkpoint.model, name=manifest.model.name)  # a bundle may be called as one likes
    if (model, checkpoint.features) != (manifest.model, manifest.features):
        raise CheckpointError(f"{checkpoint.source} is another model than {bundle.path}: name the one it was made from")
    tensors = stored_weights(checkpoint.tensors, manifest.origin.weights_storage)
    routing = Routing()
    modules = build_modules(checkpoint.model, checkpoint.features, tensors, routing, checkpoint.design)
    if checkpoint.design and checkpoint.design.chosen:
        features = decided_features(modules["encoder"].double(), routing, manifest.features, segments, seed)
    else:
        features = chord_features(manifest.features, segments, seed)
    reference = Reference(modules, features, min(steps, model.max_length), model, seed)
    contracts = {spec.name: spec for spec in manifest.contracts}
    reports = []
    for entry in manifest.graphs:
        if entry.graph == FEATURES or _is_of_fp32(entry):
            continue
        limit = _limit(entry, checkpoint)
        compare, ran = Comparison(), entry.precision != "bf16"
        if ran:
            fused = entry.lowering == LOWERING  # what is for devices is computed as it is written
            session = open_session(bundle, entry, threads=torch.get_num_threads(), fused=fused)
            spec = contracts[entry.graph].typed(entry.precision)
            together = form_of(entry.precision, entry.graph) != DYNAMIC
            reference.run(entry.graph, _Runner(session, spec, together=together), compare)
        form = (entry.graph, entry.lowering, entry.precision)
        tokens, equal, ties = compare.counts
        reports.append(GraphReport(*form, compare.largest, compare.relative, limit, tokens, equal, ties, ran))
    return [*_verify_features(bundle, segments, seed), *reports]


def _verify_features(bundle: Bundle, segments: int, seed: int) -> list[GraphReport]:
    """Compare the graph of the features, which is the same in every form, with what the runtime computes in float64."""
    spec = bundle.manifest.features
    entry = next((entry for entry in bundle.manifest.graphs if entry.graph == FEATURES), None)
    if entry is None:
        return []
    audio, compare = chord_audio(spec, segments, seed), Comparison()
    frames = [spec.segment_frames] * segments
    session = open_session(bundle, entry, threads=torch.get_num_threads())
    found = session.run(None, {"samples": audio, "frames": np.array(frames, np.int32)})[0]
    compare.arrays(found, feature_extractor(spec)(audio, frames))
    return [GraphReport(FEATURES, "devices", "fp32", compare.largest, compare.relative, FEATURES_LIMIT)]


def _is_of_fp32(entry: GraphFile) -> bool:
    """Whether it is a graph of fp32 that a quantised precision leaves as it is."""
    return entry.precision in QUANTIZED and form_of(entry.precision, entry.graph) is None


def _limit(entry: GraphFile, checkpoint: Checkpoint) -> float:
    routed = entry.graph == "encoder" and checkpoint.design is not None and checkpoint.design.chosen > 0
    form = form_of(entry.precision, entry.graph)
    if form:
        if routed:
            return ROUTED_QUANTIZED_LIMIT
        return STATIC_ENCODER_LIMIT if (form, entry.graph) == (STATIC, "encoder") else QUANTIZED_LIMIT[form]
    factor = ROUTED_FACTOR if routed and entry.precision != "fp32" else 1
    return RELATIVE_LIMIT[entry.precision] * factor


class Routing(Eager):
    """Plain torch, which notes how close a token came to being sent to another expert: in logits, the smallest gap."""

    def __init__(self) -> None:
        super().__init__()
        self.gap = math.inf

    def experts(self, tokens: Tensor, probabilities: Tensor, experts: list[Matrices], chosen: int) -> Tensor:
        """As `Eager.experts`."""
        if chosen < len(experts):
            top = probabilities.topk(chosen + 1, -1).values
            self.gap = min(self.gap, float((top[:, -2] / top[:, -1]).log().min()))
        return super().experts(tokens, probabilities, experts, chosen)


@torch.inference_mode()
def decided_features(
    encoder: torch.nn.Module, routing: Routing, spec: FeatureSpec, segments: int, seed: int
) -> np.ndarray:
    """Features of chords that leave no choice of experts to rounding, as far as a few draws give any.

    A segment makes some 34,000 such choices; where two experts are as good as equal, float32 may take the other one,
    and one token then differs as a whole.
    """
    drawn: list[tuple[float, np.ndarray]] = []
    for turn in range(DRAWS * segments):
        routing.gap = math.inf
        features = chord_features(spec, 1, seed + turn)
        encoder(torch.from_numpy(features).double())
        drawn.append((routing.gap, features))
        if sum(gap > CLEAR_GAP for gap, _ in drawn) == segments:
            break
    drawn.sort(key=lambda pair: pair[0], reverse=True)
    return np.concatenate([features for _, features in drawn[:segments]])


def chord_features(spec: FeatureSpec, segments: int, seed: int) -> np.ndarray:
    """Features of decaying chords [segments, frames, bins]."""
    audio = chord_audio(spec, segments, seed)
    return feature_extractor(spec)(audio, [spec.segment_frames] * segments)


def chord_audio(spec: FeatureSpec, segments: int, seed: int) -> np.ndarray:
    """Decaying chords over a little noise [segments, samples]: weights want to see music."""
    generator = np.random.default_rng(seed)
    time = np.arange(spec.segment_samples) / spec.sample_rate
    audio = generator.normal(0, 1e-3, (segments, len(time)))
    for row in range(segments):
        for onset, pitch in zip(generator.uniform(0, time[-1], 8), generator.integers(40, 85, 8), strict=True):
            since = time - onset
            tone = sum(np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * k * since) / k for k in (1, 2, 3))
            audio[row] += np.where(since >= 0, 0.1 * np.exp(-3 * np.maximum(since, 0)) * tone, 0)
    return audio.astype(np.float32)


class _Runner:
    """A graph as a function from arrays to arrays, which are given the types that it takes.

    Without `together` every row goes through it alone, as the runtime has it.
    """

    def __init__(self, session: Any, spec: GraphSpec, *, together: bool) -> None:
        self.session, self.spec, self.together = session, spec, together

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        pairs = zip(self.spec.inputs, inputs, strict=True)
        feed = {tensor.name: array.astype(tensor.dtype, copy=False) for tensor, array in pairs}
        if self.together:
            return self._run(feed)
        rows = range(len(inputs[0]))
        alone = [self._run({name: array[row : row + 1] for name, array in feed.items()}) for row in rows]
        return [np.concatenate(parts) for parts in zip(*alone, strict=True)]

    def _run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        outputs: list[np.ndarray] = self.session.run(self.spec.output_names, feed)
        return outputs
