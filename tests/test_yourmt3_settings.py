"""What a YourMT3 file says of itself counts, unless its tensors say otherwise: then it is refused."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace

import pytest
import safetensors.torch

from mt3_export import published
from mt3_export.checkpoint import load_checkpoint
from mt3_export.design import PerceiverDesign
from mt3_export.stored import StoredState
from mt3_export.yourmt3_layout import published_layout
from mt3_export.yourmt3_models import MODELS as CONSTANTS
from mt3_export.yourmt3_settings import resolve_yourmt3
from mt3_runtime.errors import CheckpointError, OptionError
from states import load, refusal, torch_bytes
from yourmt3_states import authors_state, hyper_parameters, shared_copies

MULTI, MOE, SINGLE, MEL = "yptf-multi", "yptf-moe-multi", "yptf-single", "ymt3plus"
ENCODER = "model_cfg.encoder.perceiver-tf"
STATES = {model: authors_state(model) for model in (MULTI, MOE, SINGLE)}


def said(model: str, changes: dict[str, object]) -> dict[str, object]:
    """Hyper-parameters with other values, by dotted name."""
    result = copy.deepcopy(hyper_parameters(model))
    for path, value in changes.items():
        *way, name = path.split(".")
        place = result
        for step in way:
            place = place[step]
        place[name] = value
    return result


def saying(model: str, changes: dict[str, object]) -> bytes:
    state = STATES.get(model) or authors_state(model)
    return torch_bytes({"state_dict": state, "hyper_parameters": said(model, changes)})


@pytest.mark.parametrize(
    ("model", "name", "value", "tensors"),
    [
        (MULTI, "model_cfg.encoder_type", "t5", "'perceiver-tf'"),
        (MULTI, "model_cfg.decoder_type", "t5", "'multi-t5'"),
        (MULTI, "model_cfg.pre_encoder_type", None, "'conv'"),
        (MULTI, "model_cfg.pre_decoder_type", "group_linear", "'mc_shared_linear'"),
        (SINGLE, "model_cfg.pre_decoder_type", "mlp", "'linear'"),
        (MULTI, "model_cfg.conv_out_channels", 128, "6"),
        (MULTI, "model_cfg.vocab_size", 596, "40"),
        (MULTI, "model_cfg.num_max_positions", 1040, "1034"),
        (MULTI, "model_cfg.d_feat", 64, "128"),
        (MULTI, "model_cfg.decoder.multi-t5.d_model", 512, "16"),
        (MULTI, "model_cfg.decoder.multi-t5.num_layers", 8, "3"),
        (MULTI, "model_cfg.decoder.multi-t5.num_channels", 13, "2"),
        (MULTI, "model_cfg.decoder.multi-t5.ff_widening_factor", 4, "2.0"),
        (MULTI, f"{ENCODER}.num_latents", 26, "4"),
        (MULTI, f"{ENCODER}.d_latents", 128, "32"),
        (MULTI, f"{ENCODER}.d_model", 128, "32"),
        (MULTI, f"{ENCODER}.num_blocks", 3, "2"),
        (MULTI, f"{ENCODER}.num_local_transformers_per_block", 2, "1"),
        (MULTI, f"{ENCODER}.num_temporal_transformers_per_block", 2, "1"),
        (MULTI, f"{ENCODER}.position_encoding_type", "rope", "'trainable'"),
        (MULTI, f"{ENCODER}.position_encoding_type", "kdt", "'trainable'"),
        (MOE, f"{ENCODER}.position_encoding_type", "trainable", "'rope'"),
        (MULTI, f"{ENCODER}.layer_norm_type", "rms_norm", "'layer_norm'"),
        (MULTI, f"{ENCODER}.ff_layer_type", "moe", "'mlp'"),
        (MOE, f"{ENCODER}.ff_layer_type", "gmlp", "'moe'"),
        (MOE, f"{ENCODER}.ff_widening_factor", 4, "2.0"),
        (MOE, f"{ENCODER}.moe_num_experts", 8, "3"),
        (MOE, f"{ENCODER}.rope_partial_pe", False, "True"),
    ],
)
def test_settings_that_the_tensors_contradict_are_refused(tmp_path, model, name, value, tensors):
    message = refusal(tmp_path, saying(model, {name: value}), model=model)
    assert f"says {name} {value!r} in its hyper-parameters, its tensors say {tensors}: use another" in message


@pytest.mark.parametrize(
    ("model", "name", "value", "needed"),
    [
        (MULTI, "audio_cfg.codec", "melspec", "'spec'"),
        (MULTI, "audio_cfg.sample_rate", 22050, "16000"),
        (MULTI, "audio_cfg.audio_backend", "nnaudio", "'torchaudio'"),
        (MULTI, "model_cfg.tie_word_embeddings", False, "True"),
        (MULTI, "model_cfg.t5_basename", "google/t5-efficient-small", "'google/t5-v1_1-small'"),
        (MULTI, "model_cfg.decoder.multi-t5.ff_layer_type", "moe", "'t5_gmlp'"),
        (MULTI, "model_cfg.decoder.multi-t5.position_encoding_type", "trainable", "'sinusoidal'"),
        (MULTI, f"{ENCODER}.attention_to_channel", False, "True"),
        (MULTI, f"{ENCODER}.hidden_act", "silu", "'gelu'"),
        (MOE, f"{ENCODER}.hidden_act", "gelu", "'silu'"),
        (MOE, f"{ENCODER}.rope_type_sca", "lang", "'pixel'"),
        (MOE, f"{ENCODER}.rope_type_latent", "l", "'pixel'"),
        (MOE, f"{ENCODER}.rope_type_temporal", "pixel", "'lang'"),
        (MOE, f"{ENCODER}.rope_apply_to_keys", True, "False"),
    ],
)
def test_settings_that_an_export_does_not_know_are_refused(tmp_path, model, name, value, needed):
    message = refusal(tmp_path, saying(model, {name: value}), model=model)
    assert f"says {name} {value!r} in its hyper-parameters, this version runs {needed}: use another" in message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("audio_cfg.hop_length", 0, "not a positive whole number"),
        ("audio_cfg.hop_length", "300", "not a positive whole number"),
        ("audio_cfg.input_frames", 1e9, "not a positive whole number"),
        ("audio_cfg.input_frames", 700, "a segment of 700 samples is too short to be reflected"),
        ("audio_cfg.n_fft", 4096, "1024 bins are not half an FFT"),
        ("model_cfg.decoder.multi-t5.num_heads", 5, "attention of width 12, which 5 heads do not divide"),
        (f"{ENCODER}.moe_topk", 4, "chooses 4 of 3 experts"),
        (f"{ENCODER}.sca_use_query_residual", "no", "not true or false"),
        (f"{ENCODER}.num_self_attention_heads", 4, "4 and 8 heads of PerceiverTF"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, name, value, words):
    assert words in refusal(tmp_path, saying(MOE, {name: value}), model=MOE)


def test_segments_longer_than_the_positions_are_refused(tmp_path):
    message = refusal(tmp_path, saying(MEL, {"audio_cfg.input_frames": 900_000}), model=MEL)
    assert "has positions for 1034 frames, a segment has 7032: use another checkpoint" in message


MISSPELT = {
    f"{ENCODER}.{name}": value
    for name, value in {
        "d_latent": 999, "layer_norm": "rms_norm", "rotary_type_sca": "lang", "rotary_type_latent": "lang",
        "rotary_type_temporal": "pixel", "rotary_apply_to_keys": True, "rotary_partial_pe": False,
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        MISSPELT,
        {"model_cfg.encoder.t5.num_layers": 99, "model_cfg.decoder.t5.num_heads": 99},  # of parts that it has not
        {"model_cfg.vocab_size": "auto", f"{ENCODER}.d_model": "q", "model_cfg.pre_encoder_type": "default"},
        {f"{ENCODER}.position_encoding_type": "rope", f"{ENCODER}.rope_type_sca": "p", f"{ENCODER}.dropout_rate": 0.5},
        {f"{ENCODER}.attention_to_channel": 1, f"{ENCODER}.sca_use_query_residual": 1, f"{ENCODER}.rope_partial_pe": 1},
        {"model_cfg.vocab_size": [1], "model_cfg.event_length": 128},
    ],
)
def test_settings_without_effect_have_none(tmp_path, changes):
    found, wanted = (load(tmp_path, saying(MOE, given), model=MOE) for given in (changes, {}))
    assert (found.model, found.features, found.design) == (wanted.model, wanted.features, wanted.design)


def test_settings_of_the_file_win_over_those_of_the_published_model(tmp_path):
    changes = {
        f"{ENCODER}.sca_use_query_residual": False, f"{ENCODER}.moe_topk": 1, "audio_cfg.hop_length": 256,
        "audio_cfg.input_frames": 20_000, f"{ENCODER}.num_self_attention_heads": 4,
        f"{ENCODER}.num_cross_attention_heads": 4, f"{ENCODER}.rope_partial_pe": False,
        "model_cfg.decoder.multi-t5.num_heads": 6,
    }  # fmt: skip
    # Half of 8 dimensions or all of 4: the same two frequencies.
    checkpoint = load(tmp_path, saying(MOE, changes), model=MOE)
    assert checkpoint.design == PerceiverDesign(heads=4, residual=False, chosen=1, norm="layer")
    assert (checkpoint.features.hop_length, checkpoint.features.segment_samples) == (256, 20_000)
    assert (checkpoint.model.num_heads, checkpoint.model.d_kv) == (6, 2)
    assert checkpoint.warnings == (
        "hop_length is 256 as the file says, where yptf-moe-multi has 300",
        "query residual is off as the file says, where yptf-moe-multi has on",
        "experts chosen is 1 as the file says, where yptf-moe-multi has 2",
        "segment_samples is 20000 as the file says, where yptf-moe-multi has 32767",
        "num_heads of PerceiverTF is 4 as the file says, where yptf-moe-multi has 8",
        "not a published file: max_length 256 assumed as for yptf-moe-multi",
    )


def test_a_published_file_is_run_as_published_whatever_it_says(tmp_path, monkeypatch):
    """The authors' own demo ignores what stands in the files."""
    changes = {f"{ENCODER}.sca_use_query_residual": False, f"{ENCODER}.num_latents": 99, "audio_cfg.codec": "melspec"}
    data = saying(MOE, changes)
    row = replace(published.PUBLISHED[MOE], sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(published, "PUBLISHED", {MOE: row})
    checkpoint = load(tmp_path, data, model=MOE, num_heads=3)
    assert checkpoint.design == PerceiverDesign(heads=8, residual=True, chosen=2, norm="layer")
    assert checkpoint.warnings == (
        f"the file says {ENCODER}.num_latents 99 in its hyper-parameters, its tensors say 4, which counts",
        "the file says audio_cfg.codec 'melspec' in its hyper-parameters, this version runs 'spec', which counts",
    )


def test_the_mel_range_is_that_of_the_file(tmp_path):
    state = {key: tensor for key, tensor in authors_state(MEL).items() if not key.endswith("fb")}
    content = said(MEL, {"audio_cfg.f_min": 20, "audio_cfg.f_max": 7600.0})
    checkpoint = load(tmp_path, torch_bytes({"state_dict": state, "hyper_parameters": content}), model=MEL)
    assert (checkpoint.features.f_min, checkpoint.features.f_max, checkpoint.features.bins) == (20.0, 7600.0, 512)
    assert checkpoint.warnings[:2] == (
        "f_min is 20 as the file says, where ymt3plus has 50.0",
        "f_max is 7600.0 as the file says, where ymt3plus has 8000.0",
    )
    content["model_cfg"]["encoder"]["t5"]["num_heads"] = 3
    data = torch_bytes({"state_dict": state, "hyper_parameters": content})
    assert "says 2 and 3 heads of T5" in refusal(tmp_path, data, model=MEL)


@pytest.mark.parametrize("name", ["f_min", "f_max"])
@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), -1.0, -(10**400), 1_000_000, True, "50", None])
def test_frequencies_are_numbers_of_sane_size(tmp_path, name, value):
    for model in (MEL, MULTI):
        message = refusal(tmp_path, saying(model, {f"audio_cfg.{name}": value}), model=model)
        assert f"says audio_cfg.{name} {value!r}"[:80] in message
        assert "not a frequency in Hz: use another checkpoint" in message


