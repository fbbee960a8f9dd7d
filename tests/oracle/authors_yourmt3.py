"""The authors' YourMT3 networks with random weights, and what every stage of them computes.

Runs in the oracle's environment alone (mt3-infer 0.2.0 with transformers 4.45.2) and imports nothing of this project.
The networks are those that mt3-infer took from the Space mimbres/YourMT3 (`models/yourmt3/model`); they are used as
they stand, in float32 and eval mode.
"""

from __future__ import annotations

import contextlib
import copy
import math
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mt3_infer.models.yourmt3.config.config import audio_cfg, model_cfg, shared_cfg
from mt3_infer.models.yourmt3.model.ff_layer import MixtralSparseMoeBlock
from mt3_infer.models.yourmt3.model.t5mod_helper import task_cond_dec_generate
from mt3_infer.models.yourmt3.model.ymt3 import YourMT3
from mt3_infer.models.yourmt3.utils.task_manager import TaskManager
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

# Steps whose tokens are also tried as end token, as random weights hardly ever choose the real one. The authors' loop
# does not test the first token, so that a row which begins with the end token goes on.
EARLY_ENDS = (5, 0)


@dataclass(frozen=True, slots=True)
class Variant:
    """What the authors' command line changes of their defaults, for one published model."""

    task: str = "mt3_full_plus"
    encoder: str = "perceiver-tf"
    decoder: str = "t5"
    encoder_changes: dict[str, Any] = field(default_factory=dict)


_MOE = Variant(
    "mc13_full_plus_256",
    decoder="multi-t5",
    encoder_changes={
        "num_latents": 26,
        "sca_use_query_residual": True,
        "ff_layer_type": "moe",
        "ff_widening_factor": 4,
        "moe_num_experts": 8,
        "moe_topk": 2,
        "hidden_act": "silu",
        "position_encoding_type": "rope",
        "rope_partial_pe": True,
    },
)
VARIANTS = {
    "ymt3plus": Variant(encoder="t5"),
    "yptf-single": Variant(),
    "yptf-multi": Variant("mc13_full_plus_256", decoder="multi-t5", encoder_changes={"num_latents": 26}),
    "yptf-moe-multi": _MOE,
    "yptf-moe-multi-ps": _MOE,
}

# The widths of the features stay: 512 mel bins are the width of YMT3+, 1024 bins become 128 in the pre-encoder.
_TINY_T5 = {"num_layers": 2, "num_heads": 3, "d_kv": 16}
_TINY_PERCEIVER = {"num_blocks": 2, "d_latent": 64, "d_latents": 64, "qk_channels": 64, "v_channels": 64}
_TINY_LATENTS = {"yptf-single": 6}  # of 13 channels each needs two
_TINY_EXPERTS = {"moe_num_experts": 5, "ff_widening_factor": 2}


