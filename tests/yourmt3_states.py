"""State dicts and Lightning files of YourMT3 networks, spelled out as the authors' code names and shapes them."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from mt3_runtime.features import mel_matrix
from mt3_runtime.specs import FeatureSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

MODELS = ("ymt3plus", "yptf-single", "yptf-multi", "yptf-moe-multi", "yptf-moe-multi-ps")
MEL = FeatureSpec("yourmt3_mel", mel_norm=False, f_min=50.0, f_max=8000.0, segment_samples=32_767)
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Of any of the models; those of a PerceiverTF encoder do not count for YMT3+."""

    d_model: int = 512
    heads: int = 6
    d_kv: int = 64
    d_ff: int = 1024
    encoder_layers: int = 8
    decoder_layers: int = 8
    vocabulary: int = 596
    rows: int = 1034
    filters: int = 128
    keys: int = 128
    width: int = 128
    single_latents: int = 24
    channels: int = 13
    blocks: int = 3
    layers: int = 2
    experts: int = 8
    widening: int = 4

    def latents(self, model: str) -> int:
        return self.single_latents if model == "yptf-single" else 2 * self.channels


FULL = Sizes()
# Every size differs from the others that it could be confused with.
TINY = Sizes(16, 3, 4, 32, 2, 3, 40, 1034, 6, 128, 32, 3, 2, 2, 1, 3, 2)
TINY_MEL = Sizes(512, 2, 3, 512, 1, 2, 40)


def tiny(model: str) -> Sizes:
    return TINY_MEL if model == "ymt3plus" else TINY


def authors_shapes(model: str, sizes: Sizes) -> Shapes:
    """Every entry of the authors' `state_dict()`."""
    shapes = _t5("decoder", sizes, sizes.decoder_layers, ("SelfAttention", "EncDecAttention"))
    shapes |= dict.fromkeys(("embed_tokens.weight", "lm_head.lm_head.weight"), (sizes.vocabulary, sizes.d_model))
    if model == "ymt3plus":
        shapes |= _t5("encoder", sizes, sizes.encoder_layers, ("SelfAttention",))
        shapes["spectrogram.mel_stft.spectrogram.window"] = (2048,)
        shapes["spectrogram.mel_stft.mel_scale.fb"] = (1025, 512)
        return shapes
    shapes["spectrogram.stft.window"] = (2048,)
    shapes |= _pre_encoder(sizes.filters) | _perceiver(model, sizes)
    if model == "yptf-single":
        shapes["pre_decoder.0.projection_layer.weight"] = (sizes.d_model, sizes.single_latents * sizes.width)
    else:
        shapes["pre_decoder.0.linear.weight"] = (sizes.d_model, 2 * sizes.width)
    return shapes


def _t5(side: str, sizes: Sizes, layers: int, attentions: tuple[str, ...]) -> Shapes:
    d, inner, side = sizes.d_model, sizes.heads * sizes.d_kv, f"{side}.{side}"
    shapes: Shapes = {f"{side}.additive_pe.weight": (sizes.rows, d), f"{side}.final_layer_norm.weight": (d,)}
    for block in (f"{side}.block.{i}.layer" for i in range(layers)):
        for j, attention in enumerate(attentions):
            shapes |= {f"{block}.{j}.{attention}.{name}.weight": (inner, d) for name in "qkv"}
            shapes[f"{block}.{j}.{attention}.o.weight"] = (d, inner)
        forward = f"{block}.{len(attentions)}.DenseReluDense"
        shapes |= {f"{forward}.wi_0.weight": (sizes.d_ff, d), f"{forward}.wi_1.weight": (sizes.d_ff, d)}
        shapes[f"{forward}.wo.weight"] = (d, sizes.d_ff)
        shapes |= {f"{block}.{j}.layer_norm.weight": (d,) for j in range(len(attentions) + 1)}
    return shapes


def _pre_encoder(filters: int) -> Shapes:
    shapes: Shapes = {}
    for i, fan_in in enumerate((1, filters, filters)):
        block = f"pre_encoder.0.blocks.{i}"
        for norm in (f"{block}.bn1", f"{block}.bn2"):
            shapes |= {f"{norm}.{name}": (filters,) for name in ("weight", "bias", "running_mean", "running_var")}
            shapes[f"{norm}.num_batches_tracked"] = ()
        shapes |= {f"{block}.conv1.weight": (filters, fan_in, 3, 3), f"{block}.conv2.weight": (filters, filters, 3, 3)}
    shortcut = "pre_encoder.0.blocks.0.shortcut"
    return shapes | {f"{shortcut}.weight": (filters, 1, 1, 1), f"{shortcut}.bias": (filters,)}