@pytest.mark.parametrize(
    ("model", "path", "name", "value", "usual"),
    [
        (MEL, "audio_cfg.n_fft", "fft_length", 1024, 2048),
        (MEL, "audio_cfg.input_frames", "segment_samples", 20_000, 32_767),
        (MULTI, "model_cfg.decoder.multi-t5.num_heads", "num_heads", 3, 6),
        (SINGLE, "model_cfg.decoder.t5.num_heads", "num_heads", 12, 6),
        (MEL, "model_cfg.encoder.t5.num_heads", "num_heads of the encoder", 3, 6),
    ],
)
def test_what_a_file_alone_changes_is_said(model, path, name, value, usual):
    """In full size, where the published model's number of heads is one of the ways to read the same tensors."""
    layout = published_layout(CONSTANTS[model])
    content: dict[str, object] = {}
    place = content
    *way, last = path.split(".")
    for step in way:
        place[step] = place = {}
    place[last] = value
    stored = StoredState({}, None, content)
    line = f"{name} is {value} as the file says, where {model} has {usual}"
    assert line in resolve_yourmt3(model, layout, {}, stored, published=False).warnings
    place[last] = usual
    warnings = resolve_yourmt3(model, layout, {}, stored, published=False).warnings
    assert len(warnings) == 1
    assert "assumed as for" in warnings[0]


