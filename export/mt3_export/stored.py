"""Reads the two kinds of weight files without running anything in them: torch's own and safetensors."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mt3_export.foreign import refuse_foreign_bytes, refuse_foreign_names
from mt3_export.state import some
from mt3_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

# The number that opens every torch file from before 1.6, as pickled.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Whatever a parser of damaged bytes may raise: pickles and archives fail in many ways, all of which mean "damaged".
_DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, struct.error, EOFError, LookupError, ValueError,
    TypeError, AttributeError, AssertionError, ArithmeticError, ImportError, RuntimeError, OSError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredState:
    """Tensors of a file as stored, and its metadata; None where the format has none (torch files)."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] | None


def read_state(data: bytes) -> StoredState:
    """Read a weight file; its kind is told by its bytes, not by its name.

    Args:
        data: the whole file, so that what was hashed is what is read.

    Raises:
        CheckpointError: damaged, something else, or more than tensors; nothing in it has run.
    """
    refuse_foreign_bytes(data)
    stored = _read_safetensors(data) if data[8:9] == b"{" else StoredState(_read_torch(data), None)
    # A few bytes can claim to be terabytes by repeating themselves, and converting them would then need that much.
    # Twice the file leaves room for matrices that are stored once under two names.
    if sum(tensor.numel() * tensor.element_size() for tensor in stored.tensors.values()) > 2 * len(data):
        raise CheckpointError("claims more numbers than it holds: save the state dict again")
    return stored


def _read_torch(data: bytes) -> dict[str, Tensor]:
    if data.startswith(b"PK"):
        names = _archive_pickle(data)
    elif _LEGACY_MAGIC in data[:32]:
        names = data
    elif data.startswith(b"\x80"):
        raise CheckpointError("is a plain pickle, which is never opened: save the state dict with torch.save")
    else:
        raise CheckpointError("is neither a torch file nor safetensors: use weights in one of these formats")
    refuse_foreign_names(names)
    return _tensors_only(_load_torch(data))


def _archive_pickle(data: bytes) -> bytes:
    """The pickle of a torch archive, whose records are checked against their checksums: torch does not."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_records(archive)
            return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError("is a cut off or damaged torch file: download or copy it again") from error


def _check_records(archive: zipfile.ZipFile) -> None:
    names = archive.namelist()
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError("is a zip archive without torch data: unpack it and give the file inside")
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError("is a TorchScript archive, which is code: save the state dict with torch.save")
    # torch never compresses, so a compressed record is foreign, and may be far larger than the file.
    if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
        raise CheckpointError("is a torch file packed by another program: save the state dict with torch.save")
    if (damaged := archive.testzip()) is not None:
        raise CheckpointError(f"is damaged (record {damaged!r} fails its checksum): download or copy it again")


def _load_torch(data: bytes) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL:? (\S{1,80})", str(error))
        found = f"({named[1].strip(',.')})" if named else "or is damaged"
        raise CheckpointError(
            f"holds more than tensors {found} and was not opened: save only the state dict, or download it again"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError("is a cut off or damaged torch file: download or copy it again") from error


def _tensors_only(loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError("holds no dictionary of tensors: save the state dict with torch.save")
    others = [str(key) for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(f"holds {some(others)} besides tensors: save only the state dict")
    return dict(loaded)


def _read_safetensors(data: bytes) -> StoredState:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_without_repeats)
    except _DAMAGE as error:
        raise CheckpointError("is a cut off or damaged safetensors file: download or copy it again") from error
    refuse_foreign_names("\n".join(tensors).encode(errors="replace"))
    return StoredState(tensors, header.get("__metadata__", {}))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError
    return dict(pairs)
