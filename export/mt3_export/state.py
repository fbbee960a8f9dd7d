"""The MT3 state dict: which tensors a network has, in which shapes, and what a file may hold besides them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mt3_export.sizes import Sizes
from mt3_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mt3_runtime.specs import ModelSpec

MEL_BINS = 512
# The PyTorch ports register these matrices under a second name.
DUPLICATES = {
    "encoder.embed_tokens.weight": "proj.weight",
    "decoder.embed_tokens.weight": "decoder_embed_tokens.weight",
}
MEMORY_ENCODER = "segmem_encoder"
MEMORY_DUPLICATES = {f"{MEMORY_ENCODER}.embed_tokens.weight": "segmem_proj.weight"}
INVERSE_FREQUENCIES = ("encoder.pos_emb.inv_freq", "decoder.pos_emb.inv_freq")
MEMORY_INVERSE_FREQUENCY = f"{MEMORY_ENCODER}.pos_emb.inv_freq"
MEMORY_PREFIX = "segmem_"  # of all that a memory adds
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def expected_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the network and its shape ([out, in] for matrices), always in the same order.

    Source: the state dict of kunato/mt3-pytorch (`tools/convert_weight.py`) less its duplicates and constants; that of
    a memory from gudgud96/MR-MT3 (`models/t5_segmem*.py`).
    """
    width, inner = model.d_model, model.num_heads * model.d_kv
    shapes: dict[str, tuple[int, ...]] = {
        "proj.weight": (width, MEL_BINS),
        "decoder_embed_tokens.weight": (model.vocab_size, width),
    }
    attentions = ("SelfAttention", "EncDecAttention")
    for side, layers, used in (("encoder", model.encoder_layers, 1), ("decoder", model.decoder_layers, 2)):
        for index in range(layers):
            shapes |= block_shapes(f"{side}.block.{index}", attentions[:used], width, inner, model.d_ff)
        shapes[f"{side}.final_layer_norm.weight"] = (width,)
    shapes["lm_head.weight"] = (model.vocab_size, width)
    if model.memory:
        shapes["segmem_proj.weight"] = (width, width)
        shapes |= block_shapes(f"{MEMORY_ENCODER}.block.0", attentions[:1], width, inner, model.d_ff)
        shapes[f"{MEMORY_ENCODER}.final_layer_norm.weight"] = (width,)
    return shapes