# ---- options and metadata ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"frontend": "ddsp"}, {"mel_norm": False}, {"position_base": 256}])
def test_options_of_mt3_are_refused(option):
    name = next(iter(option)).replace("_", "-")
    with pytest.raises(OptionError, match=f"--{name} is fixed for yptf-multi: leave it out"):
        load_checkpoint("random:0", model=MULTI, **option)


def test_mt3_does_not_take_the_frontends_of_yourmt3():
    with pytest.raises(OptionError, match="--frontend cannot be 'yourmt3_mel': use one of ddsp, torchaudio"):
        load_checkpoint("random:0", frontend="yourmt3_mel")


def test_random_weights_of_other_heads_than_the_model_has_are_refused():
    with pytest.raises(CheckpointError, match="random:0 has 6 heads, not 4: leave --num-heads out"):
        load_checkpoint("random:0", model=MULTI, num_heads=4)
    with pytest.raises(CheckpointError, match="random:0 has positions for 1034 tokens, fewer than max_length 2000"):
        load_checkpoint("random:0", model=MULTI, max_length=2000)


def test_heads_are_a_fact_not_a_choice(tmp_path):
    assert "does not say num_heads: give --num-heads" in refusal(tmp_path, STATES[MULTI], model=MULTI)
    assert "12, which 5 heads do not divide" in refusal(tmp_path, STATES[MULTI], model=MULTI, num_heads=5)
    assert "has 3 heads, not 4: leave --num-heads out" in refusal(tmp_path, saying(MULTI, {}), model=MULTI, num_heads=4)


