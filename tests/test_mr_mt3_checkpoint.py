"""MR-MT3 checkpoints: what is read from them, how long their memory is, and what is refused."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch

from graph_cases import one_thread
from mr_mt3_states import (
    FEATURES,
    METADATA,
    MODELS,
    SMALL,
    authors_state,
    every_kind,
    lightning_file,
    memory,
    memory_state,
    prefixed,
    read,
    refused,
    wanted,
)
from mt3_export import published
from mt3_export.checkpoint import load_checkpoint
from mt3_export.random_weights import random_tensors
from mt3_export.state import expected_shapes
from mt3_runtime.errors import OptionError
from mt3_runtime.specs import FeatureSpec
from states import MT3, TINY, load, packed, port_state, refusal, same, torch_bytes
from yourmt3_states import authors_state as yourmt3_state


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


# ---- what is read --------------------------------------------------------------------------------------------------


def test_a_memory_adds_13_keys_and_2622976_parameters():
    full = replace(MT3, memory=memory(length=64, span=1024))
    used = sum(map(math.prod, expected_shapes(full).values()))
    assert used == 48_519_680
    assert len(memory_state()) == 13
    assert list(expected_shapes(full))[: len(expected_shapes(MT3))] == list(expected_shapes(MT3))


@pytest.mark.parametrize("kind", every_kind())
def test_every_kind_of_file_is_read_whole(tmp_path, kind):
    data = every_kind()[kind]
    found = read(tmp_path, data)
    assert same(found.tensors, wanted())
    assert found.model == replace(SMALL, name="weights", memory=memory())
    assert (found.features, found.source, found.sha256) == (FEATURES, "weights.ckpt", hashlib.sha256(data).hexdigest())
    trained = () if kind.startswith("safe") else (
        "max_length is 64 as asked, where MR-MT3 was trained with 1024",
        "the memory is made from 64 tokens, not from 1024: notes can differ by that",
    )  # fmt: skip
    assert found.warnings == trained


@pytest.mark.parametrize("model", MODELS)
def test_each_design_has_its_own_memory_over_the_same_tensors(tmp_path, model):
    options = {"model": model, "num_heads": 2, "memory_length": 64}
    found = load(tmp_path, lightning_file(), "weights.ckpt", **options)
    assert found.model == replace(SMALL, name="weights", max_length=1024, memory=memory(model, 64, 1024))
    assert same(found.tensors, wanted())
    doubt = f"taken for {model} as asked, which nothing in the file shows: all published MR-MT3 weights are mr-mt3"
    assert found.warnings == (() if model == "mr-mt3" else (doubt,))
    said = load(tmp_path, packed(METADATA | {"architecture": model}, wanted()), model=model)
    assert (said.model.memory, said.warnings) == (memory(model), ())


def test_second_names_and_constants_may_be_absent(tmp_path):
    assert same(read(tmp_path, wanted()).tensors, wanted())


def test_a_memory_of_length_0_is_none(tmp_path):
    found = read(tmp_path, lightning_file(), memory_length=0)
    assert found.model == replace(SMALL, name="weights")
    assert same(found.tensors, random_tensors(SMALL, 1))
    broken = authors_state()
    broken.pop("segmem_encoder.final_layer_norm.weight")
    assert "1 missing: segmem_encoder.final" in refused(tmp_path, lightning_file(broken), memory_length=0)


def test_heads_are_those_of_full_size_or_asked_for(tmp_path):
    message = refusal(tmp_path, lightning_file(), model="mr-mt3", memory_length=8)
    assert message.endswith("does not say num_heads: give --num-heads")
    metadata = {"architecture": "mr-mt3", "memory_length": "8", "num_heads": "2"}
    found = load(tmp_path, packed(metadata, wanted()), model="mr-mt3")
    assert (found.model.max_length, found.model.position_base, found.features) == (1024, 256, FEATURES)
    assert "has 2 heads, not 4: leave --num-heads out" in refused(tmp_path, packed(metadata, wanted()), num_heads=4)


def test_what_is_asked_for_against_the_training_is_done_and_said(tmp_path):
    options = {"frontend": "ddsp", "mel_norm": False, "position_base": 255, "max_length": 1024}
    found = read(tmp_path, lightning_file(), **options)
    assert (found.features, found.model.position_base) == (FeatureSpec("ddsp", mel_norm=False), 255)
    assert found.warnings == tuple(
        f"{name} as asked, where MR-MT3 was trained with {trained}"
        for name, trained in (
            ("frontend is ddsp", "torchaudio"), ("mel_norm is off", "on"), ("position_base is 255", "256"),
        )
    )  # fmt: skip
    said = load(tmp_path, packed(METADATA, wanted()), model="mr-mt3", mel_norm=False)
    assert said.warnings == ("mel_norm is off as asked, where the checkpoint says on",)


# ---- how long the memory is ----------------------------------------------------------------------------------------

PUBLISHED = {
    "exp_segmemV2_prev_context=0.ckpt": 0,
    "exp_segmemV2_prev_context=32.ckpt": 32,
    "exp_segmemV2_prev_context=64.ckpt": 64,
    "exp_segmemV2_prev_context=64_prevaug_frame=3.ckpt": 64,
    "exp_segmemV2_prev_context=64_prevaug_frame=8.ckpt": 64,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_tells_by_its_name(tmp_path, name):
    found = load(tmp_path, lightning_file(), name, model="mr-mt3", num_heads=2)
    length = PUBLISHED[name]
    assert found.model.memory == (memory(length=length, span=1024) if length else None)
    assert (found.model.name, found.warnings) == (name.removesuffix(".ckpt"), ())
    asked = load(tmp_path, lightning_file(), name, model="mr-mt3", num_heads=2, memory_length=16)
    assert asked.model.memory == memory(length=16, span=1024)
    assert asked.warnings == (f"memory_length is 16 as asked, not {length} as the file's name says",)


def test_metadata_tell_and_options_win(tmp_path):
    data = packed(METADATA, wanted())
    assert load(tmp_path, data, model="mr-mt3").model.memory == memory()
    for length in (0, 12):
        asked = load(tmp_path, data, model="mr-mt3", memory_length=length)
        assert asked.model.memory == (memory(length=length) if length else None)
        assert asked.warnings == (f"memory_length is {length} as asked, not 8 as the checkpoint says",)
    named = load(tmp_path, data, "exp_segmemV2_prev_context=32.ckpt", model="mr-mt3")
    assert named.model.memory == memory()
    assert named.warnings == ("memory_length is 8 as the checkpoint says, not 32 as the file's name says",)
    assert load(tmp_path, packed(METADATA | {"memory_length": "0"}, wanted()), model="mr-mt3").model.memory is None


@pytest.mark.parametrize("name", ["last.ckpt", "exp_segmemV2_prev_context=64.pt", "exp_segmemV2_prev_context=16.ckpt"])
def test_without_any_of_them_it_is_asked_for(tmp_path, name):
    message = refusal(tmp_path, lightning_file(), name, model="mr-mt3", num_heads=2)
    assert message.endswith(
        "does not say memory_length, the vectors of its memory: give --memory-length as it was trained (the published "
        "files have 0, 32, 64)"
    )


def test_a_memory_is_no_longer_than_its_tokens(tmp_path):
    assert read(tmp_path, lightning_file(), memory_length=64).model.memory == memory(length=64)
    with pytest.raises(OptionError, match="memory of 65 vectors needs a max_length of 65, not 64: give another --mem"):
        read(tmp_path, lightning_file(), memory_length=65)
    with pytest.raises(OptionError, match="memory of 32 vectors needs a max_length of 32, not 16"):
        load(
            tmp_path, lightning_file(), "exp_segmemV2_prev_context=32.ckpt", model="mr-mt3", num_heads=2, max_length=16
        )
    message = refusal(tmp_path, packed(METADATA | {"memory_length": "65"}, wanted()), model="mr-mt3")
    assert message.endswith("has memory_length 65, more than max_length 64: correct its metadata")
    with pytest.raises(OptionError, match="memory of 1 vectors needs a max_length of 2, not 1"):  # the first tokens
        read(tmp_path, lightning_file(), memory_length=1, max_length=1)
    assert read(tmp_path, lightning_file(), memory_length=0, max_length=1).model.memory is None
    assert read(tmp_path, lightning_file(), model="mr-mt3-v2", memory_length=1, max_length=1).model.memory
    with pytest.raises(OptionError, match="memory of 1025 vectors"):
        load_checkpoint("random:1", model="mr-mt3", memory_length=1025)


@pytest.mark.parametrize("length", [-1, 1.0, True, "8", 10**6])
def test_a_length_is_a_whole_number(tmp_path, length):
    with pytest.raises(
        OptionError, match=r"--memory-length cannot be .*: use a whole number of vectors up to 999999, 0 for"
    ):
        read(tmp_path, lightning_file(), memory_length=length)


@pytest.mark.parametrize("text", ["-1", "1.0", "true", "00", "1000000", ""])
def test_a_length_in_metadata_is_a_whole_number(tmp_path, text):
    message = refused(tmp_path, packed(METADATA | {"memory_length": text}, wanted()))
    assert message.endswith(
        f"memory_length {text!r} in its metadata: write a whole number of vectors up to 999999, 0 for no memory"
    )


@pytest.mark.parametrize("model", ["mt3", "yptf-multi"])
def test_other_models_have_no_memory(model):
    with pytest.raises(OptionError, match=f"--memory-length is for MR-MT3, {model} has no memory of other segments"):
        load_checkpoint("random:1", model=model, memory_length=0)


# ---- what is refused -----------------------------------------------------------------------------------------------


def odd_projection(state):
    return state | dict.fromkeys(("segmem_proj.weight", "segmem_encoder.embed_tokens.weight"), torch.ones(8))


def second_block(state):
    return state | {key.replace("block.0", "block.1"): value for key, value in state.items() if "segmem" in key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (second_block, "has a memory encoder of 2 blocks, only one is supported: use weights of segmem_num_layers 1"),
        (lambda state: state | {"segmem_encoder.embed_tokens.weight": torch.ones(16, 16)}, "differs from segmem_proj"),
        (lambda state: state | {"segmem_encoder.pos_emb.inv_freq": torch.ones(8)}, "inv_freq is not that of MT3"),
        (lambda state: state | {"segmem_encoder.final_layer_norm.weight": torch.ones(15)}, "(15,) for (16,)"),
        (lambda state: state | {"segmem_encoder.more": torch.ones(1)}, "1 unknown: segmem_encoder.more"),
        (lambda state: state | {"segmem_encoder.final_layer_norm.weight": torch.full((16,), torch.nan)}, "NaN"),
        (lambda state: {k: v for k, v in state.items() if k != "segmem_proj.weight"}, "differs from segmem_proj"),
        (odd_projection, "segmem_proj.weight (8,) for (16, 16)"),
        (lambda state: {k: v for k, v in state.items() if ".layer.1." not in k or "segmem" not in k}, "4 missing: seg"),
        (lambda state: dict(prefixed(state)) | {"proj.weight": state["proj.weight"]}, "has no encoder.block.0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [0, 8])
def test_tensors_are_strict(tmp_path, change, words, length):
    assert words in refused(tmp_path, torch_bytes(change(authors_state())), memory_length=length)


def test_a_vocabulary_without_a_tie_is_refused(tmp_path):
    state = port_state(TINY) | memory_state()
    assert "first_tokens[0] 1134 is outside the vocabulary" in refused(tmp_path, state)
    assert read(tmp_path, state, model="mr-mt3-v1").model.memory == memory("mr-mt3-v1")


@pytest.mark.parametrize("model", MODELS)
def test_another_model_is_refused_with_the_name_of_the_right_one(tmp_path, monkeypatch, model):
    mt3 = torch_bytes(port_state())
    for data in (mt3, packed(), lightning_file(port_state())):
        message = refused(tmp_path, data, model=model)
        assert message.endswith(f"is an MT3 checkpoint without memory, not {model}: give --model mt3")
    message = refused(tmp_path, yourmt3_state("yptf-multi"), model=model)
    assert message.endswith(f"is a YourMT3 checkpoint, not {model}: give --model yptf-multi")
    row = replace(published.PUBLISHED["mt3"], sha256=hashlib.sha256(mt3).hexdigest())
    monkeypatch.setattr(published, "PUBLISHED", {"mt3": row})
    assert refused(tmp_path, mt3, model=model).endswith(f"is the published mt3, not {model}: give --model mt3")


@pytest.mark.parametrize("model", ["mt3", "ymt3plus"])
@pytest.mark.parametrize("kind", every_kind())
def test_a_memory_is_seen_in_every_kind_of_file(tmp_path, model, kind):
    assert refusal(tmp_path, every_kind()[kind], model=model).endswith(
        f"is an MR-MT3 checkpoint with memory, not {model}: give --model mr-mt3 (mr-mt3-v2 or mr-mt3-v1 for the "
        "authors' earlier designs)"
    )


def test_metadata_tell_one_design_from_another(tmp_path):
    message = refused(tmp_path, packed(METADATA | {"architecture": "mr-mt3-v1"}, wanted()))
    assert message.endswith("is of architecture 'mr-mt3-v1', not 'mr-mt3': give --model mr-mt3-v1")
    message = refused(tmp_path, packed(METADATA | {"architecture": "mr-mt4"}, wanted()))
    assert message.endswith("is of architecture 'mr-mt4': use one of architecture 'mr-mt3'")
    message = refusal(tmp_path, packed({"architecture": "mr-mt3"}), model="mt3")
    assert message.endswith("is of architecture 'mr-mt3', not 'mt3': give --model mr-mt3")
    assert "says d_kv '5'" in refused(tmp_path, packed(METADATA | {"d_kv": "5"}, wanted()))


# ---- random weights ------------------------------------------------------------------------------------------------


def test_random_weights_are_of_full_size_and_say_what_was_assumed():
    found = load_checkpoint("random:3", model="mr-mt3-v1")
    assert found.model == replace(
        MT3, name="mr-mt3-v1-random-3", position_base=256, memory=memory("mr-mt3-v1", 64, 1024)
    )
    assert {key: tuple(tensor.shape) for key, tensor in found.tensors.items()} == expected_shapes(found.model)
    assert (found.features, found.source) == (FEATURES, "random:3")
    assert "the notes mean nothing" in found.warnings[0]
    assert found.warnings[1].startswith("memory_length 64 assumed, the default of the authors' classes")


def test_random_weights_take_any_length(monkeypatch):
    monkeypatch.setattr("mt3_export.mr_mt3_checkpoint.random_tensors", lambda model, _: {"memory": model.memory})
    for length in (0, 7):
        found = load_checkpoint("random:3", model="mr-mt3", memory_length=length, max_length=100)
        assert found.tensors["memory"] == (memory(length=7, span=100) if length else None)
        assert len(found.warnings) == 1
