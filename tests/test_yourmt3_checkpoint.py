"""The tensors of the five YourMT3 models: which are read, as what, and which files are refused."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

import mt3_export.published as published_table
from graph_cases import one_thread
from mt3_export.checkpoint import MODEL_NAMES, load_checkpoint
from mt3_export.design import PerceiverDesign
from mt3_export.lowering import Eager
from mt3_export.network import build_modules
from mt3_export.random_yourmt3 import random_yourmt3_tensors
from mt3_export.yourmt3_layout import expected_shapes, published_layout
from mt3_export.yourmt3_models import MODELS as CONSTANTS
from mt3_runtime.errors import CheckpointError, OptionError
from mt3_runtime.specs import FeatureSpec, ModelSpec
from states import load, port_state, refusal, same, torch_bytes
from yourmt3_states import FULL, MODELS, authors_shapes, authors_state, lightning_file, shared_copies, tiny

# sha256 of the sorted lines "key shape" of the authors' own state dicts, full size.
AUTHORS_LISTING = {
    "ymt3plus": "3971a8a37ba10cd6fbb148ed38e823d1194e1c08eb0fdd2b267f4b44f5b15e77",
    "yptf-single": "6c654e8881be34e16745d58cb2cb39f35ab837aabce3fc9f917bc946b8f7d83e",
    "yptf-multi": "c5a788722658596090152893408d8408896cf95ef7dda0864bd17948d24cb7ab",
    "yptf-moe-multi": "fa7d1702675f9be9bfcd41d7040cf51f4f888df5e9c9e999ea9c57afa0390465",
    "yptf-moe-multi-ps": "fa7d1702675f9be9bfcd41d7040cf51f4f888df5e9c9e999ea9c57afa0390465",
}


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


DROPPED = ("window", "fb", "num_batches_tracked", ".self.rotary_emb.freqs")
MULTI, MOE = "yptf-multi", "yptf-moe-multi"


def wanted_name(key: str) -> str:
    """What the exporter calls a tensor of the authors'."""
    for side in ("encoder", "decoder"):
        if key == f"{side}.{side}.additive_pe.weight":
            return f"{side}.positions"
        if key.startswith(f"{side}.{side}."):
            return key[len(side) + 1 :]
    return {"embed_tokens.weight": "decoder_embed_tokens.weight", "lm_head.lm_head.weight": "lm_head.weight"}.get(
        key, key
    )


def wanted_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept = {wanted_name(key): tensor for key, tensor in state.items() if not key.endswith(DROPPED)}
    head = kept["lm_head.weight"]
    return kept | {"lm_head.weight": head * (1 / head.shape[1])}


def wanted_specs(model: str) -> tuple[ModelSpec, FeatureSpec, PerceiverDesign | None]:
    sizes = tiny(model)
    spec = ModelSpec(
        "yourmt3", "weights", sizes.d_model, sizes.heads, sizes.d_kv, sizes.d_ff, 1 if model == "ymt3plus" else 2,
        sizes.decoder_layers, sizes.vocabulary, 256, 256 if "multi" in model else 1024, 0, 1,
        channels=2 if "multi" in model else 1,
    )  # fmt: skip
    if model == "ymt3plus":
        mel = FeatureSpec("yourmt3_mel", False, f_min=50.0, f_max=8000.0, segment_samples=32_767)  # noqa: FBT003
        return spec, mel, None
    spectrum = FeatureSpec("yourmt3_spectrum", mel_norm=False, hop_length=300, bins=1024, segment_samples=32_767)
    moe = "moe" in model
    return spec, spectrum, PerceiverDesign(heads=8, residual=moe, chosen=2 if moe else 0, norm="layer")