def test_max_length_may_be_asked_for(tmp_path):
    checkpoint = load(tmp_path, STATES[MULTI], model=MULTI, num_heads=3, max_length=512)
    assert checkpoint.model.max_length == 512
    assert checkpoint.warnings == (
        "not a published file: hop_length 300, query residual off assumed as for yptf-multi",
    )
    data = saying(MULTI, {"task_manager": {"max_total_token_length": 256}})
    assert load(tmp_path, data, model=MULTI, max_length=512).warnings == (
        "max_length is 512 as asked, where the checkpoint says 256",
    )
    message = refusal(tmp_path, STATES[MULTI], model=MULTI, num_heads=3, max_length=1035)
    assert "positions for 1034 tokens, fewer than max_length 1035: ask for less" in message


def packed(model: str, **metadata: str) -> bytes:
    state = STATES[model]
    return safetensors.torch.save({key: state[key] for key in state.keys() - shared_copies(state)}, metadata)


def test_safetensors_carry_their_settings(tmp_path):
    content = json.dumps(said(MOE, {f"{ENCODER}.moe_topk": 1}))
    data = packed(MOE, architecture="yourmt3", max_length="128", hyper_parameters=content)
    checkpoint = load(tmp_path, data, "tiny.safetensors", model=MOE)
    assert (checkpoint.model.max_length, checkpoint.model.num_heads, checkpoint.design.chosen) == (128, 3, 1)
    assert checkpoint.warnings == (
        "max_length is 128 as the file says, where yptf-moe-multi has 256",
        "experts chosen is 1 as the file says, where yptf-moe-multi has 2",
    )
    assert load(tmp_path, packed(MULTI, num_heads="2"), model=MULTI).model.num_heads == 2


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"architecture": "mt3"}, "architecture 'mt3': use one of architecture 'yourmt3'"),
        ({"num_heads": "two"}, "num_heads 'two' in its metadata: write a whole number from 1 to 999999"),
        ({"max_length": "-1"}, "max_length '-1' in its metadata: write a whole number from 1 to 999999"),
        ({"hyper_parameters": "{"}, "hyper_parameters in its metadata that are no JSON object"),
        ({"hyper_parameters": "[1]"}, "hyper_parameters in its metadata that are no JSON object"),
        ({"hyper_parameters": "[" * 100_000}, "hyper_parameters in its metadata that are no JSON object"),
        ({"num_heads": "4", "hyper_parameters": json.dumps(hyper_parameters(MULTI))}, "num_heads 4 in its metadata"),
    ],
)
def test_metadata_that_contradicts_is_refused(tmp_path, metadata, words):
    assert words in refusal(tmp_path, packed(MULTI, **metadata), model=MULTI)
