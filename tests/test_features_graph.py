"""The graph that turns audio into features on a device, against the runtime's float64 front ends and against sums."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from feature_cases import SEGMENT, chord, noise, signals
from graph_cases import one_thread
from mt3_export.features_graph import (
    Features,
    Spectra,
    SplitProduct,
    bin_places,
    factors,
    fourier_matrices,
    trace_features,
)
from mt3_runtime.audio import load_audio
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import open_bundle
from mt3_runtime.decoding import Row, decode_rows
from mt3_runtime.families import decoding_rules
from mt3_runtime.features import feature_extractor
from mt3_runtime.graphs import features_spec
from mt3_runtime.segments import iter_segments
from mt3_runtime.specs import FeatureSpec, VocabularySpec

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
SHORT = SEGMENT - 1  # YourMT3's segments
SPECS = {
    "ddsp": FeatureSpec("ddsp", mel_norm=False),
    "torchaudio": FeatureSpec("torchaudio", mel_norm=True),
    "melspec": FeatureSpec("yourmt3_mel", mel_norm=False, f_min=50.0, f_max=8000.0, segment_samples=SHORT),
    "spec": FeatureSpec("yourmt3_spectrum", mel_norm=False, hop_length=300, bins=1024, segment_samples=SHORT),
}
SIGNALS = signals() | {
    "silence": np.zeros(SEGMENT, np.float32),
    "full scale": np.where(np.arange(SEGMENT) // 40 % 2, 1.0, -1.0).astype(np.float32),
    "partial": np.where(np.arange(SEGMENT) < 20_001, chord(SEGMENT) + 1e-3 * noise(SEGMENT), 0).astype(np.float32),
    "int16 as floats": (20_000 * chord(SEGMENT)).astype(np.float32),
}
# Between the partials of these there is nothing but the rounding of their samples, of which no float32 is sure.
BARE = ("tone", "tone of 16 bits", "two tones 100 dB apart", "full scale", "int16 as floats")
every = pytest.mark.parametrize("kind", SPECS)


class Graph:
    """A traced graph on ONNX Runtime."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec, self.proto = spec, ir.to_proto(trace_features(spec))
        self.data = self.proto.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.data, options, providers=["CPUExecutionProvider"])

    def __call__(self, segments: np.ndarray, frames: list[int] | None = None) -> np.ndarray:
        real = [self.spec.segment_frames] * len(segments) if frames is None else frames
        return self.session.run(None, {"samples": segments, "frames": np.array(real, np.int32)})[0]


@pytest.fixture(scope="module")
def graphs(_one_thread: None) -> dict[str, Graph]:
    return {kind: Graph(spec) for kind, spec in SPECS.items()}


def segments(spec: FeatureSpec, *names: str) -> np.ndarray:
    return np.stack([SIGNALS[name][: spec.segment_samples] for name in names or SIGNALS])


def runtimes(spec: FeatureSpec, samples: np.ndarray, frames: list[int] | None = None) -> np.ndarray:
    return feature_extractor(spec)(samples, [spec.segment_frames] * len(samples) if frames is None else frames)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize(
    ("kind", "largest", "of_bare", "mean_of_bare"),
    [
        ("ddsp", 1e-5, 0.06, 1e-3),
        ("torchaudio", 5e-7, 3e-4, 2e-6),
        ("melspec", 5e-7, 5e-5, 1e-5),
        ("spec", 1e-5, 4e-4, 2e-5),
    ],
)
def test_features_are_the_runtimes(
    graphs: dict[str, Graph], kind: str, largest: float, of_bare: float, mean_of_bare: float
):
    spec = SPECS[kind]
    difference = np.abs(graphs[kind](segments(spec)) - runtimes(spec, segments(spec)))
    for name, own in zip(SIGNALS, difference, strict=True):
        assert own.max() < (of_bare if name in BARE else largest), name
        assert own.mean() < (mean_of_bare if name in BARE else 1.5e-6), name


@pytest.fixture(scope="module")
def spectra() -> Spectra:
    return Spectra(2048)


