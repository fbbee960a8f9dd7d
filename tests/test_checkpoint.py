import hashlib
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from mt3_export import published, settings
from mt3_export.random_weights import random_tensors
from mt3_export.sizes import MT3_SIZES
from mt3_export.state import DUPLICATES, INVERSE_FREQUENCIES, expected_shapes
from mt3_runtime.errors import CheckpointError, OptionError
from states import METADATA, MT3, OPTIONS, TINY, load, packed, port_state, refusal, same, torch_bytes


def test_shapes_of_one_layer_each_are_those_of_the_published_state_dict():
    attention = {"q": (8, 16), "k": (8, 16), "v": (8, 16), "o": (16, 8)}
    forward = {"wi_0": (24, 16), "wi_1": (24, 16), "wo": (16, 24)}
    wanted = {"proj.weight": (16, 512), "decoder_embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16)}
    for layer, module, parts in (
        ("encoder.block.0.layer.0", "SelfAttention", attention),
        ("encoder.block.0.layer.1", "DenseReluDense", forward),
        ("decoder.block.0.layer.0", "SelfAttention", attention),
        ("decoder.block.0.layer.1", "EncDecAttention", attention),
        ("decoder.block.0.layer.2", "DenseReluDense", forward),
    ):
        wanted |= {f"{layer}.{module}.{name}.weight": shape for name, shape in parts.items()}
        wanted[f"{layer}.layer_norm.weight"] = (16,)
    wanted |= {f"{side}.final_layer_norm.weight": (16,) for side in ("encoder", "decoder")}
    assert expected_shapes(replace(TINY, encoder_layers=1, decoder_layers=1)) == wanted


def test_full_size_has_193_entries_191_storages_and_45896704_parameters():
    shapes = expected_shapes(MT3)
    assert sum(map(math.prod, shapes.values())) == 45_896_704
    assert len(shapes) + len(INVERSE_FREQUENCIES) == 191
    assert len({*shapes, *INVERSE_FREQUENCIES, *DUPLICATES}) == 193
    assert set(DUPLICATES.values()) < set(shapes)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_state_dict_is_read_without_its_copies(tmp_path, zipped):
    data = torch_bytes(port_state(), zipped=zipped)
    checkpoint = load(tmp_path, data, **OPTIONS)
    assert same(checkpoint.tensors, random_tensors(TINY, 1))
    assert checkpoint.model == replace(TINY, name="weights", position_base=255)
    assert (checkpoint.features.frontend, checkpoint.features.mel_norm, checkpoint.features.bins) == (
        "ddsp",
        False,
        512,
    )
    assert checkpoint.sha256 == hashlib.sha256(data).hexdigest()
    assert (checkpoint.source, checkpoint.warnings) == ("weights.pth", ())


def test_the_copies_may_be_absent(tmp_path):
    assert same(load(tmp_path, random_tensors(TINY, 1), **OPTIONS).tensors, random_tensors(TINY, 1))


@pytest.mark.parametrize("copy", DUPLICATES)
def test_a_copy_that_differs_is_refused(tmp_path, copy):
    state = port_state()
    state[copy] = state[copy].clone()
    state[copy][0, 0] += 1e-6
    assert f"{copy} differs from" in refusal(tmp_path, state, **OPTIONS)


@pytest.mark.parametrize("key", INVERSE_FREQUENCIES)
def test_constants_of_another_sinusoid_are_refused(tmp_path, key):
    # At full size /255 is the nearest other convention; its last value is 3.7 % away.
    state = port_state(replace(TINY, d_model=512, d_ff=8))
    state[key] = torch.tensor([10000.0 ** (-i / 255) for i in range(256)])
    assert f"{key} is not that of MT3" in refusal(tmp_path, state, **OPTIONS)


def test_constants_of_the_port_are_accepted_at_full_width_in_half_precision(tmp_path):
    state = {key: tensor.bfloat16() for key, tensor in port_state(replace(TINY, d_model=512, d_ff=8)).items()}
    assert load(tmp_path, state, **OPTIONS).model.d_model == 512


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("lm_head.weight"), "has no lm_head.weight"),
        (
            lambda state: state.pop("decoder.block.0.layer.1.EncDecAttention.o.weight"),
            "1 missing: decoder.block.0.layer.1",
        ),
        (lambda state: state.pop("encoder.final_layer_norm.weight"), "1 missing: encoder.final_layer_norm.weight"),
        (lambda state: state.update({"lm_head.bias": torch.zeros(40)}), "1 unknown: lm_head.bias"),
        (lambda state: state.update({"x\ny": torch.zeros(1)}), r"1 unknown: 'x\ny'"),
        (
            lambda state: state.update({f"extra.{i}": torch.zeros(1) for i in range(9)}),
            "9 unknown: extra.0, extra.1, extra.2, ...",
        ),
        (lambda state: state.update({"encoder.block.7.layer.0.layer_norm.weight": torch.ones(16)}), "9 missing"),
        (
            lambda state: state.update({"decoder.final_layer_norm.weight": torch.ones(17)}),
            "decoder.final_layer_norm.weight (17,) for (16,)",
        ),
        (lambda state: state.update({"proj.weight": torch.zeros(16, 229)}), "229 mel bins"),
        (lambda state: state.update({"lm_head.weight": torch.zeros(40)}), "not a matrix"),
        (lambda state: state.update({"lm_head.weight": torch.zeros(0, 16)}), "not a matrix"),
    ],
)
def test_keys_and_shapes_are_strict(tmp_path, change, words):
    state = random_tensors(TINY, 1)
    change(state)
    assert words in refusal(tmp_path, state, **OPTIONS)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.full((40, 16), torch.nan), "NaN or infinity"),
        (torch.full((40, 16), -torch.inf), "NaN or infinity"),
        (torch.full((40, 16), 1e300, dtype=torch.float64), "NaN or infinity in float32"),
        (torch.ones(40, 16, dtype=torch.int64), "torch.int64, not floating point"),
        (torch.ones(40, 16, dtype=torch.bool), "torch.bool, not floating point"),
        (torch.ones(40, 16, dtype=torch.complex64), "torch.complex64, not floating point"),
        (torch.ones(40, 16).to(torch.float8_e4m3fn), "torch.float8_e4m3fn, not floating point"),
        (torch.eye(40, 16).to_sparse(), "not a plain dense tensor"),
        (torch.ones(40, 16, device="meta"), "not a plain dense tensor"),
        (torch.ones(1, 1).expand(2**20, 2**20), "claims more numbers than it holds"),
    ],
)
def test_weights_that_are_not_finite_dense_floats_are_refused(tmp_path, tensor, words):
    assert words in refusal(tmp_path, random_tensors(TINY, 1) | {"lm_head.weight": tensor}, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32_and_are_noted(tmp_path, dtype):
    stored = {key: tensor.to(dtype) for key, tensor in random_tensors(TINY, 1).items()}
    checkpoint = load(tmp_path, stored, **OPTIONS)
    assert same(checkpoint.tensors, {key: tensor.to(torch.float32) for key, tensor in stored.items()})
    assert checkpoint.warnings == (f"weights stored as {str(dtype)[6:]} were converted to float32",)


def test_a_published_file_takes_its_settings_from_the_table(tmp_path, monkeypatch):
    data = torch_bytes(port_state())
    row = replace(
        published.PUBLISHED["mt3"], name="small", model="small", num_heads=4, max_length=32, mel_norm=True,
        position_base=256, frontend="torchaudio", sha256=hashlib.sha256(data).hexdigest(),
    )  # fmt: skip
    monkeypatch.setattr(published, "PUBLISHED", {"small": row})
    checkpoint = load(tmp_path, data)
    assert checkpoint.model == replace(TINY, name="small", num_heads=4, d_kv=2, max_length=32, position_base=256)
    assert (checkpoint.features.frontend, checkpoint.features.mel_norm, checkpoint.warnings) == ("torchaudio", True, ())
    asked = load(tmp_path, data, mel_norm=False, position_base=255)
    assert (asked.model.position_base, asked.features.mel_norm) == (255, False)
    assert asked.warnings == (
        "mel_norm is off as asked, where the checkpoint says on",
        "position_base is 255 as asked, where the checkpoint says 256",
    )


def test_the_table_knows_mt3():
    row = published.find_published("mt3")
    assert published.recognise("b8a3807ed265059abd25ad7f68142c06c35e8f6144dcaa45bd55946a3745398f") is row
    assert (row.size, row.frontend, row.mel_norm, row.position_base) == (183_672_643, "ddsp", False, 255)
    with pytest.raises(CheckpointError, match="no published checkpoint is called 'mt4': use one of mt3"):
        published.find_published("mt4")


def test_an_unknown_torch_file_of_full_size_is_taken_for_mt3_and_says_so():
    found = settings.resolve({}, None, None, MT3_SIZES)
    assert found.values == {
        "num_heads": 6, "frontend": "ddsp", "mel_norm": False, "position_base": 255, "max_length": 1024,
    }  # fmt: skip
    assert len(found.warnings) == 1
    assert "frontend ddsp, mel_norm off, position_base 255 assumed" in found.warnings[0]
    asked = settings.resolve({"mel_norm": True, "position_base": 256}, None, None, MT3_SIZES)
    assert (asked.values["mel_norm"], asked.values["position_base"]) == (True, 256)
    assert "frontend ddsp assumed" in asked.warnings[0]
    everything = {"frontend": "torchaudio", "mel_norm": True, "position_base": 256}
    assert settings.resolve(everything, None, None, MT3_SIZES).warnings == ()


def test_an_unknown_torch_file_of_another_size_needs_its_settings(tmp_path):
    message = refusal(tmp_path, port_state())
    assert "does not say num_heads, frontend, mel_norm, position_base: give --num-heads, --frontend" in message


@pytest.mark.parametrize(
    "wrong",
    [
        {"frontend": "librosa"},
        {"mel_norm": 1},
        {"position_base": 0},
        {"num_heads": 2.0},
        {"max_length": -1},
        {"num_heads": True},
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(OptionError, match=f"--{next(iter(wrong)).replace('_', '-')} cannot be"):
        load(tmp_path, port_state(), **OPTIONS | wrong)


def test_safetensors_carry_their_settings(tmp_path):
    checkpoint = load(tmp_path, packed(), "tiny.safetensors")
    assert checkpoint.model == TINY
    assert (checkpoint.features.frontend, checkpoint.features.mel_norm, checkpoint.warnings) == ("torchaudio", True, ())
    assert same(checkpoint.tensors, random_tensors(TINY, 1))


def test_the_content_decides_not_the_name(tmp_path):
    assert load(tmp_path, packed(), "tiny.pth").model == TINY
    assert load(tmp_path, torch_bytes(port_state()), "tiny.safetensors", **OPTIONS).model.d_model == 16


@pytest.mark.parametrize("name", ["num_heads", "frontend", "mel_norm", "position_base"])
def test_missing_metadata_is_named_unless_given(tmp_path, name):
    metadata = {key: value for key, value in METADATA.items() if key != name}
    assert f"does not say {name}: give --{name.replace('_', '-')}" in refusal(
        tmp_path, packed(metadata), "a.safetensors"
    )
    checkpoint = load(tmp_path, packed(metadata), "a.safetensors", **{name: OPTIONS[name]})
    assert OPTIONS[name] in (getattr(checkpoint.model, name, None), getattr(checkpoint.features, name, None))
    assert checkpoint.warnings == ()


def test_a_missing_max_length_is_assumed_and_said(tmp_path):
    metadata = {key: value for key, value in METADATA.items() if key != "max_length"}
    checkpoint = load(tmp_path, packed(metadata))
    assert checkpoint.model.max_length == 1024
    assert checkpoint.warnings == ("max_length is not in the file: 1024 is assumed",)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("architecture", "yourmt3", "architecture 'yourmt3'"),
        ("num_heads", "two", "num_heads 'two' in its metadata: write a whole number from 1 to 999999"),
        ("num_heads", "3", "which 3 heads do not divide"),
        ("num_heads", "4", "d_kv '4' in its metadata, its shapes and 4 heads say 2"),
        ("d_kv", "5", "d_kv '5' in its metadata, its shapes and 2 heads say 4"),
        ("mel_norm", "True", "mel_norm 'True' in its metadata: write true or false"),
        ("frontend", "ddsp\n", r"frontend 'ddsp\n'"),
        ("position_base", "-255", "position_base '-255'"),
        ("max_length", "1e3", "max_length '1e3'"),
    ],
)
def test_metadata_that_contradicts_is_refused(tmp_path, name, value, words):
    assert words in refusal(tmp_path, packed(METADATA | {name: value}))


def test_heads_are_a_fact_not_a_choice(tmp_path):
    assert "has 2 heads, not 4: leave --num-heads out" in refusal(tmp_path, packed(), num_heads=4)


def test_a_spec_outside_the_family_is_refused(tmp_path):
    odd = random_tensors(SimpleNamespace(**asdict(TINY) | {"d_model": 15}), 1)
    assert "d_model 15 is odd" in refusal(tmp_path, packed(tensors=odd))