def _perceiver(model: str, sizes: Sizes) -> Shapes:
    width, latents, moe = sizes.width, sizes.latents(model), "moe" in model
    shapes: Shapes = {"encoder.latent_array.latents": (latents, width)}
    if moe:
        shapes |= {f"encoder.rotary_emb_{kind}.freqs": (2,) for kind in ("sca", "latent", "temporal")}
    else:
        shapes["encoder.pos_emb._pos_emb"] = (120, latents, width)
    for i in range(sizes.blocks):
        block = f"encoder.blocks.{i}"
        shapes |= _attention(f"{block}.spectral_cross_attention", width, sizes.keys, rotary=moe)
        shapes |= _linear(f"{block}.spectral_cross_attention.self.layernorm2", sizes.keys)
        for kind in ("local", "temporal"):
            for j in range(sizes.layers):
                layer = f"{block}.{kind}_transformer.{j}"
                shapes |= _attention(f"{layer}.attention", width, width, rotary=moe)
                shapes |= _linear(f"{layer}.layernorm", width)
                if moe:
                    shapes[f"{layer}.mlp.gate.weight"] = (sizes.experts, width)
                    for expert in (f"{layer}.mlp.experts.{k}" for k in range(sizes.experts)):
                        wide = width * sizes.widening
                        shapes |= {f"{expert}.{name}.weight": (wide, width) for name in ("w1", "gate")}
                        shapes[f"{expert}.w2.weight"] = (width, wide)
                else:
                    shapes |= _linear(f"{layer}.mlp.dense1", width, width) | _linear(
                        f"{layer}.mlp.dense2", width, width
                    )
    return shapes


def _attention(name: str, width: int, keys: int, *, rotary: bool) -> Shapes:
    shapes = _linear(f"{name}.self.layernorm1", width) | _linear(f"{name}.output.dense", width, width)
    shapes |= _linear(f"{name}.self.query", width, width)
    shapes |= _linear(f"{name}.self.key", width, keys) | _linear(f"{name}.self.value", width, keys)
    return shapes | ({f"{name}.self.rotary_emb.freqs": (2,)} if rotary else {})


def _linear(name: str, out: int, *fan_in: int) -> Shapes:
    return {f"{name}.weight": (out, *fan_in), f"{name}.bias": (out,)}