@pytest.mark.parametrize("model", MODELS)
def test_the_states_of_these_tests_are_those_of_the_authors(model):
    lines = sorted(f"{key} {shape}" for key, shape in authors_shapes(model, FULL).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == AUTHORS_LISTING[model]


@pytest.mark.parametrize("model", MODELS)
def test_a_layout_of_full_size_has_the_tensors_of_the_published_model(model):
    found = expected_shapes(published_layout(CONSTANTS[model]))
    shapes = authors_shapes(model, FULL).items()
    assert found == {wanted_name(key): shape for key, shape in shapes if not key.endswith(DROPPED)}
    statistics = sum(math.prod(shape) for key, shape in found.items() if "running_" in key)
    wanted = {"ymt3plus": 45_730_816, "yptf-single": 30_397_824, MULTI: 28_987_008}.get(model, 47_078_022)
    assert sum(map(math.prod, found.values())) - statistics == wanted


@pytest.mark.parametrize("model", MODELS)
def test_a_lightning_file_is_read_whole(tmp_path, model):
    data = lightning_file(model)
    checkpoint = load(tmp_path, data, "weights.ckpt", model=model)
    assert same(checkpoint.tensors, wanted_tensors(authors_state(model)))
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in checkpoint.tensors.values())
    assert (checkpoint.model, checkpoint.features, checkpoint.design) == wanted_specs(model)
    assert (checkpoint.source, checkpoint.warnings) == ("weights.ckpt", ())
    assert checkpoint.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("model", ["yptf-single", MULTI, MOE])
def test_a_plain_state_dict_takes_the_rest_from_the_published_model(tmp_path, model, kind):
    state = authors_state(model)
    if kind == "safetensors":
        data = safetensors.torch.save({key: state[key] for key in state.keys() - shared_copies(state)})
    else:
        data = torch_bytes(state, zipped=kind == "zip")
    checkpoint = load(tmp_path, data, model=model, num_heads=3)
    assert same(checkpoint.tensors, wanted_tensors(state))
    assert (checkpoint.model, checkpoint.features, checkpoint.design) == wanted_specs(model)
    assert len(checkpoint.warnings) == 1
    residual = "on, experts chosen 2" if model == MOE else "off"
    assert f"hop_length 300, query residual {residual} assumed as for {model}" in checkpoint.warnings[0]


# ---- which model a file is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", MODEL_NAMES)
@pytest.mark.parametrize("model", MODELS[:4])
def test_another_model_is_refused_with_the_name_of_the_right_one(tmp_path, model, given):
    right = "yptf-moe-multi or yptf-moe-multi-ps" if "moe" in model else model
    state = authors_state(model)
    if given in right.split(" or "):
        assert load(tmp_path, state, model=given, num_heads=tiny(model).heads).tensors
    else:
        message = refusal(tmp_path, state, model=given)
        assert message.endswith(f", not {given}: give --model {right}")


def test_only_a_file_with_a_pitch_shifter_is_told_from_its_twin(tmp_path):
    state = authors_state(MOE)
    shifted = state | {f"pitchshift.pshifters.{step}.kernel": torch.zeros(16, 1, 5) for step in (-2, -1, 1, 2)}
    message = refusal(tmp_path, shifted, model=MOE, num_heads=3)
    assert message.endswith("is yptf-moe-multi-ps, not yptf-moe-multi: give --model yptf-moe-multi-ps")
    checkpoint = load(tmp_path, shifted, model="yptf-moe-multi-ps", num_heads=3)
    assert same(checkpoint.tensors, wanted_tensors(state))
    warning = "4 tensors of the pitch shifter, which only training uses, were left out"
    assert checkpoint.warnings[0] == warning
    assert load(tmp_path, state, model="yptf-moe-multi-ps", num_heads=3).warnings[0] != warning


def test_files_of_mt3_are_refused_as_yourmt3(tmp_path):
    assert refusal(tmp_path, port_state(), model=MULTI).endswith(
        "is an MT3 checkpoint, not yptf-multi: give --model mt3"
    )
    with pytest.raises(OptionError, match="there is no model 'yptf': use one of mt3, mr-mt3, mr-mt3-v2"):
        load(tmp_path, port_state(), model="yptf")


def test_the_name_of_a_file_tells_nothing(tmp_path):
    message = refusal(tmp_path, authors_state(MULTI), "ymt3plus.ckpt", model="ymt3plus")
    assert message.endswith("is yptf-multi, not ymt3plus: give --model yptf-multi")