def block_shapes(
    block: str, attentions: tuple[str, ...], width: int, inner: int, d_ff: int
) -> dict[str, tuple[int, ...]]:
    """Tensors of one T5 block: its attentions in turn, then the gated feed-forward."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, attention in enumerate(attentions):
        layer = f"{block}.layer.{index}"
        shapes |= {f"{layer}.{attention}.{name}.weight": (inner, width) for name in "qkv"}
        shapes[f"{layer}.{attention}.o.weight"] = (width, inner)
        shapes[f"{layer}.layer_norm.weight"] = (width,)
    layer = f"{block}.layer.{len(attentions)}"
    shapes |= {f"{layer}.DenseReluDense.{name}.weight": (d_ff, width) for name in ("wi_0", "wi_1")}
    shapes[f"{layer}.DenseReluDense.wo.weight"] = (width, d_ff)
    shapes[f"{layer}.layer_norm.weight"] = (width,)
    return shapes


def infer_sizes(tensors: Mapping[str, Tensor]) -> Sizes:
    """Sizes of the network, read from the tensors that define them; `check_shapes` then holds the rest to them.

    Raises:
        CheckpointError: a defining tensor is missing or is no matrix, or the input is not 512 log-mel bins.
    """
    d_model, bins = _matrix_shape(tensors, "proj.weight")
    if bins != MEL_BINS:
        raise CheckpointError(f"reads {bins} mel bins, MT3 has {MEL_BINS}: this is another model, use one of MT3")
    return Sizes(
        d_model=d_model,
        inner=_matrix_shape(tensors, "encoder.block.0.layer.0.SelfAttention.q.weight")[0],
        d_ff=_matrix_shape(tensors, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        encoder_layers=count_blocks("encoder", tensors),
        decoder_layers=count_blocks("decoder", tensors),
        vocab_size=_matrix_shape(tensors, "lm_head.weight")[0],
    )


def _matrix_shape(tensors: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    if key not in tensors:
        raise CheckpointError(
            f"has no {key} among its {len(tensors)} tensors ({some(tensors)}): save the state dict of an MT3 network"
        )
    shape = tuple(tensors[key].shape)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{key} has shape {shape}, not a matrix: save the state dict of an MT3 network")
    return shape


def count_blocks(side: str, keys: Iterable[str]) -> int:
    """How many blocks of an encoder or decoder have tensors."""
    # Counted, not the highest index: a gap then shows as missing tensors and a huge index costs nothing.
    pattern = re.compile(rf"{side}\.block\.(0|[1-9][0-9]{{0,8}})\.")
    return len({match[1] for match in map(pattern.match, keys) if match})


def check_shapes(model: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    """Hold the tensors to `expected_shapes`: nothing missing, nothing extra, every shape equal.

    Raises:
        CheckpointError: names the first few that differ.
    """
    compare_shapes(expected_shapes(model), tensors, "MT3")


def compare_shapes(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], network: str) -> None:
    """The same for any network, by the name that the message gives it.

    Raises:
        CheckpointError: names the first few that differ.
    """
    missing = [key for key in expected if key not in tensors]
    unknown = [key for key in tensors if key not in expected]
    found = {key: tuple(tensors[key].shape) for key in expected if key in tensors}
    wrong = [f"{key} {shape} for {expected[key]}" for key, shape in found.items() if shape != expected[key]]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
    if problems := [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds if names]:
        raise CheckpointError(f"tensors {'; '.join(problems)}: save the whole state dict of one {network} network")


def drop_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 tensors without the ports' second names and sinusoid constants, both checked first.

    `inv_freq` never decides how positions are computed: the published file stores the port's values, which are
    not those its weights were trained with. Another value than the port's, 10000^(-2i/d_model), means another model.

    Raises:
        CheckpointError: a copy differs from its original, or a constant has another value.
    """
    kept = dict(tensors)
    for copy, original in (DUPLICATES | MEMORY_DUPLICATES).items():
        duplicate = kept.pop(copy, None)
        if duplicate is not None and (original not in kept or not torch.equal(duplicate, kept[original])):
            raise CheckpointError(f"{copy} differs from {original}: this is another model, use one of MT3")
    for key in (*INVERSE_FREQUENCIES, MEMORY_INVERSE_FREQUENCY):
        stored = kept.pop(key, None)
        if stored is not None and "proj.weight" in kept and not _is_port_sinusoid(stored, len(kept["proj.weight"])):
            raise CheckpointError(f"{key} is not that of MT3: this is another model, use one of MT3")
    return kept


def _is_port_sinusoid(stored: Tensor, d_model: int) -> bool:
    port = 10000.0 ** (-2.0 * torch.arange(d_model // 2, dtype=torch.float64) / d_model)
    # Loose enough for a file stored in bfloat16; the nearest other model (/255 for /256) is 3.7 % away at the end.
    return stored.shape == port.shape and torch.allclose(stored.double(), port, rtol=1e-2, atol=1e-6)


def widen(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Every tensor as contiguous float32, and a warning if any was stored otherwise.

    Raises:
        CheckpointError: a tensor that is not dense floating point, or holds NaN or infinity.
    """
    widened: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        _check_plain(key, tensor)
        widened[key] = tensor.detach().to(torch.float32).contiguous()
        if not bool(torch.isfinite(widened[key]).all()):
            raise CheckpointError(f"{printable(key)} holds NaN or infinity in float32: use an earlier checkpoint")
    others = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"}
    warning = f"weights stored as {', '.join(sorted(others))} were converted to float32"
    return widened, (warning,) if others else ()


def _check_plain(key: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise CheckpointError(f"{printable(key)} is not a plain dense tensor: save the float32 state dict")
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(f"{printable(key)} is {tensor.dtype}, not floating point: save the float32 state dict")


def some(names: Iterable[str], count: int = 3) -> str:
    """The first few of `names`, for a message of one line."""
    listed = [printable(name) for name in names]
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")


def printable(name: str, limit: int = 100) -> str:
    """A name from a file, fit for a message of one line."""
    shown = name if name.isprintable() else ascii(name)
    return shown if len(shown) <= limit else shown[:limit] + "..."
