"""The questions put to the authors' network, and how to reach it: a process in the oracle's environment."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.torch import save_file

from mt3_export.checkpoint import Checkpoint
from mt3_export.random_weights import random_tensors
from mt3_runtime.specs import FeatureSpec, ModelSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden" / "parity.npz"
STEPS = 64
SEGMENTS = 3
FEATURES = FeatureSpec("torchaudio", mel_norm=False)
# Every size differs from every other, so that no two can be confused without a trace.
TINY = ModelSpec(
    family="mt3",
    name="tiny",
    d_model=64,
    num_heads=3,
    d_kv=16,
    d_ff=96,
    encoder_layers=2,
    decoder_layers=3,
    vocab_size=1536,
    position_base=256,
    max_length=128,
    start_token=0,
    end_token=1,
)
TINY_SEED = 19  # with it rows end early, late and not at all, without a near-tie
STRIDE = 16  # one logit in so many is kept in the golden data, in each step others


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the authors' network computes of `SEGMENTS` segments in `STEPS` steps.

    `states` [segments, frames, d_model]. `tokens` [steps, segments]: its greedy choices. `logits`
    [steps, segments, kept], of the vocabulary entries `columns` [steps, kept]. `gaps` [steps, segments]: from the
    best logit to the second. `generated` [2, segments, steps]: its own `generate` with each of the end tokens `ends`,
    -1 where it had stopped. `positions` [kept, d_model]: position codes, every 33rd.
    """

    states: np.ndarray
    tokens: np.ndarray
    columns: np.ndarray
    logits: np.ndarray
    gaps: np.ndarray
    ends: np.ndarray
    generated: np.ndarray
    positions: np.ndarray


def tiny_checkpoint() -> Checkpoint:
    """The tiny network, the same bits everywhere."""
    return Checkpoint(TINY, FEATURES, random_tensors(TINY, TINY_SEED), f"random:{TINY_SEED}", None)


def log_mel_frames() -> np.ndarray:
    """Decaying harmonic ridges over noise, at the level of log-mel frames: [segments, frames, bins] float32.

    Sums and products of small integers and raw random words only, so that they are the same bits everywhere.
    """
    frames, bins = FEATURES.segment_frames, FEATURES.bins
    words = np.random.PCG64(5).random_raw(SEGMENTS * (frames * bins + 16)) >> np.uint64(40)
    noise, notes = np.split(words.astype(np.float64) / 2**24, [SEGMENTS * frames * bins])
    values = noise.reshape(SEGMENTS, frames, bins) * 2 - 9
    time, bin_ = np.arange(frames)[:, None], np.arange(bins)
    for segment, drawn in enumerate(notes.reshape(SEGMENTS, 8, 2)):
        for onset, first in zip(drawn[:, 0] * frames // 1, 10 + drawn[:, 1] * 90 // 1, strict=True):
            since = time - onset
            for partial in range(1, 6):
                ridge = 3 - partial - since / 64 - np.abs(bin_ - partial * first) / 2
                values[segment] = np.maximum(values[segment], np.where(since >= 0, ridge, -9))
    return values.astype(np.float32)


def fingerprint(tensors: Mapping[str, Tensor], features: np.ndarray) -> str:
    """sha256 of a question: all weights in order, and the features."""
    parts = [tensor.numpy() for tensor in tensors.values()]
    return hashlib.sha256(b"".join(part.astype("<f4").tobytes() for part in [*parts, features])).hexdigest()


def find_python() -> Path | None:
    """The oracle's python: $MT3_ORACLE, else that of `.oracle`, which scripts/oracle builds; None without either."""
    if named := os.environ.get("MT3_ORACLE"):
        if not Path(named).is_file():  # a slip must not pass for an oracle that is not there
            raise RuntimeError(f"MT3_ORACLE names {named}, which is no file: name the oracle's python, or unset it")
        return Path(named)
    built = HERE.parents[1] / ".oracle" / "bin" / "python"
    return built if built.exists() else None


def ask(python: Path, checkpoint: Checkpoint, folder: Path) -> Answer:
    """Run the authors' network on `log_mel_frames()`; `folder` is filled with what run_mt3.py reads and writes."""
    model = checkpoint.model
    sizes = {name: getattr(model, name) for name in ("d_model", "d_kv", "d_ff", "num_heads", "vocab_size")}
    sizes |= {"num_layers": model.encoder_layers, "num_decoder_layers": model.decoder_layers, "steps": STEPS}
    (folder / "config.json").write_text(json.dumps(sizes))
    save_file(dict(checkpoint.tensors), folder / "weights.safetensors")
    np.save(folder / "features.npy", log_mel_frames())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [python, HERE / "run_mt3.py", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"the oracle failed, build it again with scripts/oracle:\n{done.stderr[-2000:]}")
    with np.load(folder / "answer.npz", allow_pickle=False) as arrays:
        return _whole(dict(arrays))


def thin(answer: Answer) -> Answer:
    """`answer` with one logit in `STRIDE`; over the steps every vocabulary entry has its turn."""
    kept = answer.logits.shape[-1] // STRIDE
    columns = np.arange(STEPS)[:, None] % STRIDE + np.arange(kept) * STRIDE
    logits = np.take_along_axis(answer.logits, columns[:, None], axis=-1)
    parts = {name: getattr(answer, name) for name in Answer.__slots__}
    return Answer(**{**parts, "columns": columns.astype(np.int16), "logits": logits})


def _whole(arrays: dict[str, np.ndarray]) -> Answer:
    steps, _, vocabulary = arrays["logits"].shape
    second, first = np.sort(arrays["logits"], axis=-1)[..., -2:].transpose(2, 0, 1)
    columns = np.broadcast_to(np.arange(vocabulary), (steps, vocabulary))
    return Answer(**arrays, gaps=first - second, columns=columns)
