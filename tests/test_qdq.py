"""Static 8 bits: scales are those of the audio, bundles hold what they should, notes stay."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
from onnx import numpy_helper

from bundle_cases import copied, forge
from graph_cases import check_rows_are_alone
from mt3_export import qdq_files
from mt3_export.calibration import SHARE, Calibration, calibrate, choose_passages
from mt3_export.cli import main
from mt3_export.mixed_plan import MixedPlan
from mt3_export.precision import checked_precisions
from mt3_export.qdq import ARITHMETIC
from mt3_export.quantize_bundle import quantize_bundle
from mt3_export.verify import chord_audio, verify_bundle
from mt3_runtime.backends.ort import OrtBackend, import_onnxruntime
from mt3_runtime.bundle import demo_bundle_path, open_bundle
from mt3_runtime.errors import BundleError, DeviceError, OptionError
from mt3_runtime.features import feature_extractor
from mt3_runtime.loading import load
from mt3_runtime.scoring import onset_f1

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from demo_model.clips import HELD_OUT, VALIDATION, make_clip
from demo_model.scores import KINDS

RATE = 16_000
BOTH = pytest.mark.parametrize("lowering", ARITHMETIC)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- calibration --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def music(tiny_bundle, tmp_path_factory):
    """Three files, of 2.5, 1 and 1 segments."""
    folder = tmp_path_factory.mktemp("music")
    audio = chord_audio(tiny_bundle.manifest.features, 4, seed=3).reshape(-1)
    size = len(audio) // 4
    for name, part in (("a", audio[: 5 * size // 2]), ("b", 0.3 * audio[-size:-1]), ("c", 3 * audio[-size:-1])):
        soundfile.write(folder / f"{name}.wav", part, RATE, subtype="FLOAT")
    return folder


@pytest.fixture(scope="module")
def calibration(tiny_bundle, music):
    return calibrate(tiny_bundle, [music], threads=1)


def test_scales_are_those_of_the_audio(tiny_bundle, music, calibration):
    """Features and encoder states, computed here."""
    spec = tiny_bundle.manifest.features
    extract, backend = feature_extractor(spec), OrtBackend(tiny_bundle, slots=1, threads=1)
    features, states = [], []
    for path in sorted(music.iterdir()):
        audio = soundfile.read(path, dtype="float32")[0]
        for start in range(0, len(audio), spec.segment_samples):
            part = audio[start : start + spec.segment_samples]
            samples = np.zeros((1, spec.segment_samples), np.float32)
            samples[0, : len(part)] = part
            features.append(extract(samples, [min(len(part) // spec.hop_length + 1, spec.segment_frames)]))
            states.append(backend.encode(features[-1]))
    assert calibration.segments == len(features) == 5
    for graph, product, arrays in (("encoder", "projection", features), ("cross_kv", "projections.0", states)):
        sizes = np.sort(np.abs(np.stack(arrays)), axis=None)
        exact = sizes[sizes > 0][int(np.ceil(SHARE * (sizes > 0).sum())) - 1]
        assert calibration.scales[graph][product] * 127 == pytest.approx(exact, rel=1 / 100)
    assert len({calibration.scales["cross_kv"][f"projections.{i}"] for i in range(4)}) == 1
    assert "layers.0.feed_forward.output" not in calibration.scales["encoder"]  # it is divided by rows


def test_order_of_files_does_not_matter(tiny_bundle, music, calibration):
    files = [music / name for name in ("c.wav", "a.wav", "b.wav")]
    assert calibrate(tiny_bundle, files, threads=1) == calibration


def test_passages(tiny_bundle, context_bundle, music):
    """Evenly spaced over all that there is; two in a row where one is told of the other."""
    a, b, c = (music / f"{name}.wav" for name in "abc")
    assert choose_passages(tiny_bundle, [music], 64) == {a: [0, 1, 2], b: [0], c: [0]}
    assert choose_passages(tiny_bundle, [music], 2) == {a: [1], b: [0]}
    assert choose_passages(context_bundle, [music], 64) == {a: [0, 1], b: [0], c: [0]}
    assert choose_passages(context_bundle, [music], 3) == {b: [0]}


def test_nothing_to_calibrate_with(tiny_bundle, tmp_path):
    with pytest.raises(OptionError, match=r"no sound files in .*: give files or folders"):
        calibrate(tiny_bundle, [tmp_path])
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE), RATE)
    with pytest.raises(OptionError, match="nothing to hear in the audio for calibration: give music"):
        calibrate(tiny_bundle, [tmp_path])


def test_calibration_finds_what_is_no_number(tiny_folder, music, tmp_path):
    folder = copied(tiny_folder, tmp_path / "damaged")
    model = onnx.load(folder / "decode_step.fp32.ort.onnx", load_external_data=False)
    [table] = [tensor for tensor in model.graph.initializer if tensor.name == "weights.positions"]
    offset = next(int(entry.value) for entry in table.external_data if entry.key == "offset")
    weights = bytearray((folder / "weights.fp32.bin").read_bytes())
    weights[offset : offset + 4] = np.float32(np.nan).tobytes()
    forge(folder, {"weights.fp32.bin": bytes(weights)})
    with pytest.raises(BundleError, match=r"in decode_step.fp32.ort.onnx of .* is not finite: export a checkpoint"):
        quantize_bundle(open_bundle(folder), tmp_path / "new", ["qdq"], calibration=[music])
    assert not (tmp_path / "new").exists()


# ---- bundles ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_bundle, music, tmp_path_factory):
    """The tiny bundle and qdq: read it, never change it."""
    return quantize_bundle(tiny_bundle, tmp_path_factory.mktemp("qdq") / "all", ["qdq"], calibration=[music])


def products(model):
    """Products with weights, by whether these are levels."""
    made = {node.output[0]: node for node in model.graph.node}
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {True: [], False: []}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            source = made.get(node.input[1])
            if node.input[1] in weights or (source is not None and source.input[0] in weights):
                found[source is not None and source.op_type == "DequantizeLinear"].append(node)
    return found


def test_bundle(folder, tiny_bundle):
    manifest = open_bundle(folder).manifest
    assert manifest.origin.tools["calibration qdq"] == "5 segments, range of 99.999% of the numbers"
    added = {(entry.graph, entry.lowering) for entry in manifest.graphs if entry.precision == "qdq"}
    assert added == {(graph, how) for graph in ("encoder", "cross_kv", "decode_step") for how in ("ort", "tensorrt")}
    assert set(tiny_bundle.manifest.graphs) < set(manifest.graphs)
    for entry in manifest.graphs:
        if entry.precision == "qdq":
            path = folder / entry.file
            onnx.checker.check_model(path)
            model = onnx.load(path)
            domains = {node.domain for node in model.graph.node}
            assert domains == {""} or entry.lowering == "ort"
            found = products(model)
            assert found[True]
            assert not found[False]
            levels = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith(".levels")]
            assert {np.abs(array).max() for array in levels} == {ARITHMETIC[entry.lowering].largest}
            assert {array.dtype for array in levels} == {np.dtype(np.int8)}
            assert entry.weights == f"weights.qdq.{entry.lowering}.bin"


def test_onnxruntime_multiplies_levels(folder, tmp_path):
    """Nothing is widened before it is multiplied: that would be slower than fp32."""
    ort = import_onnxruntime()
    for graph in ("encoder", "cross_kv", "decode_step"):
        options = ort.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / f"{graph}.onnx"), 3
        ort.InferenceSession(folder / f"{graph}.qdq.ort.onnx", options, providers=["CPUExecutionProvider"])
        before = onnx.load(folder / f"{graph}.qdq.ort.onnx", load_external_data=False)
        after = [node.op_type for node in onnx.load(tmp_path / f"{graph}.onnx", load_external_data=False).graph.node]
        assert after.count("MatMulIntegerToFloat") == len(products(before)[True])
        assert "DequantizeLinear" not in after


def test_verify(folder, tiny_checkpoint):
    reports = verify_bundle(open_bundle(folder), tiny_checkpoint, segments=1, steps=8)
    found = [report for report in reports if report.precision == "qdq"]
    assert len(found) == 6
    for report in found:
        assert report.passed, report.to_text()
        assert report.relative_error > 1e-4  # it is another graph indeed


def test_verify_finds_damage(tiny_bundle, tiny_checkpoint, calibration, music, tmp_path, monkeypatch):
    half = {graph: {name: scale / 4 for name, scale in by.items()} for graph, by in calibration.scales.items()}
    monkeypatch.setattr(qdq_files, "calibrate", lambda *_, **__: Calibration(half, 5))
    broken = open_bundle(quantize_bundle(tiny_bundle, tmp_path / "broken", ["qdq"], calibration=[music]))
    reports = verify_bundle(broken, tiny_checkpoint, segments=1, steps=4)
    failed = {(report.precision, report.graph) for report in reports if not report.passed}
    assert failed == {("qdq", graph) for graph in ("encoder", "cross_kv", "decode_step")}


def test_rows_alone(folder):
    """No number depends on who else is there."""
    bundle = open_bundle(folder)
    features = gaussian(3, bundle.manifest.features.segment_frames, bundle.manifest.features.bins)
    features[2] *= 50
    backend = OrtBackend(bundle, slots=3, threads=1, precision="qdq")
    check_rows_are_alone(backend, features)


def test_states_that_are_no_numbers(folder):
    """Rounding makes a number of them: the row fails all the same."""
    bundle = open_bundle(folder)
    backend = OrtBackend(bundle, slots=2, threads=1, precision="qdq")
    features = gaussian(2, bundle.manifest.features.segment_frames, bundle.manifest.features.bins)
    states = backend.encode(features)[:, 0]
    states[1, 100, 5] = np.nan
    backend.admit(0, states)
    tokens = np.zeros(2, np.int32)
    assert np.isnan(backend.step(tokens, tokens)[1]).tolist() == [False, True]


@BOTH
def test_head_sees_what_is_no_number(folder, lowering):
    """One that appears in the decoder, here in the table of positions, is found in its step."""
    model = onnx.load(folder / f"decode_step.qdq.{lowering}.onnx")
    [table] = [tensor for tensor in model.graph.initializer if tensor.name == "weights.positions"]
    positions = numpy_helper.to_array(table).copy()
    positions[7] = np.nan
    table.CopyFrom(numpy_helper.from_array(positions, table.name))
    session = import_onnxruntime().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sizes = {"rows": 2, "length": 16}
    shapes = {value.name: [sizes.get(size, size) for size in value.shape] for value in session.get_inputs()}
    feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    feeds |= {"token": np.zeros(2, np.int32), "position": np.array([3, 7], np.int32)}
    assert np.isnan(session.run(["log_prob"], feeds)[0]).tolist() == [False, True]


@pytest.mark.parametrize("kind", ["context", "prefix"])
def test_memory(kind, request, music, tmp_path):
    """Calibrated with segments that are told of the one before."""
    bundle, checkpoint = request.getfixturevalue(f"{kind}_bundle"), request.getfixturevalue(f"{kind}_checkpoint")
    found = open_bundle(quantize_bundle(bundle, tmp_path / kind, ["qdq"], calibration=[music / "a.wav"]))
    graphs = [entry.graph for entry in found.manifest.graphs if (entry.precision, entry.lowering) == ("qdq", "ort")]
    assert graphs == [spec.name for spec in bundle.manifest.contracts]
    reports = verify_bundle(found, checkpoint, segments=1, steps=4)
    assert [report.to_text() for report in reports if not report.passed] == []


def test_plan(tiny_bundle, music, tmp_path):
    plan = MixedPlan(tiny_bundle.manifest.model.name, "qdq", {"encoder": ("layers.0.qkv",)})
    given = {"plans": [plan], "calibration": [music]}
    found = quantize_bundle(tiny_bundle, tmp_path / "planned", ["qdq"], **given)
    for lowering in ARITHMETIC:
        kept = products(onnx.load(found / f"encoder.qdq.{lowering}.onnx"))[False]
        assert [node.input[1] for node in kept] == ["weights.layers.0.qkv"]


def test_tensorrt_builds_it(folder):
    """For a GPU that is not here: parser and builder take every graph, and keep weights in 8 bits."""
    from mt3_export.engine_builder import Target, build_engine  # noqa: PLC0415
    from mt3_export.recipes import plan_engines, recipe_for  # noqa: PLC0415
    from mt3_runtime.trt import import_tensorrt  # noqa: PLC0415

    trt = import_tensorrt("tensorrt-rtx")
    bundle, target = open_bundle(folder), Target("tensorrt-rtx", trt.__version__, ("sm_89",), None)
    recipe = recipe_for(bundle.manifest, None)
    plans = {plan.spec.name: plan for plan in plan_engines(bundle, recipe, "qdq", next(iter(recipe.profiles)))}
    assert list(plans) == ["encoder", "cross_kv", "decode_step"]
    for name, plan in plans.items():
        layers = build_engine(trt, bundle, plan, target).report["layers"]
        count = len(products(onnx.load(folder / f"{name}.qdq.tensorrt.onnx"))[True])
        assert layers["CONSTANT INT8"] == count


# ---- what can be asked for ----------------------------------------------------------------------------------------


def test_choice(folder, tiny_folder):
    assert load(folder, "cpu").backend.precision == "fp32"
    assert load(folder, "cpu", precision="qdq").backend.precision == "qdq"
    with pytest.raises(DeviceError, match="has no qdq graphs: mt3-export quantize"):
        load(tiny_folder, "cpu", precision="qdq")


def test_refusals(folder, tiny_bundle, music, tmp_path):
    with pytest.raises(OptionError, match="qdq has to hear some music of the kind it is for: give --calibration FILES"):
        quantize_bundle(tiny_bundle, tmp_path / "new", ["w8", "qdq"])
    with pytest.raises(OptionError, match="no precision listed is calibrated: leave --calibration out, or add qdq"):
        quantize_bundle(tiny_bundle, tmp_path / "new", ["w8"], calibration=[music])
    with pytest.raises(OptionError, match="holds qdq already"):
        quantize_bundle(open_bundle(folder), tmp_path / "new", ["qdq"], calibration=[music])
    with pytest.raises(OptionError, match="no sound files"):
        quantize_bundle(tiny_bundle, tmp_path / "new", ["qdq"], calibration=[tmp_path])
    with pytest.raises(OptionError, match="qdq is made of a bundle and audio: use mt3-export quantize --calibration"):
        checked_precisions(["fp32", "qdq"])
    assert list(tmp_path.iterdir()) == []


def test_command(tiny_folder, music, tmp_path, capsys):
    arguments = ["quantize", str(tiny_folder), "--precision", "qdq", "--output", str(tmp_path / "new")]
    assert main(arguments) == 2
    assert "give --calibration" in capsys.readouterr().err
    assert main([*arguments, "--calibration", str(music / "b.wav"), str(music / "c.wav")]) == 0
    written = open_bundle(tmp_path / "new").manifest
    assert {entry.precision for entry in written.graphs} == {"fp32", "qdq"}
    assert written.origin.tools["calibration qdq"].startswith("2 segments")


def test_notes_of_the_demo_model(tmp_path):
    """Calibrated with four clips, it loses next to nothing of sixteen others (of 500: a third of a point)."""
    for name in ("one", "beat", "band", "two"):
        clip = make_clip(KINDS[name], (4.0, 6.0), (VALIDATION, 7, 7))
        soundfile.write(tmp_path / f"{name}.wav", clip.audio, RATE, subtype="FLOAT")
    bundle = open_bundle(demo_bundle_path())
    folder = quantize_bundle(bundle, tmp_path / "demo", ["qdq"], calibration=sorted(tmp_path.glob("*.wav")))
    clips = [
        make_clip(KINDS[name], (8.0, 10.0), (HELD_OUT, 9, i))
        for name in ("one", "beat", "band", "two")
        for i in range(4)
    ]
    own, found = (
        [transcriber.transcribe(clip.audio, RATE).notes for clip in clips]
        for transcriber in (load(folder, "cpu", precision=name) for name in ("fp32", "qdq"))
    )
    losses = [onset_f1(a, clip.notes) - onset_f1(b, clip.notes) for a, b, clip in zip(own, found, clips, strict=True)]
    assert np.mean(losses) <= 0.015
    assert np.mean([onset_f1(b, a) for a, b in zip(own, found, strict=True)]) >= 0.95
