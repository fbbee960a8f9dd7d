"""State dicts as files hold them, and how tests load them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch

from mt3_export.checkpoint import Checkpoint, load_checkpoint
from mt3_export.random_weights import random_tensors
from mt3_runtime.errors import CheckpointError
from mt3_runtime.specs import ModelSpec

if TYPE_CHECKING:
    from pathlib import Path

MT3 = ModelSpec("mt3", "mt3", 512, 6, 64, 1024, 8, 8, 1536, 255, 1024, 0, 1)
TINY = ModelSpec("mt3", "tiny", 16, 2, 4, 24, 2, 1, 40, 256, 64, 0, 1)
OPTIONS = {"num_heads": 2, "frontend": "ddsp", "mel_norm": False, "position_base": 255, "max_length": 64}
METADATA = {
    "architecture": "mt3",
    "num_heads": "2",
    "d_kv": "4",
    "frontend": "torchaudio",
    "mel_norm": "true",
    "position_base": "256",
    "max_length": "64",
}


def port_state(model: ModelSpec = TINY) -> dict[str, torch.Tensor]:
    """A state dict as the PyTorch ports save it: second names on the same storage, and sinusoid constants."""
    state = random_tensors(model, 1)
    state["encoder.embed_tokens.weight"] = state["proj.weight"]
    state["decoder.embed_tokens.weight"] = state["decoder_embed_tokens.weight"]
    frequencies = [10000.0 ** (-2 * i / model.d_model) for i in range(model.d_model // 2)]
    for side in ("encoder", "decoder"):
        state[f"{side}.pos_emb.inv_freq"] = torch.tensor(frequencies)
    return state


def torch_bytes(state: object, *, zipped: bool = True) -> bytes:
    """A file of torch.save."""
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def packed(metadata: dict[str, str] = METADATA, tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    """A safetensors file."""
    return safetensors.torch.save(tensors or random_tensors(TINY, 1), metadata)


def every_kind() -> dict[str, bytes]:
    """One network in every kind of file."""
    return {
        "zip": torch_bytes(port_state()),
        "legacy": torch_bytes(port_state(), zipped=False),
        "safetensors": packed(),
    }


def load(folder: Path, data: object, name: str = "weights.pth", **options: object) -> Checkpoint:
    """Write bytes or a state dict to a file, and load it."""
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else torch_bytes(data))
    return load_checkpoint(path, **options)


def refusal(folder: Path, data: object, name: str = "weights.pth", **options: object) -> str:
    """Write a file, and return the message with which it is refused."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, data, name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    return message


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