def magnitudes(spectra: Spectra, name: str) -> tuple[np.ndarray, ...]:
    """Of nine frames [frames, 1025]: by the graph's module, exact ones, and as numpy's float32 transform has them."""
    window = np.sin(np.pi * np.arange(2048) / 2048) ** 2
    cut = np.stack([SIGNALS[name][start : start + 2048] for start in range(8000, 18_000, 1111)])
    with torch.no_grad():
        ours = spectra(torch.from_numpy(cut)).numpy()[:, bin_places(2048)]
    single = np.abs(np.fft.rfft(cut * window.astype(np.float32)))
    assert single.dtype == np.float32
    return ours, np.abs(np.fft.rfft(cut * window)), single


@pytest.mark.parametrize("name", SIGNALS)
def test_magnitudes_are_exact_to_the_last_digit_of_the_largest(spectra: Spectra, name: str):
    ours, exact, _ = magnitudes(spectra, name)
    assert (np.abs(ours - exact) <= 1.5e-7 * exact.max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("name", ["music", *BARE])
def test_quiet_bins_are_50_times_closer_than_float32_comes(spectra: Spectra, name: str):
    ours, exact, single = magnitudes(spectra, name)
    quiet = exact < 1e-4 * exact.max(axis=1, keepdims=True)
    assert quiet.mean() > 0.05
    error, usual = (np.abs(values - exact)[quiet].mean() for values in (ours, single))
    assert error < usual / 50


@pytest.mark.parametrize("length", [16, 250, 251, 500, 501, 2048])
def test_matrices_are_the_windowed_fourier_sum(length: int):
    """In float64, by the definition of the two stages, for lengths of every kind."""
    first, second = factors(length)
    assert first * second == length
    samples = noise(length)
    inner, outer = fourier_matrices(length)
    assert max(np.abs(inner).max(), np.abs(outer).max()) <= 1
    y = np.einsum("pq,qpi->iq", samples.reshape(first, second), inner[..., : first // 2 + 1])
    y = np.append(y, np.einsum("pq,qpi->iq", samples.reshape(first, second), inner[..., first // 2 + 1 :]), axis=1)
    z = np.einsum("iq,iqj->ij", y, outer)
    magnitudes = np.hypot(z[:, :second], z[:, second:]).ravel()[bin_places(length)]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    turns = np.outer(np.arange(length), np.arange(length // 2 + 1)) % length / length
    np.testing.assert_allclose(magnitudes, np.abs((samples * window) @ np.exp(-2j * np.pi * turns)), atol=1e-11)


def test_lengths_are_split_evenly():
    assert factors(2048) == (64, 32)
    assert factors(251) == (251, 1)  # a prime
    inner, outer = fourier_matrices(2048)
    assert (inner.shape, outer.shape) == ((32, 64, 66), (33, 64, 64))


def test_first_parts_are_multiplied_exactly():
    """Whatever the order of the sums: every product and every sum is a float32."""
    random = np.random.default_rng(5)
    matrix = random.uniform(-1, 1, (3, 64, 20))
    product = SplitProduct(matrix)
    x = random.uniform(-1, 1, (3, 50, 64)).astype(np.float32)
    result = product(torch.from_numpy(x))
    scale = 2.0 ** np.ceil(np.log2(np.abs(x).max(-1, keepdims=True)))
    np.testing.assert_array_equal(result.scale.numpy(), scale)
    cut = np.round(x / scale * 512) / 512
    np.testing.assert_array_equal(result.main.numpy(), cut @ (np.round(matrix * 512) / 512))


@pytest.mark.parametrize("spread", [0, 6])
def test_products_are_100_times_closer_than_float32(spread: int):
    random = np.random.default_rng(6)
    matrix = random.uniform(-1, 1, (2, 64, 40))
    exact = random.uniform(-1, 1, (2, 300, 64)) * 10.0 ** random.uniform(-spread, 0, (2, 300, 64))
    x = exact.astype(np.float32)
    rest = (exact - x).astype(np.float32)
    result = SplitProduct(matrix)(torch.from_numpy(x), torch.from_numpy(rest))
    found = (result.main.double() + result.rest.double()).numpy() * result.scale.numpy()
    usual = x @ matrix.astype(np.float32)
    error, common = (np.abs(values - exact @ matrix).max() for values in (found, usual))
    assert error < common / 100


@pytest.mark.parametrize("gain", [1e-38, 1e-30, 1e-20, 1e-3, 1.0, 1e6, 1e12])
def test_products_know_no_loudness(gain: float):
    matrix = np.random.default_rng(7).uniform(-1, 1, (1, 32, 8))
    x = np.random.default_rng(8).uniform(-1, 1, (1, 4, 32)) * np.array([1, 0.1, 0, 1e-3])[:, None]
    x = (gain * x).astype(np.float32)
    result = SplitProduct(matrix)(torch.from_numpy(x))
    found = (result.main.double() + result.rest.double()).numpy() * result.scale.numpy()
    exact = x.astype(np.float64) @ matrix
    size = np.abs(exact).max(-1, keepdims=True)
    assert (np.abs(found - exact) <= (1e-9 if gain > 1e-30 else 1e-6) * size).all()
    assert (found[:, 2] == 0).all()


@every
@pytest.mark.parametrize("gain", [1e-20, 1e-9, 1e12])
def test_any_loudness(graphs: dict[str, Graph], kind: str, gain: float):
    spec = SPECS[kind]
    samples = (gain * segments(spec, "loud noise", "clipped")).astype(np.float32)
    np.testing.assert_allclose(graphs[kind](samples), runtimes(spec, samples), rtol=0, atol=3e-5)


@every
def test_silence(graphs: dict[str, Graph], kind: str):
    silent = np.zeros((1, SPECS[kind].segment_samples), np.float32)
    np.testing.assert_allclose(graphs[kind](silent), runtimes(SPECS[kind], silent), rtol=0, atol=1e-6)
    if SPECS[kind].centred:
        assert not graphs[kind](silent).any()


@pytest.mark.parametrize("kind", ["ddsp", "torchaudio"])
def test_frames_after_the_end_are_zero(graphs: dict[str, Graph], kind: str):
    real = [0, 1, 100, 255, 256]
    samples = segments(SPECS[kind], *["partial"] * 5)
    ours = graphs[kind](samples, real)
    for own, count in zip(ours, real, strict=True):
        assert not own[count:].any()
        assert (own[:count] != 0).any(axis=1).all()
    np.testing.assert_allclose(ours, runtimes(SPECS[kind], samples, real), atol=2e-5)


@every
@pytest.mark.parametrize("length", [50_000, 2 * SEGMENT, 100])
def test_segments_of_a_piece(graphs: dict[str, Graph], kind: str, length: int):
    """As the runtime cuts them, the last of them partial or, at MT3, all padding but one frame."""
    spec = SPECS[kind]
    audio = (chord(length) + 1e-3 * noise(length)).astype(np.float32)
    cut = list(iter_segments(audio, spec, VocabularySpec()))
    samples, frames = np.stack([segment.samples for segment in cut]), [segment.frames for segment in cut]
    np.testing.assert_allclose(graphs[kind](samples, frames), runtimes(spec, samples, frames), atol=3e-5)


@every
def test_a_segment_does_not_depend_on_its_neighbours(graphs: dict[str, Graph], kind: str):
    samples = segments(SPECS[kind], "music", "silence", "loud noise")
    together = graphs[kind](samples)
    for own, alone in zip(together, samples, strict=True):
        np.testing.assert_allclose(own, graphs[kind](alone[None])[0], atol=1e-6)


@pytest.mark.parametrize("length", [500, 501, 503])
@pytest.mark.parametrize("samples", [600, 7000])
@pytest.mark.parametrize("frontend", ["ddsp", "torchaudio", "yourmt3_mel", "yourmt3_spectrum"])
def test_other_sizes(frontend: str, samples: int, length: int):
    """Transforms of odd and of prime lengths, hops that do not divide them."""
    bins = {"yourmt3_spectrum": length // 2}.get(frontend, 16)
    spec = FeatureSpec(
        frontend, mel_norm=frontend == "torchaudio", sample_rate=8000, hop_length=100, fft_length=length, bins=bins,
        f_min=50.0, f_max=3000.0, segment_samples=samples,
    )  # fmt: skip
    audio = noise(3 * samples).astype(np.float32).reshape(3, samples)
    frames = torch.full((3,), spec.segment_frames, dtype=torch.int32)
    with torch.no_grad():
        ours = Features(spec)(torch.from_numpy(audio), frames).numpy()
    np.testing.assert_allclose(ours, runtimes(spec, audio), atol=1e-5)


@every
def test_graph_keeps_its_contract(graphs: dict[str, Graph], kind: str):
    """Types, shapes and operators: standard ones of opset 18, nothing in half or double precision, nothing dynamic."""
    proto, spec = graphs[kind].proto, features_spec(SPECS[kind])
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    for found, wanted in ((proto.graph.input, spec.inputs), (proto.graph.output, spec.outputs)):
        assert [value.name for value in found] == [tensor.name for tensor in wanted]
        for value, tensor in zip(found, wanted, strict=True):
            assert onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) == tensor.dtype
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    computed = {name for node in proto.graph.node for name in node.output}
    values = [value for value in inferred.graph.value_info if value.name in computed]
    types = {value.type.tensor_type.elem_type for value in values}
    assert types == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.BOOL}
    assert {node.op_type for node in proto.graph.node} <= {
        "Abs", "Add", "Cast", "Ceil", "Clip", "Concat", "Div", "Gather", "Greater", "Less", "Log", "MatMul", "Mul",
        "Pad", "ReduceMax", "ReduceMin", "Reshape", "Round", "Slice", "Split", "Sqrt", "Sub", "Transpose", "Unsqueeze",
        "Where",
    }  # fmt: skip
    assert len(graphs[kind].data) < 4.5e6


def test_spec_is_typed_alike_in_every_precision():
    spec = features_spec(SPECS["ddsp"])
    assert spec.typed("fp16") == spec.typed("bf16") == spec


@every
def test_tensorrt_rtx_builds_it(graphs: dict[str, Graph], kind: str):
    """For a GPU that is not there; with TF32, which it is built with by default, off."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(graphs[kind].data)
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    spec = features_spec(SPECS[kind])
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    assert [tensor.name for tensor in inputs] == spec.input_names
    assert [network.get_output(index).name for index in range(network.num_outputs)] == spec.output_names
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types = {layer.get_output(index).dtype for layer in layers for index in range(layer.num_outputs)}
    assert types == {trt.float32, trt.int32, trt.int64, trt.bool}
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    assert config.get_flag(trt.BuilderFlag.TF32)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for tensor in inputs:
        profile.set_shape(tensor.name, *((count, *tensor.shape[1:]) for count in (1, 4, 8)))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 2e6


def test_demo_bundle_decodes_the_same_tokens(graphs: dict[str, Graph]):
    bundle = open_bundle(ROOT / "engines" / "demo")
    manifest = bundle.manifest
    assert manifest.features == SPECS["torchaudio"]
    audio = load_audio(ROOT / "engines" / "demo_clip" / "clip.flac", sample_rate=manifest.features.sample_rate)
    cut = list(iter_segments(audio, manifest.features, manifest.vocabulary))
    samples, frames = np.stack([segment.samples for segment in cut]), [segment.frames for segment in cut]
    backend = OrtBackend(bundle, slots=len(cut), threads=1)

    def decoded(features: np.ndarray) -> dict[int, tuple[list[int], np.ndarray]]:
        rows = [Row(index, states[0]) for index, states in enumerate(backend.encode(features))]
        found = decode_rows(backend, rows, decoding_rules(manifest.model))
        return {row.key: (row.tokens.tolist(), row.log_probs) for row in found}

    features = feature_extractor(manifest.features)(samples, frames)
    theirs = decoded(features)
    assert sum(len(tokens) for tokens, _ in theirs.values()) > 200

    def apart(other: np.ndarray) -> np.ndarray:
        """How far the log-probabilities are from theirs; the tokens are the same."""
        found = decoded(other)
        for key, (tokens, _) in theirs.items():
            assert found[key][0] == tokens
        return np.concatenate([found[key][1] - log_probs for key, (_, log_probs) in theirs.items()])

    # Near is what one rounding of every feature, up or down, does too: these weights make 1e-4 of it in some steps.
    rng = np.random.default_rng(0)
    ways = [rng.choice(np.array([-np.inf, np.inf], np.float32), features.shape) for _ in range(3)]
    rounded = [apart(np.nextafter(features, way)) for way in ways]
    computed = graphs["torchaudio"](samples, frames)
    differences = apart(computed)
    for order in (2, np.inf):
        assert np.linalg.norm(differences, order) < 2 * max(np.linalg.norm(each, order) for each in rounded)
    with pytest.raises(AssertionError):
        apart(computed * np.float32(0.97))  # what a wrong scale would do