def authors_state(model: str, sizes: Sizes | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with random weights and the tables that the authors' constructors make."""
    generator = np.random.default_rng(seed)
    state = {}
    for key, shape in authors_shapes(model, sizes or tiny(model)).items():
        state[key] = torch.from_numpy(generator.normal(size=shape).astype(np.float32))
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith("window"):
            state[key] = torch.hann_window(*shape)
        elif key.endswith("fb"):
            state[key] = torch.from_numpy(mel_matrix(MEL))
        elif key.endswith("freqs"):
            state[key] = torch.tensor([1.0, 0.01] if "temporal" in key else [3.1415927, 15.707963])
    return state


def shared_copies(state: dict[str, torch.Tensor]) -> set[str]:
    """Keys under which rotary codes stand a second time."""
    return {key for key in state if key.endswith(".self.rotary_emb.freqs")}


def hyper_parameters(model: str, sizes: Sizes | None = None) -> dict[str, object]:
    """`audio_cfg` and `model_cfg` as the authors' constructor leaves them, but for what does not reach inference."""
    sizes = sizes or tiny(model)
    t5, multi, moe = model == "ymt3plus", "multi" in model, "moe" in model
    widening = sizes.d_ff // sizes.d_model
    stack = {"d_model": sizes.d_model, "num_heads": sizes.heads, "ff_widening_factor": widening}
    stack |= {"ff_layer_type": "t5_gmlp", "position_encoding_type": "sinusoidal", "vocab_size": sizes.vocabulary}
    decoder = stack | {"num_layers": sizes.decoder_layers}
    perceiver = {
        "num_latents": sizes.latents(model), "d_latent": sizes.width, "d_latents": sizes.width, "d_model": sizes.width,
        "num_blocks": sizes.blocks, "num_local_transformers_per_block": sizes.layers,
        "num_temporal_transformers_per_block": sizes.layers, "sca_use_query_residual": moe,
        "position_encoding_type": "rope" if moe else "trainable", "attention_to_channel": True,
        "layer_norm_type": "layer_norm", "ff_layer_type": "moe" if moe else "mlp",
        "ff_widening_factor": sizes.widening if moe else 1, "moe_num_experts": sizes.experts if moe else 4,
        "moe_topk": 2, "hidden_act": "silu" if moe else "gelu", "rotary_type_sca": "pixel",
        "rotary_type_temporal": "lang", "rotary_apply_to_keys": False, "rotary_partial_pe": False,
        "rope_partial_pe": moe,
    }  # fmt: skip
    network = {
        "encoder_type": "t5" if t5 else "perceiver-tf",
        "decoder_type": "multi-t5" if multi else "t5",
        "pre_encoder_type": None if t5 else "conv",
        "pre_decoder_type": None if t5 else "mc_shared_linear" if multi else "linear",
        "conv_out_channels": sizes.filters if not t5 else 128,
        "t5_basename": "google/t5-v1_1-small",
        "d_feat": 512 if t5 else sizes.keys,
        "tie_word_embeddings": True,
        "vocab_size": sizes.vocabulary,
        "num_max_positions": sizes.rows,
        "feat_length": 256 if t5 else 110,
        "event_length": 1024,
        "encoder": {"t5": stack | {"num_layers": sizes.encoder_layers}, "perceiver-tf": perceiver},
        "decoder": {"t5": dict(decoder), "multi-t5": decoder | {"num_channels": sizes.channels}},
    }
    audio = {
        "codec": "melspec" if t5 else "spec", "hop_length": 128 if t5 else 300, "audio_backend": "torchaudio",
        "sample_rate": 16000, "input_frames": 32767, "n_fft": 2048, "n_mels": 512, "f_min": 50.0, "f_max": 8000.0,
    }  # fmt: skip
    return copy.deepcopy({"audio_cfg": audio, "model_cfg": network, "base_lr": 1e-3, "pretrained": False})


AUTHORS_CLASSES = {
    "utils.task_manager": ("TaskManager",),
    "utils.tokenizer": ("NoteEventTokenizer",),
    "utils.event_codec": ("FastCodec",),
    "utils.note_event_dataclasses": ("Event", "EventRange"),
}


@contextlib.contextmanager
def authors_modules(classes: dict[str, tuple[str, ...]] = AUTHORS_CLASSES) -> Iterator[dict[str, type]]:
    """Modules with empty classes of the authors' names, so that objects can be pickled as theirs."""
    found: dict[str, type] = {}
    modules = {module.partition(".")[0] for module in classes} | set(classes)
    assert not modules & set(sys.modules)
    sys.modules.update({module: ModuleType(module) for module in modules})
    for module, names in classes.items():
        for name in names:
            found[name] = type(name, (), {"__module__": module})
            setattr(sys.modules[module], name, found[name])
    try:
        yield found
    finally:
        for module in modules:
            del sys.modules[module]


def task_manager(classes: dict[str, type], model: str) -> object:
    """What the authors' file holds as `hyper_parameters["task_manager"]`, a little of everything."""
    codec, tokenizer, manager = (classes[name]() for name in ("FastCodec", "NoteEventTokenizer", "TaskManager"))
    events = {i: classes["Event"]() for i in range(3)}
    for value, event in events.items():
        vars(event).update(type="pitch", value=value)
    span = classes["EventRange"]()
    vars(span).update(type="pitch", min_value=0, max_value=2)
    vars(codec).update(_event_ranges=[span], _decode_dict=events, _encode_dict={("pitch", i): i for i in events})
    vars(tokenizer).update(codec=codec, max_length=np.int64(1024), programs={"Piano": np.arange(8)})
    channels, tokens = (2, 256) if "multi" in model else (1, 1024)
    vars(manager).update(
        task_name="mc13_full_plus_256", tokenizer=tokenizer, num_decoding_channels=channels,
        max_total_token_length=tokens, train_program_vocab={"Piano": np.arange(0, 8)}, subtask_tokens=[],
    )  # fmt: skip
    return manager


def lightning_file(model: str, **changes: object) -> bytes:
    """A file as Lightning saves it: state dict, optimizer, callbacks, loops and hyper-parameters with a live object."""
    state = authors_state(model)
    with authors_modules() as classes:
        content = {
            "epoch": 3,
            "global_step": 70,
            "pytorch-lightning_version": "2.2.1",
            "state_dict": state,
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}],
            "lr_schedulers": [{"last_epoch": 3}],
            "hparams_name": "kwargs",
            "hyper_parameters": {
                **hyper_parameters(model),
                "task_manager": task_manager(classes, model),
                "onset_tolerance": np.float64(0.05),
                "eval_vocab": [{"Piano": np.arange(8)}],
                "eval_drum_vocab": {"drum": [36, 38]},
            },
        }
        buffer = io.BytesIO()
        torch.save({**content, **changes}, buffer)
    return buffer.getvalue()