def test_a_published_file_is_known_by_its_hash(tmp_path, monkeypatch):
    data = torch_bytes(authors_state(MOE))
    row = replace(published_table.PUBLISHED[MOE], sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(published_table, "PUBLISHED", {MOE: row})
    checkpoint = load(tmp_path, data, model=MOE, num_heads=3)
    assert (checkpoint.model.name, checkpoint.warnings) == (MOE, ())
    # Its tensors would do for the other one too.
    message = refusal(tmp_path, data, model="yptf-moe-multi-ps", num_heads=3)
    assert message.endswith("is the published yptf-moe-multi, not yptf-moe-multi-ps: give --model yptf-moe-multi")


# ---- what the tensors must be --------------------------------------------------------------------------------------


def edited(model: str, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = authors_state(model)
    for key, tensor in changes.items():
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    return state


LAYER = "encoder.blocks.1.temporal_transformer.0"


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (MULTI, {"lm_head.lm_head.weight": None}, "has no lm_head.lm_head.weight among its"),
        (MULTI, {"lm_head.lm_head.weight": torch.ones(40)}, "has shape (40,), not 2 dimensions"),
        (MULTI, {"decoder.decoder.additive_pe.weight": None}, "has no decoder.decoder.additive_pe.weight"),
        (MULTI, {f"{LAYER}.mlp.dense2.bias": None}, f"1 missing: {LAYER}.mlp.dense2.bias"),
        (MULTI, {"pre_encoder.0.blocks.2.bn1.running_var": None}, "is no counter of batches"),
        (MULTI, {"pre_encoder.0.blocks.1.conv1.weight": torch.ones(6, 6, 3, 1)}, "(6, 6, 3, 1) for (6, 6, 3, 3)"),
        (MULTI, {"encoder.pos_emb._pos_emb": torch.ones(120, 5, 32)}, "(120, 5, 32) for (120, 4, 32)"),
        (MULTI, {"encoder.pos_emb._pos_emb": torch.ones(109, 4, 32)}, "positions for 109 frames, a segment has 110"),
        (MULTI, {"encoder.rotary_emb_sca.freqs": torch.tensor([3.1416, 15.708])}, "unknown: encoder.rotary_emb_sca"),
        (MULTI, {"pre_decoder.0.linear.weight": torch.ones(16, 96)}, "4 latents of 32, of which a pre-decoder of 96"),
        (MULTI, {"pre_decoder.0.linear.weight": torch.ones(16, 16)}, "reads no whole number"),
        (MULTI, {"spectrogram.mel_stft.mel_scale.fb": torch.ones(1025, 512)}, "1 unknown: spectrogram.mel_stft"),
        (MULTI, {"encoder.final_layer_norm.weight": torch.ones(32)}, "1 unknown: encoder.final_layer_norm.weight"),
        (MULTI, {"task.weight": torch.ones(3)}, "1 unknown: task.weight"),
        (MULTI, {"spectrogram.stft.window": torch.hann_window(1024)}, "spectrogram.stft.window is not that of"),
        (MULTI, {"spectrogram.stft.window": torch.hamming_window(2048)}, "spectrogram.stft.window is not that of"),
        (MULTI, {f"{LAYER}.layernorm.bias": None}, f"mixes norms with and without bias ({LAYER}.layernorm has none)"),
        (MULTI, {"pre_encoder.0.blocks.0.bn1.num_batches_tracked": torch.ones(2)}, "is no counter of batches"),
        (MULTI, {"encoder.num_batches_tracked": torch.tensor(7)}, "is no counter of batches"),
        (MULTI, {"embed_tokens.weight": torch.full((40, 16), torch.nan)}, "holds NaN or infinity"),
        (MULTI, {"embed_tokens.weight": torch.ones(40, 16, dtype=torch.int64)}, "is torch.int64, not floating point"),
        (MOE, {f"{LAYER}.mlp.gate.weight": torch.ones(4, 32)}, "(4, 32) for (3, 32)"),
        (MOE, {f"{LAYER}.mlp.experts.2.w2.weight": None}, f"1 missing: {LAYER}.mlp.experts.2.w2.weight"),
        (MOE, {f"{LAYER}.mlp.dense1.weight": torch.ones(32, 32)}, f"1 unknown: {LAYER}.mlp.dense1.weight"),
        (MOE, {f"{LAYER}.attention.self.rotary_emb.freqs": torch.tensor([1.0, 0.02])}, "differs from encoder.rotary"),
        (MULTI, {"encoder.rotary_emb_sca.freqs": torch.tensor(1.0)}, "encoder.rotary_emb_sca.freqs"),
        (MOE, {"encoder.rotary_emb_latent.freqs": torch.tensor(1.0)}, "encoder.rotary_emb_latent.freqs"),
        (MOE, {"encoder.rotary_emb_latent.freqs": None}, "differs from encoder.rotary_emb_latent.freqs"),
        (MOE, {"encoder.rotary_emb_sca.freqs": torch.tensor([1.0, 0.01])}, "differs from encoder.rotary_emb_sca.freqs"),
    ],
)  # fmt: skip
def test_keys_shapes_and_tables_are_strict(tmp_path, model, changes, words):
    assert words in refusal(tmp_path, edited(model, **changes), model=model, num_heads=3)


