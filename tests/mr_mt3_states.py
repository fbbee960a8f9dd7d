"""MR-MT3 checkpoints as their authors' training leaves them, small."""

from __future__ import annotations

import io
from collections import OrderedDict, defaultdict
from dataclasses import replace

import numpy as np
import torch

from mt3_export.random_weights import random_tensors
from mt3_runtime.specs import FeatureSpec, MemorySpec
from states import METADATA, TINY, load, packed, port_state, refusal, torch_bytes
from yourmt3_states import authors_modules

MODELS = ("mr-mt3", "mr-mt3-v2", "mr-mt3-v1")
FIRST = {"mr-mt3": ("context", (1134, 1)), "mr-mt3-v2": ("context", (1,)), "mr-mt3-v1": ("prefix", (1,))}
FEATURES = FeatureSpec("torchaudio", mel_norm=True)
SMALL = replace(TINY, vocab_size=1400)
OPTIONS = {"num_heads": 2, "max_length": 64}
METADATA = METADATA | {"architecture": "mr-mt3", "memory_length": "8"}
LIGHTNING_CLASSES = {
    "pytorch_lightning.callbacks.model_checkpoint": ("ModelCheckpoint",),
    "pytorch_lightning.callbacks.early_stopping": ("EarlyStopping",),
}


def memory(model: str = "mr-mt3", length: int = 8, span: int = 64) -> MemorySpec:
    """What a model of this design must have."""
    injection, first = FIRST[model]
    return MemorySpec(injection, length, span, 0, first)


def memory_state(seed: int = 5) -> dict[str, torch.Tensor]:
    """The 13 keys that a memory adds to a network of width 16, attention 8 and feed-forward 24."""
    dice = np.random.default_rng(seed)
    block, attention = "segmem_encoder.block.0", "segmem_encoder.block.0.layer.0.SelfAttention"
    shapes = {
        "segmem_proj.weight": (16, 16),
        **{f"{attention}.{name}.weight": (8, 16) for name in "qkv"},
        f"{attention}.o.weight": (16, 8),
        f"{block}.layer.0.layer_norm.weight": (16,),
        f"{block}.layer.1.DenseReluDense.wi_0.weight": (24, 16),
        f"{block}.layer.1.DenseReluDense.wi_1.weight": (24, 16),
        f"{block}.layer.1.DenseReluDense.wo.weight": (16, 24),
        f"{block}.layer.1.layer_norm.weight": (16,),
        "segmem_encoder.final_layer_norm.weight": (16,),
    }
    state = {key: torch.from_numpy(dice.normal(size=shape).astype(np.float32)) for key, shape in shapes.items()}
    state["segmem_encoder.embed_tokens.weight"] = state["segmem_proj.weight"]
    state["segmem_encoder.pos_emb.inv_freq"] = torch.tensor([10000.0 ** (-i / 8) for i in range(8)])
    return state


def authors_state() -> dict[str, torch.Tensor]:
    """All keys of the network, second names and constants among them."""
    return port_state(SMALL) | memory_state()


def prefixed(state: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """The same as the authors' Lightning module names them."""
    found = OrderedDict((f"model.{key}", tensor) for key, tensor in state.items())
    found._metadata = OrderedDict({"": {"version": 1}, "model": {"version": 1}})
    return found


def lightning_file(state: dict[str, torch.Tensor] | None = None, *, zipped: bool = True, **changes: object) -> bytes:
    """What Lightning 1.9 and 2.2 save of these modules, with the callbacks of versions before 1.5 besides."""
    state = authors_state() if state is None else state
    score = {"best_model_score": torch.tensor(0.5), "best_k_models": {"a.ckpt": torch.tensor(0.5)}}
    with authors_modules(LIGHTNING_CLASSES) as classes:
        content = {
            "epoch": 399,
            "global_step": 515_600,
            "pytorch-lightning_version": "1.9.5",
            "state_dict": prefixed(state),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}, "is_last_batch": True}}},
            "callbacks": {
                "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}": score,
                classes["ModelCheckpoint"]: {**score, "monitor": "val_loss", "current_score": np.float64(0.5)},
                classes["EarlyStopping"]: {"wait_count": 0, "patience": np.int64(3)},
            },
            "optimizer_states": [
                {
                    "state": defaultdict(dict, {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)}}),
                    "param_groups": [{"lr": np.float32(1e-4), "betas": (0.9, 0.999), "params": [0]}],
                }
            ],
            "lr_schedulers": [{"base_lrs": [2e-4], "last_epoch": 8, "lr_lambdas": [None], "_last_lr": [1e-4]}],
        }
        buffer = io.BytesIO()
        torch.save({**content, **changes}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def every_kind() -> dict[str, bytes]:
    """One network in every kind of file."""
    state = authors_state()
    alone = {key: tensor.clone() for key, tensor in state.items()}  # safetensors stores nothing twice
    return {
        "lightning": lightning_file(),
        "lightning before torch 1.6": lightning_file(zipped=False),
        "state dict": torch_bytes(state),
        "state dict with the prefix": torch_bytes(prefixed(state)),
        "safetensors": packed(METADATA, alone),
        "safetensors with the prefix": packed(METADATA, dict(prefixed(alone))),
    }


def wanted() -> dict[str, torch.Tensor]:
    """The tensors of an export: the network's, then the memory encoder's, without what is not used."""
    dropped = ("segmem_encoder.embed_tokens.weight", "segmem_encoder.pos_emb.inv_freq")
    return random_tensors(SMALL, 1) | {key: value for key, value in memory_state().items() if key not in dropped}


def read(folder, data, name="weights.ckpt", **options):
    """Load a file as mr-mt3, with all that it does not say."""
    return load(folder, data, name, **{"model": "mr-mt3", "memory_length": 8, **OPTIONS, **options})


def refused(folder, data, name="weights.ckpt", **options):
    """The message with which `read` refuses it."""
    return refusal(folder, data, name, **{"model": "mr-mt3", "memory_length": 8, **OPTIONS, **options})
