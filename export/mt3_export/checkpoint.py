"""A checkpoint, wherever it comes from, as specs and checked float32 tensors."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_export.mr_mt3 import VARIANTS
from mt3_export.mr_mt3_checkpoint import random_mr_mt3, read_mr_mt3
from mt3_export.mt3_specs import check_d_kv, mt3_specs
from mt3_export.published import PUBLISHED, recognise
from mt3_export.random_weights import random_tensors
from mt3_export.settings import FAMILY, Settings, check_options, from_row, resolve
from mt3_export.sizes import MT3_SIZES
from mt3_export.state import check_shapes, drop_copies, infer_sizes, printable, widen
from mt3_export.stored import read_state
from mt3_export.yourmt3_checkpoint import random_yourmt3, read_yourmt3
from mt3_export.yourmt3_models import MODELS
from mt3_export.yourmt3_settings import refuse_other_options
from mt3_runtime.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from mt3_export.design import PerceiverDesign
    from mt3_export.published import PublishedCheckpoint
    from mt3_export.settings import Setting
    from mt3_export.stored import StoredState
    from mt3_runtime.specs import FeatureSpec, ModelSpec

MODEL_NAMES = (*FAMILY, *MODELS)
RANDOM_PREFIX = "random:"
_LARGEST_FILE = 2**31  # bytes; the largest published file of the family is a third of it


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A network ready to be exported.

    `tensors`: exactly the keys and shapes of `expected_shapes`, of `state` for MT3 and MR-MT3, of `yourmt3_layout` for
    YourMT3, float32 and finite. `source`: the file's name, or `random:SEED`. `sha256`: of the file; None for random
    weights. `warnings`: what was assumed or converted. `design`: of a PerceiverTF encoder, None where the encoder is
    T5's.
    """

    model: ModelSpec
    features: FeatureSpec
    tensors: Mapping[str, Tensor]
    source: str
    sha256: str | None
    warnings: tuple[str, ...] = ()
    design: PerceiverDesign | None = None


def load_checkpoint(
    source: str | Path,
    *,
    model: str = "mt3",
    frontend: str | None = None,
    mel_norm: bool | None = None,
    position_base: int | None = None,
    num_heads: int | None = None,
    max_length: int | None = None,
    memory_length: int | None = None,
) -> Checkpoint:
    """Read a torch state dict, a Lightning file of YourMT3 or MR-MT3 or a safetensors file, or draw random weights.

    Nothing in a file is ever executed. A published file is recognised by its hash and takes its settings from the
    table; a safetensors file carries them as metadata. Arguments win over both, which is noted in `warnings`.

    Args:
        source: path of a file, or `random:SEED`.
        model: one of `MODEL_NAMES`; never guessed, but a file that is seen to be another one is refused.
        frontend: as `FeatureSpec.frontend`.
        mel_norm: as `FeatureSpec.mel_norm`.
        position_base: as `ModelSpec.position_base`.
        num_heads: attention heads; shapes tell only heads * d_kv.
        max_length: longest token sequence of a segment.
        memory_length: vectors of MR-MT3's memory, 0 for none; a published file tells by its name, others not at all.

    Raises:
        CheckpointError: the file cannot be read, is something else, is unsafe, or does not fit the model.
        OptionError: an argument is out of range, or not for this model.
    """
    if model not in MODEL_NAMES:
        raise OptionError(f"there is no model {model!r:.100}: use one of {', '.join(MODEL_NAMES)}")
    given = check_options(
        {
            "num_heads": num_heads,
            "frontend": frontend,
            "mel_norm": mel_norm,
            "position_base": position_base,
            "max_length": max_length,
            "memory_length": memory_length,
        }
    )
    if "memory_length" in given and model not in VARIANTS:
        raise OptionError(f"--memory-length is for MR-MT3, {model} has no memory of other segments: leave it out")
    if model in MODELS:
        refuse_other_options(given, model)
    if isinstance(source, str) and source.startswith(RANDOM_PREFIX):
        return _random_checkpoint(source, model, given)
    path = Path(source)
    try:
        return _load_file(path, model, given)
    except CheckpointError as error:
        raise CheckpointError(f"{printable(str(path), limit=400)} {error}") from error