@pytest.mark.parametrize("kind", ["sca", "latent", "temporal"])
def test_rotary_codes_of_another_kind_are_refused(tmp_path, kind):
    """Their values alone tell whether they turn with the latent's place or with the frame's number."""
    state = {key: tensor for key, tensor in authors_state(MOE).items() if not key.endswith(".self.rotary_emb.freqs")}
    other = torch.tensor([3.1415927, 15.707963] if kind == "temporal" else [1.0, 0.01])
    message = refusal(tmp_path, state | {f"encoder.rotary_emb_{kind}.freqs": other}, model=MOE, num_heads=3)
    assert f"encoder.rotary_emb_{kind}.freqs is not that of YourMT3" in message


def test_the_mel_filters_of_another_range_are_refused(tmp_path):
    state = authors_state("ymt3plus")
    assert load(tmp_path, state, model="ymt3plus", num_heads=2).features.f_min == 50.0
    state["spectrogram.mel_stft.mel_scale.fb"] = state["spectrogram.mel_stft.mel_scale.fb"].roll(1, 0)
    message = refusal(tmp_path, state, model="ymt3plus", num_heads=2)
    assert "spectrogram.mel_stft.mel_scale.fb is not that of YourMT3" in message


def test_the_fixed_tables_may_be_absent(tmp_path):
    state = {key: tensor for key, tensor in authors_state(MOE).items() if not key.endswith(DROPPED)}
    assert same(load(tmp_path, state, model=MOE, num_heads=3).tensors, wanted_tensors(state))


def test_norms_without_bias_are_rms_norms(tmp_path):
    plain = {key: tensor for key, tensor in authors_state(MOE).items() if "layernorm" not in key or "bias" not in key}
    checkpoint = load(tmp_path, plain, model=MOE, num_heads=3)
    assert checkpoint.design == PerceiverDesign(heads=8, residual=True, chosen=2, norm="rms")
    assert same(checkpoint.tensors, wanted_tensors(plain))


def test_other_floats_become_float32_and_are_noted(tmp_path):
    stored = {
        key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in authors_state(MOE).items()
    }
    checkpoint = load(tmp_path, stored, model=MOE, num_heads=3)
    assert same(checkpoint.tensors, wanted_tensors({key: tensor.float() for key, tensor in stored.items()}))
    assert checkpoint.warnings[0] == "weights stored as float16 were converted to float32"


# ---- random weights ------------------------------------------------------------------------------------------------


