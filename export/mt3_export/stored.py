"""Reads weight files without running anything in them: torch's own, Lightning's among them, and safetensors."""

from __future__ import annotations

import io
import json
import pickle
import struct
import threading
import warnings
import zipfile
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mt3_export.foreign import refuse_foreign_bytes, refuse_foreign_names
from mt3_export.lightning import (
    MR_MT3_STAND_INS,
    PLAIN_NAMES,
    STAND_INS,
    Unknown,
    split_lightning,
    tensors_only,
)
from mt3_export.mr_mt3 import VARIANTS
from mt3_export.pickled import TENSOR_NAMES, check_pickles
from mt3_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LOADING = threading.Lock()
# The number that opens every torch file from before 1.6, as pickled.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Whatever a parser of damaged bytes may raise: pickles and archives fail in many ways, all of which mean "damaged".
_DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, struct.error, EOFError, LookupError, ValueError,
    TypeError, AttributeError, AssertionError, ArithmeticError, ImportError, RuntimeError, OSError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredState:
    """Tensors of a file as stored, and what it says of itself; None where the format has no such thing.

    `metadata` stands in safetensors files, `hyper_parameters` in those of Lightning.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] | None
    hyper_parameters: Mapping[str, object] | None = None


def read_state(data: bytes, model: str, *, published: bool = False) -> StoredState:
    """Read a weight file; its kind is told by its bytes, not by its name.

    Args:
        data: the whole file, so that what was hashed is what is read.
        model: what it was given as: those of mt3 are no Lightning files.
        published: whether it was recognised by its hash: then classes that are not known have stand-ins too.

    Raises:
        CheckpointError: damaged, something else, or more than it may be; nothing in it has run.
    """
    refuse_foreign_bytes(data)
    stored = _read_safetensors(data, model) if data[8:9] == b"{" else _read_torch(data, model, published)
    # A few bytes can claim to be terabytes by repeating themselves, and converting them would then need that much.
    # Twice the file leaves room for matrices that are stored once under two names.
    if sum(tensor.numel() * tensor.element_size() for tensor in stored.tensors.values()) > 2 * len(data):
        raise CheckpointError("claims more numbers than it holds: save the state dict again")
    return stored


def _read_torch(data: bytes, model: str, published: bool) -> StoredState:
    legacy = not data.startswith(b"PK")
    if not legacy:
        names = _archive_pickle(data)
    elif _LEGACY_MAGIC in data[:32]:
        names = data
    elif data.startswith(b"\x80"):
        raise CheckpointError("is a plain pickle, which is never opened: save the state dict with torch.save")
    else:
        raise CheckpointError("is neither a torch file nor safetensors: use weights in one of these formats")
    refuse_foreign_names(names, model)
    if model == "mt3":
        check_pickles(names, TENSOR_NAMES, legacy=legacy)
        return StoredState(tensors_only(_load_torch(data)), None)
    stand_ins: Mapping[str, Callable[..., object]] = MR_MT3_STAND_INS if model in VARIANTS else STAND_INS
    if published and not legacy:
        stand_ins = {**_unknown(data), **stand_ins}
    check_pickles(names, TENSOR_NAMES | PLAIN_NAMES | stand_ins.keys(), legacy=legacy)
    loaded = _load_torch(data, stand_ins)
    state, hyper_parameters = split_lightning(loaded) if isinstance(loaded, dict) else (loaded, {})
    return StoredState(tensors_only(state), None, hyper_parameters)


def _unknown(data: bytes) -> dict[str, type]:
    """Stand-ins for all that an archive names; what torch knows by itself it would call, so that has none."""
    try:
        return dict.fromkeys(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)), Unknown)
    except _DAMAGE as error:
        raise CheckpointError("is a cut off or damaged torch file: download or copy it again") from error


def _archive_pickle(data: bytes) -> bytes:
    """The pickle of a torch archive, whose records are checked against their checksums: torch does not."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_records(archive, len(data))
        # Found as torch will find it: an archive can be made to hold other records for other programs.
        return bytes(torch._C.PyTorchFileReader(io.BytesIO(data)).get_record("data.pkl"))  # noqa: SLF001
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError("is a cut off or damaged torch file: download or copy it again") from error


def _check_records(archive: zipfile.ZipFile, size: int) -> None:
    names = archive.namelist()
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError("is a zip archive without torch data: unpack it and give the file inside")
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError("is a TorchScript archive, which is code: save the state dict with torch.save")
    # Programs differ in which of two they take, and in whether case counts.
    if len({name.lower() for name in names}) < len(names) or len({name.partition("/")[0] for name in names}) > 1:
        raise CheckpointError("has two records of one name, or of two archives: download or copy it again")
    # torch never compresses, so a compressed record is foreign, and may be far larger than the file.
    if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
        raise CheckpointError("is a torch file packed by another program: save the state dict with torch.save")
    if sum(record.file_size for record in archive.infolist()) > size:
        raise CheckpointError("claims more numbers than it holds: download or copy it again")
    if (damaged := archive.testzip()) is not None:
        raise CheckpointError(f"is damaged (record {damaged!r} fails its checksum): download or copy it again")


def _load_torch(data: bytes, stand_ins: Mapping[str, Callable[..., object]] = MappingProxyType({})) -> object:
    named: list[Any] = [(stand_in, name) for name, stand_in in stand_ins.items()]
    try:
        # The lock, because the names are torch's state, not this call's.
        with _LOADING, warnings.catch_warnings(), torch.serialization.safe_globals(named):
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "holds more than tensors or is damaged and was not opened: save only the state dict, or download it again"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError("is a cut off or damaged torch file: download or copy it again") from error


def _read_safetensors(data: bytes, model: str) -> StoredState:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_without_repeats)
    except _DAMAGE as error:
        raise CheckpointError("is a cut off or damaged safetensors file: download or copy it again") from error
    refuse_foreign_names("\n".join(tensors).encode(errors="replace"), model)
    return StoredState(tensors, header.get("__metadata__", {}))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError
    return dict(pairs)
