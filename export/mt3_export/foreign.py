"""Says what a file is when it is not what it was given as, from its bytes and names alone: nothing is opened or run."""

from __future__ import annotations

from mt3_export.mr_mt3 import VARIANTS
from mt3_export.state import MEMORY_ENCODER
from mt3_export.yourmt3_models import MODELS, identify
from mt3_runtime.errors import CheckpointError

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "is a web page, not weights: download the file itself, log in first if the page asks for it"),
    (b"<html", "is a web page, not weights: download the file itself, log in first if the page asks for it"),
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights: run git lfs pull in its repository"),
    (b"\x1f\x8b", "is a gzip archive: unpack it and give the file inside"),
    (b"\x89hdf", "is an HDF5 file, not torch or safetensors: use the PyTorch weights"),
)

_YOURMT3 = (b"task_manager", b"pitchshift", b"latent_array", b"additive_pe")
_MEMORY = (f"{MEMORY_ENCODER}.".encode(), b"segmem_proj.")
_NAMES: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"pytorch-lightning_version", b"model.encoder.block", b"model.decoder.block", b"model.proj.weight"),
        "is a Lightning checkpoint, not a plain state dict: save its state_dict alone, without the prefix 'model.'",
    ),
    (
        (b"relative_attention_bias", b"shared.weight"),
        "is a T5 of transformers (relative positions or a shared embedding), not {model}: use {model} weights",
    ),
)


def refuse_foreign_bytes(data: bytes) -> None:
    """Refuse what the first bytes show to be something else.

    Raises:
        CheckpointError: says what the file is.
    """
    if not data:
        raise CheckpointError("is empty: download or copy it again")
    start = data[:512].lstrip().lower()
    for beginning, verdict in _BEGINNINGS:
        if start.startswith(beginning):
            raise CheckpointError(verdict)
    if data[257:262] == b"ustar":
        raise CheckpointError("is a tar archive (or a torch file from before 0.4): save it again with a current torch")
    if _looks_like_onnx(data):
        raise CheckpointError("is an ONNX graph, already exported: give the checkpoint it was made from")


def _looks_like_onnx(data: bytes) -> bool:
    # ModelProto: field 1 (ir_version, a small number), then one of the fields written next (producer, graph, ...).
    return len(data) > 3 and data[0] == 0x08 and 1 <= data[1] <= 64 and data[2] in range(0x12, 0x43, 8)


def refuse_foreign_names(names: bytes, model: str) -> None:
    """Refuse another model by the names it holds.

    Args:
        names: the pickle of a torch file, or the keys of a safetensors file.
        model: what the file was given as.

    Raises:
        CheckpointError: says which model it is.
    """
    if any(marker in names for marker in _YOURMT3):
        if model in MODELS:
            return
        found = identify(names) or tuple(MODELS)
        raise CheckpointError(f"is a YourMT3 checkpoint, not {model}: give --model {' or '.join(found)}")
    if any(marker in names for marker in _MEMORY):
        if model in VARIANTS:
            return
        first, *earlier = VARIANTS
        raise CheckpointError(
            f"is an MR-MT3 checkpoint with memory, not {model}: give --model {first} ({' or '.join(earlier)} for the "
            "authors' earlier designs)"
        )
    is_mt3 = b"proj.weight" in names and b"encoder.block." in names
    if is_mt3 and model in VARIANTS:
        raise CheckpointError(f"is an MT3 checkpoint without memory, not {model}: give --model mt3")
    for markers, verdict in _NAMES:
        if any(marker in names for marker in markers):
            raise CheckpointError(verdict.format(model=model))
    if is_mt3 and model in MODELS:
        raise CheckpointError(f"is an MT3 checkpoint, not {model}: give --model mt3")