def _load_file(path: Path, model: str, given: Mapping[str, Setting]) -> Checkpoint:
    data = _read_bytes(path)
    sha256 = hashlib.sha256(data).hexdigest()
    row = recognise(sha256)
    if row and row.model != model and row.model in MODEL_NAMES:
        raise CheckpointError(f"is the published {row.model}, not {model}: give --model {row.model}")
    stored = _read_stored(data, model, row)
    del data  # files of three quarters of a GB
    name = row.model if row else path.stem
    if model == "mt3":
        return _mt3_checkpoint(stored, row, given, name, path.name, sha256)
    if model in VARIANTS:
        memory = read_mr_mt3(stored, model, path.name, given)
        return Checkpoint(memory.model, memory.features, memory.tensors, path.name, sha256, memory.warnings)
    network = read_yourmt3(stored, model, name, given, published=row is not None)
    return Checkpoint(
        network.model, network.features, network.tensors, path.name, sha256, network.warnings, network.design
    )


def _read_stored(data: bytes, model: str, row: PublishedCheckpoint | None) -> StoredState:
    try:
        return read_state(data, model, published=row is not None)
    except CheckpointError as error:
        if row is None:
            raise
        # Nothing is wrong with the file, so that neither another download nor another format would help.
        reason = str(error).rpartition(": ")[0]
        raise CheckpointError(
            f"is the published {row.name}, yet {reason}: report this as a bug of mt3-export"
        ) from error


def _mt3_checkpoint(
    stored: StoredState,
    row: PublishedCheckpoint | None,
    given: Mapping[str, Setting],
    name: str,
    source: str,
    sha256: str,
) -> Checkpoint:
    widened, conversions = widen(stored.tensors)
    tensors = drop_copies(widened)
    sizes = infer_sizes(tensors)
    settings = resolve(given, row, stored.metadata, sizes)
    model, features = mt3_specs(name, sizes, settings)
    check_d_kv(model, stored.metadata or {})
    check_shapes(model, tensors)
    return Checkpoint(model, features, tensors, source, sha256, settings.warnings + conversions)


def _random_checkpoint(source: str, model: str, given: Mapping[str, Setting]) -> Checkpoint:
    text = source.removeprefix(RANDOM_PREFIX)
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise CheckpointError(f"{source[:100]!r} has no seed: use a whole number, as in {RANDOM_PREFIX}0")
    seed = int(text)
    label = f"{RANDOM_PREFIX}{seed}"
    warning = f"random weights (seed {seed}): for tests and timing, the notes mean nothing"
    if model in VARIANTS:
        memory = random_mr_mt3(model, seed, given)
        return Checkpoint(memory.model, memory.features, memory.tensors, label, None, (warning, *memory.warnings))
    if model in MODELS:
        try:
            network = random_yourmt3(model, seed, given)
        except CheckpointError as error:
            raise CheckpointError(f"{label} {error}") from error
        return Checkpoint(network.model, network.features, network.tensors, label, None, (warning,), network.design)
    settings = Settings({**from_row(PUBLISHED["mt3"]), **given})
    spec, features = mt3_specs(f"random-{seed}", MT3_SIZES, settings)
    return Checkpoint(spec, features, random_tensors(spec, seed), label, None, (warning,))


def _read_bytes(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                data = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError as error:
        hint = f"fetch it with mt3-export fetch {path}" if str(path) in PUBLISHED else "check the path"
        raise CheckpointError(f"does not exist: {hint}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot be read ({reason}): check the path and its permissions") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise CheckpointError(f"is {kind}: give the weight file itself")
    if len(data) > _LARGEST_FILE:
        raise CheckpointError(
            f"is larger than {_LARGEST_FILE >> 30} GiB, no checkpoint of the family is: save only the state dict"
        )
    return data
