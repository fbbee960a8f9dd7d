import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

import pickles
from mt3_export.checkpoint import load_checkpoint
from mt3_export.random_weights import random_tensors
from mt3_runtime.errors import CheckpointError, Mt3Error
from states import OPTIONS, TINY, every_kind, load, packed, port_state, refusal, same, torch_bytes


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", members.pop("method", zipfile.ZIP_STORED)) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def lightning(**state):
    return torch_bytes({"epoch": 1, "pytorch-lightning_version": "1.9", "state_dict": state})


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:b8a3\nsize 183672643\n", "git lfs pull"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x05", "is an ONNX graph"),
        (b"\x1f\x8b\x08" + bytes(64), "is a gzip archive"),
        (zipped(weights_pth=b"x"), "is a zip archive without torch data"),
        (zipped(a__data_pkl=b"x").replace(b"data_pkl", b"data.pkl"), "damaged"),
        (zipped(a__data__pkl=b"x", a__constants__pkl=b"x"), "is a zip archive without torch data"),
        (b"\x80\x04}\x94.", "is a plain pickle"),
        (b"not weights at all, but long enough to be", "is neither a torch file nor safetensors"),
        (lightning(**{"model.proj.weight": ONE}), "is a Lightning checkpoint"),
        (torch_bytes({"model.encoder.block.0.layer.0.SelfAttention.q.weight": ONE}), "is a Lightning checkpoint"),
        (lightning(**{"model.segmem_proj.weight": ONE}), "is an MR-MT3 checkpoint with memory"),
        (torch_bytes({"segmem_encoder.final_layer_norm.weight": ONE}), "is an MR-MT3 checkpoint with memory"),
        (lightning(**{"encoder.latent_array.latents": ONE}), "is a YourMT3 checkpoint"),
        (
            torch_bytes({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ONE}),
            "is a T5 of transformers",
        ),
        (torch_bytes({"shared.weight": ONE}, zipped=False), "is a T5 of transformers"),
        (safetensors.torch.save({"shared.weight": ONE}), "is a T5 of transformers"),
        (safetensors.torch.save({"conv1.weight": ONE}), "has no proj.weight among its 1 tensors (conv1.weight)"),
        (torch_bytes({"state_dict": {"proj.weight": ONE}, "epoch": 3}), "holds state_dict, epoch besides tensors"),
        (torch_bytes({0: ONE}), "holds 0 besides tensors"),
        (torch_bytes([ONE]), "holds no dictionary of tensors"),
        (torch_bytes({}), "holds no dictionary of tensors"),
        (torch_bytes(torch.nn.Linear(1, 1)), "holds more than tensors (torch.nn.modules.linear.Linear)"),
    ],
)
def test_other_files_are_named_and_refused(tmp_path, data, words):
    assert words in refusal(tmp_path, data)


@pytest.mark.parametrize("model", ["mt3", "mr-mt3", "yptf-multi"])
def test_the_model_that_was_asked_for_is_the_one_to_use(tmp_path, model):
    assert refusal(tmp_path, {"shared.weight": ONE}, model=model).endswith(f": use {model} weights")


def test_archives_that_torch_did_not_write_are_refused(tmp_path):
    members = zipfile.ZipFile(io.BytesIO(torch_bytes(port_state())))
    packed_again = io.BytesIO()
    with zipfile.ZipFile(packed_again, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in members.namelist():
            archive.writestr(name, members.read(name))
    assert "packed by another program" in refusal(tmp_path, packed_again.getvalue(), **OPTIONS)
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl"):
            archive.writestr(name, b"x")
    assert "is a TorchScript archive" in refusal(tmp_path, script.getvalue())


def test_a_path_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "is a directory"),
        (tmp_path / "none.pth", "does not exist: check the path"),
        (tmp_path / "pipe", "is not a regular file"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("mt3", "does not exist: fetch it with mt3-export fetch mt3"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", every_kind())
def test_every_truncated_file_is_refused(tmp_path, kind):
    data = every_kind()[kind]
    middle = np.random.default_rng(0).integers(20, len(data) - 20, 60).tolist()
    for end in (*range(1, 20), *middle, *range(len(data) - 20, len(data))):
        refusal(tmp_path, data[:end], **OPTIONS)


@pytest.mark.parametrize("kind", every_kind())
def test_flipped_bits_are_refused_or_harmless(tmp_path, kind):
    data, dice, refused = every_kind()[kind], np.random.default_rng(1), 0
    for turn in range(150):
        damaged = bytearray(data)
        # Every second one near the start, where names and sizes stand.
        damaged[dice.integers(4000 if turn % 2 else len(data))] ^= 1 << int(dice.integers(8))
        try:
            checkpoint = load(tmp_path, bytes(damaged), **OPTIONS)
        except Mt3Error:
            refused += 1
            continue
        assert checkpoint.tensors.keys() == random_tensors(TINY, 1).keys()
        # Only an archive has checksums; in the other kinds a bit of a number is beyond notice.
        assert kind != "zip" or same(checkpoint.tensors, random_tensors(TINY, 1))
    assert refused > 50


def test_a_safetensors_header_that_repeats_a_key_is_refused(tmp_path):
    data = packed()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = json.dumps(header.pop("__metadata__"))
    text = f'{{"__metadata__": {{"num_heads": "4", {metadata[1:]}, {json.dumps(header)[1:]}'.encode()
    refusal(tmp_path, struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("container", pickles.CONTAINERS)
def test_no_pickle_runs(tmp_path, container):
    marker, careless = tmp_path / "marker", tmp_path / "careless"
    files = {
        (name, protocol): pickles.CONTAINERS[container](payload, protocol)
        for name, payload in pickles.payloads(marker).items()
        for protocol in pickles.PROTOCOLS
    }
    if container == "plain":
        files |= {(name, None): data for name, data in pickles.by_hand(marker).items()}
    assert len(files) >= 40
    for which, data in files.items():
        refusal(tmp_path, data, **OPTIONS)
        assert not marker.exists(), which
        # The same file does run when it is read the careless way, or it would show nothing.
        pickles.run(data, container, careless)
        assert marker.exists(), which
        marker.rmdir() if marker.is_dir() else marker.unlink()