def configure(model: str, size: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`audio_cfg` and `model_cfg` of one model, not yet resolved."""
    variant = VARIANTS[model]
    audio, network = copy.deepcopy(audio_cfg), copy.deepcopy(model_cfg)
    network |= {"encoder_type": variant.encoder, "decoder_type": variant.decoder}
    encoder, decoder = network["encoder"][variant.encoder], network["decoder"][variant.decoder]
    encoder |= variant.encoder_changes
    if variant.encoder == "perceiver-tf":
        audio |= {"codec": "spec", "hop_length": 300}
    if size == "tiny":
        decoder |= _TINY_T5
        if variant.encoder == "t5":
            encoder |= _TINY_T5 | {"ff_widening_factor": 1}
            decoder |= {"ff_widening_factor": 1}
        else:
            network["conv_out_channels"] = 16
            decoder |= {"d_model": 32}
            encoder |= _TINY_PERCEIVER
            encoder |= {"num_latents": _TINY_LATENTS.get(model, encoder["num_latents"])}
            encoder |= _TINY_EXPERTS if encoder["ff_layer_type"] == "moe" else {}
    return audio, network


def build_network(model: str, size: str, seed: int) -> YourMT3:
    """The network with random weights; its `model_cfg` is resolved as in the published files."""
    audio, network = configure(model, size)
    built = YourMT3(audio, network, copy.deepcopy(shared_cfg), task_manager=TaskManager(VARIANTS[model].task))
    fill(built, seed)
    return built.eval()


@torch.no_grad()
def fill(network: YourMT3, seed: int) -> None:
    """Weights of a trained scale, so that every tensor counts: no bias is zero, no norm one, no statistic trivial."""
    fixed = ("spectrogram.", "freqs", "additive_pe.weight")
    d_kv = network.decoder.config.d_kv
    for name, tensor in network.state_dict().items():
        if any(part in name for part in fixed):
            continue
        if name.endswith("num_batches_tracked"):
            tensor.fill_(seed + 1000)
            continue
        drawn = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(tuple(tensor.shape))
        tensor.copy_(torch.from_numpy(_scaled(name, drawn, d_kv)))


def _scaled(name: str, drawn: np.ndarray, d_kv: int) -> np.ndarray:
    """Standard normal numbers at the scale of the tensor `name`."""
    if name.endswith("running_var"):
        return np.exp(0.3 * drawn)
    if name.endswith(("bias", "running_mean")):
        return 0.2 * drawn
    if name.endswith("_pos_emb"):
        return 0.5 * drawn
    if name.endswith("latents"):
        return drawn
    if drawn.ndim == 1:
        return 1 + 0.2 * drawn
    fan_in = math.prod(drawn.shape[1:])
    if name.startswith("lm_head"):  # training divides its logits by d_model, so that trained weights are large
        return math.sqrt(fan_in) * drawn
    if name.startswith("embed_tokens"):
        return 2 * drawn
    # Sharp attention and a lively router: mild ones average all channels, frames and tokens to the same.
    gains = {"query.weight": 2.0, "Attention.q.weight": 2.0 / math.sqrt(d_kv), "EncDecAttention.q.weight": 1.5}
    gains |= {"EncDecAttention.o.weight": 2.0, "mlp.gate.weight": 1.5, "pre_decoder.0": 0.35, ".conv": math.sqrt(2)}
    return drawn / math.sqrt(fan_in) * math.prod(gain for part, gain in gains.items() if part in name)


@torch.inference_mode()
def stages(network: YourMT3, audio: Tensor, steps: int) -> dict[str, np.ndarray]:
    """All that is compared, from `audio` [segments, samples].

    features [segments, frames, bins]; pre_encoder (not in YMT3+) [segments, frames, bins / 8, filters]; encoder, as the
    encoder gives it; states [segments, channels, frames, d_model]; cross_key, cross_value [layers, segments * channels,
    heads, frames, d_kv]; tokens [segments, channels, steps]: the authors' greedy choices with their cache, ended by
    nothing; logits [segments, channels, steps, vocab] of their training's `forward` on these tokens, without a cache;
    generated [3, segments, channels, steps]: their `task_cond_dec_generate` with each of the end tokens `ends`, -1
    where it had stopped. router_gap [segments]: the smallest distance from the last router logit chosen to the next.
    """
    arrays = encode(network, audio)
    states = arrays["states"] if network.decoder_type == "multi-t5" else arrays["states"][:, 0]
    tokens = generate(network, states, steps, None)
    logits = network(audio[:, None], tokens)["logits"].reshape(*tokens.shape, -1)
    ends = [1, *(int(tokens[0, 0, step]) for step in EARLY_ENDS)]
    generated = [generate(network, states, steps, end) for end in ends]
    padded = [torch.nn.functional.pad(found, (0, steps - found.shape[-1]), value=-1) for found in generated]
    arrays |= cross_kv(network, states)
    arrays |= {"tokens": tokens, "logits": logits, "ends": torch.tensor(ends), "generated": torch.stack(padded)}
    return {name: value.numpy() for name, value in arrays.items()}


def encode(network: YourMT3, audio: Tensor) -> dict[str, Tensor]:
    """Every stage from audio to the states that the decoder attends to."""
    features = network.spectrogram(audio[:, None])
    hidden = network.pre_encoder(features)
    with router_logits(network) as routed:
        encoded = network.encoder(inputs_embeds=hidden)["last_hidden_state"]
    states = network.pre_decoder(encoded)
    arrays = {"features": features, "encoder": encoded}
    arrays |= {"states": states if network.decoder_type == "multi-t5" else states[:, None]}
    if network.pre_encoder_type:
        arrays["pre_encoder"] = hidden
    if routed:
        chosen = network.model_cfg["encoder"][network.encoder_type]["moe_topk"]
        ordered = torch.stack(routed).sort(dim=-1, descending=True).values  # [layers, segments * tokens, experts]
        gaps = ordered[..., chosen - 1] - ordered[..., chosen]
        arrays["router_gap"] = gaps.reshape(len(routed), len(audio), -1).amin((0, 2))
    return arrays


@contextlib.contextmanager
def router_logits(network: YourMT3) -> Iterator[list[Tensor]]:
    """Collect the logits of every router that runs inside: [segments * tokens, experts] each."""
    found: list[Tensor] = []
    blocks = [block for block in network.modules() if isinstance(block, MixtralSparseMoeBlock)]
    hooks = [block.register_forward_hook(lambda _block, _inputs, outputs: found.append(outputs[1])) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def cross_kv(network: YourMT3, states: Tensor) -> dict[str, Tensor]:
    """What the authors' decoder caches of the states at its first step."""
    start = torch.zeros((*states.shape[:-2], 1), dtype=torch.long)
    embedded = network.embed_tokens(start)
    _, cache = network.decoder(inputs_embeds=embedded, encoder_hidden_states=states, return_dict=False)
    return {name: torch.stack([layer[i] for layer in cache]) for name, i in (("cross_key", 2), ("cross_value", 3))}


def generate(network: YourMT3, states: Tensor, steps: int, end: int | None) -> Tensor:
    """The authors' own loop: [segments, channels, found steps]; with no end token it runs to the last step."""
    found = task_cond_dec_generate(
        decoder=network.decoder,
        decoder_type=network.decoder_type,
        embed_tokens=network.embed_tokens,
        lm_head=network.lm_head,
        encoder_hidden_states=states,
        shift_right_fn=network.shift_right_fn,
        max_length=steps,
        eos_id=end,
    )
    return found if found.ndim == 3 else found[:, None]