def test_random_weights_of_full_size():
    checkpoint = load_checkpoint("random:5", model="yptf-single")
    found = {key: tuple(tensor.shape) for key, tensor in checkpoint.tensors.items()}
    assert found == expected_shapes(published_layout(CONSTANTS["yptf-single"]))
    assert (checkpoint.model.name, checkpoint.source, checkpoint.sha256) == ("yptf-single-random-5", "random:5", None)
    assert (checkpoint.model.max_length, checkpoint.model.num_heads, checkpoint.model.channels) == (1024, 6, 1)
    assert checkpoint.design == PerceiverDesign(heads=8, residual=False, chosen=0, norm="layer")
    assert "the notes mean nothing" in checkpoint.warnings[0]


def small_layout(model: str):
    layout = published_layout(CONSTANTS[model])
    sizes = replace(layout.sizes, d_model=64, inner=48, d_ff=96, decoder_layers=2)
    perceiver = replace(layout.perceiver, filters=16, width=64, inner=64, hidden=128)
    return replace(layout, sizes=replace(sizes, encoder_layers=3), perceiver=perceiver)


def test_random_weights_are_the_same_bits_everywhere():
    layout = small_layout(MOE)
    tensors = random_yourmt3_tensors(layout, 7, num_heads=3)
    assert same(tensors, random_yourmt3_tensors(layout, 7, num_heads=3))
    assert not torch.equal(tensors["lm_head.weight"], random_yourmt3_tensors(layout, 8, 3)["lm_head.weight"])
    drawn = [tensor for key, tensor in tensors.items() if not key.endswith((".positions", ".freqs"))]
    digest = hashlib.sha256(b"".join(tensor.numpy().astype("<f4").tobytes() for tensor in drawn))
    assert digest.hexdigest() == "4f9bb825581261a460647b2afcb26b6ee40d046aaf7d6d20be0b68d21e4931d2"


def test_the_fixed_tables_of_random_weights_are_those_of_the_files():
    tensors = random_yourmt3_tensors(small_layout(MOE), 7, num_heads=3)
    for kind, wanted in (("sca", [3.1415927, 15.707963]), ("latent", [3.1415927, 15.707963]), ("temporal", [1, 0.01])):
        assert tensors[f"encoder.rotary_emb_{kind}.freqs"].tolist() == np.float32(wanted).tolist()
    table = tensors["decoder.positions"]
    for row, column in ((0, 5), (3, 0), (700, 31), (1033, 17)):
        angle = row / 10000 ** (2 * column / 64)
        assert table[row, column].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[row, column + 32].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("model", ["yptf-single", MULTI, MOE])
def test_random_weights_give_activations_of_a_trained_scale(model):
    layout, (_, features, design) = small_layout(model), wanted_specs(model)
    tensors = random_yourmt3_tensors(layout, 3, num_heads=3)
    channels = CONSTANTS[model].channels
    spec = ModelSpec("yourmt3", "small", 64, 3, 16, 96, 3, 2, 596, 256, 256, 0, 1, channels=channels)
    noise = torch.rand(1, 110, 1024, generator=torch.Generator().manual_seed(0))
    frames = torch.nn.functional.avg_pool1d(noise, 9, 1, 4) * 0.8
    modules = build_modules(spec, features, tensors, Eager(), design)
    with torch.inference_mode():
        states = modules["encoder"](frames)
        keys = modules["cross_kv"](states.flatten(0, 1))
    assert states.shape == (1, channels, 110, 64)
    assert 0.5 < states.std().item() < 5
    assert all(0.5 < key.std().item() < 5 for key in keys)
    assert (states[:, :, 1:] - states[:, :, :-1]).std().item() > 0.05 * states.std().item()
    if channels > 1:
        assert states.std(dim=1).mean().item() > 0.05
    router = tensors.get("encoder.blocks.0.local_transformer.0.mlp.gate.weight")
    assert router is None or (torch.randn(50, 64) @ router.T).std().item() == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("source", ["random:", "random:x"])
def test_random_weights_need_a_seed(source):
    with pytest.raises(CheckpointError, match="has no seed: use a whole number, as in random:0"):
        load_checkpoint(source, model=MULTI)
