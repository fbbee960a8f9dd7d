"""An MR-MT3 network from what a file holds, or from chance: specs and tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from mt3_export.mr_mt3 import DEFAULT_LENGTH, VARIANTS, memory_of
from mt3_export.mt3_specs import check_d_kv, mt3_specs
from mt3_export.published import MEMORY_LENGTHS
from mt3_export.random_weights import random_tensors
from mt3_export.settings import MAX_LENGTH, Settings, combine, overrides, parse_metadata
from mt3_export.sizes import MT3_SIZES
from mt3_export.state import (
    MEMORY_ENCODER,
    MEMORY_PREFIX,
    check_shapes,
    count_blocks,
    drop_copies,
    infer_sizes,
    widen,
)
from mt3_runtime.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from mt3_export.settings import Setting
    from mt3_export.stored import StoredState
    from mt3_runtime.specs import FeatureSpec, ModelSpec

PREFIX = "model."  # of the network within the authors' Lightning modules
# How all MR-MT3 weights were trained (gudgud96/MR-MT3 `config/config_slakh_segmem.yaml`, `dataset/`).
_TRAINED: Mapping[str, Setting] = {
    "frontend": "torchaudio",
    "mel_norm": True,
    "position_base": 256,
    "max_length": MAX_LENGTH,
}
_HEADS = 6  # at full size


@dataclass(frozen=True, slots=True, eq=False)
class MemoryNetwork:
    """The fields of a `Checkpoint` that the network decides."""

    model: ModelSpec
    features: FeatureSpec
    tensors: Mapping[str, Tensor]
    warnings: tuple[str, ...]


def read_mr_mt3(stored: StoredState, model: str, filename: str, given: Mapping[str, Setting]) -> MemoryNetwork:
    """The network in a file; all designs have the same tensors.

    Args:
        stored: its tensors, and what it says of itself.
        model: a key of `mr_mt3.VARIANTS`.
        filename: of a published file, it tells the length of the memory.
        given: settings that were asked for.

    Raises:
        CheckpointError: the file holds another model, contradicts itself, or does not tell the length.
        OptionError: the memory is longer than what it is made from.
    """
    widened, conversions = widen(_without_prefix(stored.tensors))
    tensors = drop_copies(widened)
    sizes = infer_sizes(tensors)
    metadata = stored.metadata or {}
    said = parse_metadata(metadata, model)
    known = {**_TRAINED, **({"num_heads": _HEADS} if sizes == MT3_SIZES else {}), **said}
    values = combine(given, known)
    length, warnings = _memory_length(given, said, filename)
    span = _span(model, length, values["max_length"], given)
    if length and span != known["max_length"]:
        warnings += (
            f"the memory is made from {span} tokens, not from {known['max_length']}: notes can differ by that",
        )
    settings = Settings(values, (*_departures(given, known, said), *warnings, *_doubts(model, length, metadata)))
    memory = memory_of(model, length, span)
    # A memory that is not used is checked all the same.
    spec, features = mt3_specs(PurePath(filename).stem, sizes, settings, memory or memory_of(model, 1, MAX_LENGTH))
    check_d_kv(spec, metadata)
    _check_memory(spec, tensors)
    spec = replace(spec, memory=memory)
    return MemoryNetwork(spec, features, _used(spec, tensors), settings.warnings + conversions)


def random_mr_mt3(model: str, seed: int, given: Mapping[str, Setting]) -> MemoryNetwork:
    """A network of full size with random weights.

    Raises:
        OptionError: the memory is longer than what it is made from.
    """
    values = combine(given, {**_TRAINED, "num_heads": _HEADS, **given})
    length = int(given.get("memory_length", DEFAULT_LENGTH))
    memory = memory_of(model, length, _span(model, length, values["max_length"], given))
    spec, features = mt3_specs(f"{model}-random-{seed}", MT3_SIZES, Settings(values), memory)
    assumed = f"memory_length {length} assumed, the default of the authors' classes: --memory-length gives another"
    return MemoryNetwork(spec, features, random_tensors(spec, seed), () if "memory_length" in given else (assumed,))


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefixed = all(key.startswith(PREFIX) for key in tensors)
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()} if prefixed else dict(tensors)


def _memory_length(
    given: Mapping[str, Setting], said: Mapping[str, Setting], filename: str
) -> tuple[int, tuple[str, ...]]:
    """As asked, else as the metadata says, else as the file is called; and what contradicts that."""
    sources = {
        "as asked": given.get("memory_length"),
        "as the checkpoint says": said.get("memory_length"),
        "as the file's name says": MEMORY_LENGTHS.get(filename),
    }
    found = {source: int(length) for source, length in sources.items() if length is not None}
    if not found:
        listed = ", ".join(str(length) for length in sorted(set(MEMORY_LENGTHS.values())))
        raise CheckpointError(
            f"does not say memory_length, the vectors of its memory: give --memory-length as it was trained (the "
            f"published files have {listed})"
        )
    (chosen, length), *others = found.items()
    return length, tuple(
        f"memory_length is {length} {chosen}, not {other} {source}" for source, other in others if other != length
    )


def _span(model: str, length: int, max_length: Setting, given: Mapping[str, Setting]) -> int:
    """Tokens that the memory is made from: the authors fill up every segment to the longest."""
    span = int(max_length)
    needed = max(length, len(VARIANTS[model].first_tokens)) if length else 0
    if needed > span and not given.keys() & {"memory_length", "max_length"}:
        raise CheckpointError(f"has memory_length {length}, more than max_length {span}: correct its metadata")
    if needed > span:
        raise OptionError(
            f"a memory of {length} vectors needs a max_length of {needed}, not {span}: give another --memory-length or "
            "--max-length"
        )
    return span


def _departures(
    given: Mapping[str, Setting], known: Mapping[str, Setting], said: Mapping[str, Setting]
) -> tuple[str, ...]:
    """Warnings of what was asked for against the file, or against how such files are trained."""
    by_file = {name: value for name, value in known.items() if name in said and name != "memory_length"}
    by_training = {name: value for name, value in known.items() if name not in said}
    return (*overrides(given, by_file), *overrides(given, by_training, "MR-MT3 was trained with"))


def _doubts(model: str, length: int, metadata: Mapping[str, str]) -> tuple[str, ...]:
    if model == "mr-mt3" or "architecture" in metadata or not length:
        return ()
    return (f"taken for {model} as asked, which nothing in the file shows: all published MR-MT3 weights are mr-mt3",)


def _check_memory(spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    """Hold the tensors to `expected_shapes`.

    Raises:
        CheckpointError: they differ.
    """
    blocks = count_blocks(MEMORY_ENCODER, tensors)
    if blocks > 1:
        raise CheckpointError(
            f"has a memory encoder of {blocks} blocks, only one is supported: use weights of segmem_num_layers 1"
        )
    check_shapes(spec, tensors)


def _used(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if spec.memory or not key.startswith(MEMORY_PREFIX)}
