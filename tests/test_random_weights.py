import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mt3_export.checkpoint import load_checkpoint
from mt3_export.random_weights import random_tensors
from mt3_export.state import expected_shapes
from mt3_runtime.errors import CheckpointError
from mt3_runtime.specs import MemorySpec
from states import MT3, TINY, same

MEMORY = MemorySpec("context", 8, 64, 0, (34, 1))


def test_random_weights_are_the_same_bits_everywhere():
    tensors = random_tensors(TINY, 7)
    assert same(tensors, random_tensors(TINY, 7))
    assert not torch.equal(tensors["lm_head.weight"], random_tensors(TINY, 8)["lm_head.weight"])
    digest = hashlib.sha256(b"".join(tensor.numpy().astype("<f4").tobytes() for tensor in tensors.values()))
    assert digest.hexdigest() == "ccc34b897b62334a449e5f24f461530c6f8ead1ab00f18223ab50a5236f2e9c4"


def test_a_memory_adds_to_random_weights_and_changes_none():
    plain, told = random_tensors(TINY, 7), random_tensors(replace(TINY, memory=MEMORY), 7)
    added = {key: tensor for key, tensor in told.items() if key not in plain}
    assert same({key: told[key] for key in plain}, plain)
    assert list(told) == [*plain, *added]
    assert added.pop("segmem_proj.weight").shape == (TINY.d_model, TINY.d_model)
    encoder = {key.removeprefix("segmem_"): tuple(tensor.shape) for key, tensor in added.items()}
    one_layer = expected_shapes(replace(TINY, encoder_layers=1))
    assert encoder == {key: shape for key, shape in one_layer.items() if key.startswith("encoder.")}
    # As any encoder block is drawn: matrices by what goes into them, norms about 1.
    assert added["segmem_encoder.block.0.layer.1.DenseReluDense.wo.weight"].std().item() == pytest.approx(
        24**-0.5, rel=0.2
    )
    assert added["segmem_encoder.final_layer_norm.weight"].mean().item() == pytest.approx(1.0, abs=0.05)


def test_random_weights_follow_the_published_generator():
    # PCG64 (XSL-RR 128/64) of O'Neill's paper, in plain integers.
    state = np.random.PCG64(7).state["state"]
    current, mask = state["state"], 2**64 - 1
    wanted = []
    for _ in range(8):
        current = (current * 0x2360ED051FC65DA44385DF649FCCF645 + state["inc"]) % 2**128
        folded, turn = (current >> 64) ^ (current & mask), current >> 122
        word = (folded >> turn | folded << (64 - turn)) & mask
        halves = sum(word >> shift & 0xFFFF for shift in (0, 16, 32, 48))
        wanted.append((halves - 131070) / math.sqrt((65536**2 - 1) / 3) / math.sqrt(512))
    assert random_tensors(TINY, 7)["proj.weight"][0, :8].tolist() == np.float32(wanted).tolist()


def test_random_weights_give_activations_of_a_trained_scale():
    model = replace(TINY, d_model=256, num_heads=4, d_kv=64, d_ff=512, vocab_size=1000)
    weights = random_tensors(model, 0)
    normed = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    attention = "encoder.block.0.layer.0.SelfAttention"
    query, key, value = (normed @ weights[f"{attention}.{name}.weight"].T for name in "qkv")
    scores = query[:, :64] @ key[:, :64].T
    forward = "encoder.block.0.layer.1.DenseReluDense"
    wide = normed @ weights[f"{forward}.wi_0.weight"].T
    for activation in (
        scores,
        value @ weights[f"{attention}.o.weight"].T,
        wide,
        wide @ weights[f"{forward}.wo.weight"].T,
        normed @ weights["lm_head.weight"].T,
        weights["decoder_embed_tokens.weight"],
    ):
        assert activation.std().item() == pytest.approx(1.0, rel=0.1)
    norm = weights["encoder.final_layer_norm.weight"]
    assert norm.mean().item() == pytest.approx(1.0, abs=0.02)
    assert 0.02 < norm.std().item() < 0.1


def test_a_random_checkpoint_is_of_full_size_and_says_that_it_is_random():
    checkpoint = load_checkpoint("random:3", position_base=256)
    assert checkpoint.model == replace(MT3, name="random-3", position_base=256)
    assert {key: tuple(tensor.shape) for key, tensor in checkpoint.tensors.items()} == expected_shapes(MT3)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}
    assert (checkpoint.source, checkpoint.sha256) == ("random:3", None)
    assert "the notes mean nothing" in checkpoint.warnings[0]


@pytest.mark.parametrize("source", ["random:", "random:x", "random:-1", "random:1.5", "random:²", "random:1\n2"])
def test_a_random_checkpoint_needs_a_seed(source):
    with pytest.raises(CheckpointError, match="has no seed: use a whole number, as in random:0"):
        load_checkpoint(source)
