"""The authors' own MR-MT3 decodes one song; runs where transformers is, and imports nothing of this project.

    python tests/oracle/authors_mr_mt3.py CHECKOUT FOLDER

CHECKOUT: a clone of gudgud96/MR-MT3; its classes and their `generate` are used as they stand, in float32 and eval mode.
FOLDER holds question.json (class, sizes, length of the memory), weights.safetensors and features.npy [segments, frames,
bins]. answer.npz is written there: `tokens` [segments, 1024] as `generate` returns them, the `memory` that each segment
was given [segments, length, d_model], and of every step of all segments `log_probs` of the best logit and its `gaps` to
the second. See compare_mr_mt3.py and make_mr_mt3_goldens.py, which ask.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import authors_weights
import numpy as np
import torch
from authors_weights import with_weights
from safetensors.torch import load_file
from torch import Tensor, nn

MODULES = {
    "T5SegMem": "models.t5_segmem",
    "T5SegMemV2": "models.t5_segmem_v2",
    "T5SegMemV2WithPrev": "models.t5_segmem_v2_with_prev",
}
SECOND_NAMES = {**authors_weights.SECOND_NAMES, "segmem_encoder.embed_tokens.weight": "segmem_proj.weight"}
SPAN = 1024  # as the authors call it, and were it another the memory would be


def build_network(name: str, sizes: dict[str, int], length: int, weights: dict[str, Tensor]) -> nn.Module:
    """The authors' network of these sizes, with these weights and no others."""
    config = import_module("transformers").T5Config(
        **sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, use_cache=False
    )
    network = getattr(import_module(MODULES[name]), name)(config, segmem_num_layers=1, segmem_length=length)
    return with_weights(network, weights, SECOND_NAMES)


@torch.inference_mode()
def main(checkout: str, folder: Path) -> None:
    sys.path.insert(0, checkout)
    torch.set_num_threads(1)
    question = json.loads((folder / "question.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    network = build_network(question["class"], question["sizes"], question["length"], weights)
    steps, memories = [], []
    network.segmem_encoder.register_forward_hook(lambda _, __, output: memories.append(output[0]))
    network.lm_head.register_forward_hook(lambda _, __, logits: steps.append(logits[0, -1].double()))
    generate = network.generate_2 if question["class"] == "T5SegMem" else network.generate
    tokens = generate(torch.from_numpy(np.load(folder / "features.npy")), max_length=SPAN)
    best = torch.stack(steps).topk(2).values
    log_probs = best[:, 0] - torch.stack(steps).logsumexp(-1)
    memory = torch.cat(memories)[:, : question["length"]]
    gaps = best[:, 0] - best[:, 1]
    np.savez(folder / "answer.npz", tokens=tokens.numpy(), memory=memory, log_probs=log_probs, gaps=gaps)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
