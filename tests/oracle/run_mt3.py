"""Asks the authors' MT3 network; runs in the oracle's environment alone and imports nothing of this project.

    .oracle/bin/python tests/oracle/run_mt3.py FOLDER

FOLDER holds config.json (sizes, `steps`), weights.safetensors and features.npy [segments, frames, bins]. Written there:
answer.npz, and state.pth, the network's own state dict. The network is the one that mt3-infer 0.2.0 took from
gudgud96/MR-MT3 (`models/t5.py`); it is used as it stands, in float32 and eval mode, and always without a cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from authors_weights import with_weights
from mt3_infer.adapters.mr_mt3 import MRMT3Adapter, _import_t5_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import T5Config

EARLY_END = 20  # the step whose token is also tried as end token: random weights hardly ever choose the real one
POSITIONS = slice(0, 1024, 33)  # the first, the last, and 30 between


def build_network(sizes: dict[str, int], weights: dict[str, Tensor]) -> nn.Module:
    """The authors' network of these sizes, with these weights and no others."""
    network = _import_t5_model()(T5Config.from_dict(MRMT3Adapter().model_config | sizes))
    return with_weights(network, weights)


def choose_greedily(network: nn.Module, states: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Tokens [steps, segments] and logits [steps, segments, vocab]; no end token stops it."""
    prefix = torch.full((len(states), 1), network.config.decoder_start_token_id)
    logits = []
    for _ in range(steps):
        outputs = network(encoder_outputs=(states,), decoder_input_ids=prefix)
        logits.append(outputs[:, -1])
        prefix = torch.cat((prefix, logits[-1].argmax(-1, keepdim=True)), dim=-1)
    return prefix[:, 1:].T, torch.stack(logits)


def generate(network: nn.Module, features: Tensor, steps: int, end_token: int) -> np.ndarray:
    """What the network's own `generate` returns, less the start token: [segments, steps], -1 where it had stopped."""
    network.config.eos_token_id = end_token
    tokens = network.generate(inputs=features, max_length=steps)[:, 1:]
    return np.pad(tokens.numpy(), ((0, 0), (0, steps - tokens.shape[1])), constant_values=-1)


@torch.inference_mode()
def answer(network: nn.Module, features: Tensor, steps: int) -> dict[str, Any]:
    """All that is compared, as arrays."""
    states = network.encoder(inputs_embeds=network.proj(features), return_dict=True)[0]
    tokens, logits = choose_greedily(network, states, steps)
    ends = [network.config.eos_token_id, int(tokens[EARLY_END, 0])]
    return {
        "states": states,
        "tokens": tokens,
        "logits": logits,
        "ends": ends,
        "generated": np.stack([generate(network, features, steps, end) for end in ends]),
        "positions": network.decoder.pos_emb(1024)[0, POSITIONS],
    }


def main(folder: Path) -> None:
    sizes = json.loads((folder / "config.json").read_text())
    steps = sizes.pop("steps")
    network = build_network(sizes, load_file(folder / "weights.safetensors"))
    torch.save(network.state_dict(), folder / "state.pth")
    features = torch.from_numpy(np.load(folder / "features.npy"))
    np.savez(folder / "answer.npz", **answer(network, features, steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
