"""Random PerceiverTF networks of any size, and tiny specs of the YourMT3 models."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from mt3_export.design import PerceiverDesign
from mt3_runtime.specs import FeatureSpec, ModelSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

EXPERTS = 8


@dataclass(frozen=True)
class Sizes:
    """Of one network: conv channels, bins of the input, rows of the position table, latents and widths.

    `layers`: local and temporal ones of every block.
    """

    conv: int
    bins: int
    table: int
    latents: int
    width: int
    inner: int
    d_model: int
    layers: tuple[tuple[int, int], ...] = ((2, 2),) * 3


def design(*, heads: int, moe: bool, norm: str = "layer", residual: bool | None = None) -> PerceiverDesign:
    """Experts and a residual go together in the published models."""
    return PerceiverDesign(heads, moe if residual is None else residual, 2 if moe else 0, norm)


def shapes(sizes: Sizes, plan: PerceiverDesign, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of everything before the decoder."""
    conv, width, pooled = sizes.conv, sizes.width, sizes.bins // 8
    for i in range(3):
        block = f"pre_encoder.0.blocks.{i}"
        for half in (1, 2):
            yield f"{block}.conv{half}.weight", (conv, 1 if (i, half) == (0, 1) else conv, 3, 3)
            for part in ("weight", "bias", "running_mean", "running_var"):
                yield f"{block}.bn{half}.{part}", (conv,)
        if i == 0:
            yield f"{block}.shortcut.weight", (conv, 1, 1, 1)
            yield f"{block}.shortcut.bias", (conv,)
    yield "encoder.latent_array.latents", (sizes.latents, width)
    if plan.chosen:
        for where in ("sca", "latent", "temporal"):
            yield f"encoder.rotary_emb_{where}.freqs", (2,)
    else:
        yield "encoder.pos_emb._pos_emb", (sizes.table, sizes.latents, width)
    for i, counts in enumerate(sizes.layers):
        block = f"encoder.blocks.{i}"
        yield from attention(f"{block}.spectral_cross_attention", width, pooled, plan)
        yield from norm(f"{block}.spectral_cross_attention.self.layernorm2", pooled, plan)
        for kind, count in zip(("local", "temporal"), counts, strict=True):
            for j in range(count):
                layer = f"{block}.{kind}_transformer.{j}"
                yield from attention(f"{layer}.attention", width, width, plan)
                yield from norm(f"{layer}.layernorm", width, plan)
                yield from feed_forward(f"{layer}.mlp", sizes, plan)
    name = "linear" if channels > 1 else "projection_layer"
    yield f"pre_decoder.0.{name}.weight", (sizes.d_model, sizes.latents // channels * width)


def attention(name: str, width: int, source: int, plan: PerceiverDesign) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part, inputs in (("query", width), ("key", source), ("value", source)):
        yield f"{name}.self.{part}.weight", (width, inputs)
        yield f"{name}.self.{part}.bias", (width,)
    yield f"{name}.output.dense.weight", (width, width)
    yield f"{name}.output.dense.bias", (width,)
    yield from norm(f"{name}.self.layernorm1", width, plan)


def norm(name: str, width: int, plan: PerceiverDesign) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    if plan.norm == "layer":
        yield f"{name}.bias", (width,)


def feed_forward(name: str, sizes: Sizes, plan: PerceiverDesign) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = sizes.width, sizes.inner
    if not plan.chosen:
        for half in (1, 2):
            yield f"{name}.dense{half}.weight", (width, width)
            yield f"{name}.dense{half}.bias", (width,)
        return
    yield f"{name}.gate.weight", (EXPERTS, width)
    for i in range(EXPERTS):
        yield f"{name}.experts.{i}.w1.weight", (inner, width)
        yield f"{name}.experts.{i}.gate.weight", (inner, width)
        yield f"{name}.experts.{i}.w2.weight", (width, inner)


def draw(sizes: Sizes, plan: PerceiverDesign, channels: int, seed: int) -> dict[str, torch.Tensor]:
    """Weights under which activations keep a trained scale; every bias and statistic is far from 0 or 1."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(sizes, plan, channels):
        values = spread(name, generator.normal(size=shape))
        tensors[name] = torch.from_numpy(values.astype(np.float32))
    return tensors


def spread(name: str, noise: np.ndarray) -> np.ndarray:
    part = name.rpartition(".")[2]
    if part == "freqs":
        return np.array((1.0, 0.01) if "temporal" in name else (math.pi, 5 * math.pi))
    if part == "running_var":
        return np.exp(noise / 2)
    if part in {"latents", "_pos_emb"}:
        return noise
    if noise.ndim > 1:
        return noise / math.sqrt(math.prod(noise.shape[1:]))
    is_gain = part == "weight"
    return is_gain + noise / 4


TINY_SPECTRUM = FeatureSpec(
    "yourmt3_spectrum", mel_norm=False, hop_length=10, fft_length=80, bins=40, segment_samples=115
)
TINY_SPECTRUM_ODD = replace(TINY_SPECTRUM, segment_samples=105)  # 11 frames, the other has 12
TINY_SIZES = Sizes(conv=6, bins=40, table=13, latents=6, width=32, inner=20, d_model=32, layers=((1, 1), (1, 1)))


def tiny_model(channels: int) -> ModelSpec:
    return ModelSpec("yourmt3", "tiny", 32, 2, 16, 48, 3, 2, 40, 256, 24, 0, 1, channels)
