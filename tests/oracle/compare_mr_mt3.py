"""Six chained segments on our backend and by the authors' own MR-MT3, at full size with random weights.

    python tests/oracle/compare_mr_mt3.py CHECKOUT PYTHON

CHECKOUT: a clone of gudgud96/MR-MT3. PYTHON: one that has torch and a transformers that its files can import. Run by
hand, in the environment of the tests; takes some minutes. The weights are made so that every segment ends, after a
number of tokens of its own: the authors' loop would else take 1024 steps, and longer for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from graph_cases import engine  # noqa: E402
from memory_cases import CONTEXT, END, PREFIX_MEMORY, SPAN, export_with, told_after  # noqa: E402
from mt3_export.checkpoint import Checkpoint  # noqa: E402
from mt3_export.random_weights import random_tensors  # noqa: E402
from mt3_runtime.backends.ort import OrtBackend, without_fill  # noqa: E402
from mt3_runtime.bundle import Bundle, open_bundle  # noqa: E402
from mt3_runtime.specs import FeatureSpec, MemorySpec, ModelSpec  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    Graph = Callable[..., list[np.ndarray]]

FULL = ModelSpec(
    family="mt3",
    name="full",
    d_model=512,
    num_heads=6,
    d_kv=64,
    d_ff=1024,
    encoder_layers=8,
    decoder_layers=8,
    vocab_size=1536,
    position_base=256,
    max_length=SPAN,
    start_token=0,
    end_token=END,
)
FEATURES = FeatureSpec("torchaudio", mel_norm=True)
SEED = 31
LENGTHS = (23, 5, 40, 1, 12, 31)  # tokens of each segment, the end token among them
CASES: dict[str, tuple[str, MemorySpec | None]] = {
    "mr-mt3, 0": ("T5SegMemV2WithPrev", None),
    "mr-mt3, 32": ("T5SegMemV2WithPrev", CONTEXT),
    "mr-mt3, 64": ("T5SegMemV2WithPrev", replace(CONTEXT, length=64)),
    "mr-mt3-v2, 64": ("T5SegMemV2", replace(CONTEXT, length=64, first_tokens=(END,))),
    "mr-mt3-v1, 64": ("T5SegMem", replace(PREFIX_MEMORY, length=64)),
}


def engines(bundle: Bundle) -> dict[str, Graph]:
    return {spec.name: engine(bundle, spec.name, "ort") for spec in bundle.manifest.contracts}


def begin(graphs: dict[str, Graph], model: ModelSpec, states: np.ndarray, told: np.ndarray | None) -> list[np.ndarray]:
    """What the decode step is given of a row besides token and position: the caches, and the prefix in its place."""
    vectors = graphs["memory"](without_fill(told, model.memory)[None]) if model.memory and told is not None else []
    cross = graphs["cross_kv"](states[None], *([] if model.prefix_length else vectors))
    room = (1, model.num_heads, model.prefix_length + max(LENGTHS), model.d_kv)
    own = [np.zeros(room, np.float32) for _ in cross]
    for cache, before in zip(own, graphs["prefix"](*vectors, *cross) if model.prefix_length else [], strict=False):
        cache[:, :, : model.prefix_length] = before
    return [*cross, *own]


def hidden_at_ends(
    graphs: dict[str, Graph], model: ModelSpec, states: np.ndarray, head: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the head sees in each segment where it is to end, and everywhere before: [segments, d], [others, d]."""
    inverse = np.linalg.pinv(head.astype(np.float64))
    ends, others, tokens = [], [], None
    for segment, length in zip(states, LENGTHS, strict=True):
        caches = begin(graphs, model, segment, told_after(model.memory, tokens) if model.memory else None)
        tokens = []
        for position in range(length):
            ids = [np.array([tokens[-1] if tokens else 0]), np.array([model.prefix_length + position])]
            outputs = graphs["decode_step"](*(array.astype(np.int32) for array in ids), *caches)
            caches[len(caches) // 2 :] = outputs[2:-1]
            is_end = position == length - 1
            (ends if is_end else others).append(inverse @ outputs[-1][0].astype(np.float64))
            tokens.append(END if is_end else int(outputs[-1].argmax()))
    return np.stack(ends), np.stack(others)


def ending_row(ends: np.ndarray, others: np.ndarray, logit: float = 12.0) -> np.ndarray:
    """The smallest row of a head with `logit` at the ends and 0 elsewhere: [d]."""
    points = np.concatenate([ends, others])
    wanted = np.repeat([logit, 0.0], [len(ends), len(others)])
    row: np.ndarray = np.linalg.lstsq(points, wanted)[0]
    return row.astype(np.float32)


def decode(backend: OrtBackend, memory: MemorySpec | None, states: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Ids [segments, 1024], as the authors' `generate` returns them, and the log-probability of every token."""
    rows, log_probs = [], []
    for segment in states:
        backend.admit(0, segment[None], (rows[-1] if rows else told_after(memory, None))[None] if memory else None)
        tokens = [0]
        while tokens[-1] != END and len(tokens) <= SPAN:
            read = np.array(tokens[-1:], np.int32)
            found, log_prob = backend.step(read, np.array([len(tokens) - 1], np.int32))
            tokens.append(int(found[0]))
            log_probs.append(float(log_prob[0]))
        rows.append(np.pad(tokens, (0, max(0, SPAN - len(tokens))))[:SPAN].astype(np.int32))
    return np.stack(rows), log_probs


def ask(
    checkout: str, python: str, folder: Path, name: str, length: int, checkpoint: Checkpoint, features: np.ndarray
) -> dict[str, Any]:
    """What the authors' class `name` answers, see authors_mr_mt3.py; `folder` is filled with what is exchanged."""
    model = checkpoint.model
    sizes = {key: getattr(model, key) for key in ("d_model", "d_kv", "d_ff", "num_heads", "vocab_size")}
    sizes |= {"num_layers": model.encoder_layers, "num_decoder_layers": model.decoder_layers}
    (folder / "question.json").write_text(json.dumps({"class": name, "sizes": sizes, "length": length}))
    save_file(dict(checkpoint.tensors), folder / "weights.safetensors")
    np.save(folder / "features.npy", features)
    command = [python, "-W", "ignore", HERE / "authors_mr_mt3.py", checkout, folder]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    with np.load(folder / "answer.npz") as arrays:
        return dict(arrays)


def stored_graphs(folders: dict[tuple[str, int], Path], model: ModelSpec, new: Path | None = None) -> dict[str, Path]:
    """Where graphs stand that were traced already and differ in nothing but weights; those of `new` are noted."""
    length = model.memory.length if model.memory else 0
    keys = {"encoder": 0, "memory": length, "cross_kv": model.extra_context, "prefix": length}
    keys["decode_step"] = model.extra_context
    for key in keys.items():
        if new and (new / f"{key[0]}.fp32.ort.onnx").exists():
            folders.setdefault(key, new)
    return {name: folders[name, size] for name, size in keys.items() if (name, size) in folders}


def prepare(memory: MemorySpec | None, folder: Path, folders: dict[tuple[str, int], Path]) -> tuple[Path, Checkpoint]:
    """A bundle whose segments end as `LENGTHS` says, and its checkpoint with the tensors of a memory in any case."""
    model = replace(FULL, memory=memory)
    tensors = random_tensors(replace(FULL, memory=memory or CONTEXT), SEED)
    used = {key: value for key, value in tensors.items() if memory or not key.startswith("segmem_")}
    first = Checkpoint(model, FEATURES, used, "random", None)
    bundle = open_bundle(export_with(first, folder / "first", stored_graphs(folders, model), ["ort"]))
    stored, graphs, head = (
        stored_graphs(folders, model, bundle.path),
        engines(bundle),
        tensors["lm_head.weight"].clone(),
    )
    states = np.concatenate([graphs["encoder"](one[None])[0][:, 0] for one in song()])
    head[END] = torch.from_numpy(ending_row(*hidden_at_ends(graphs, model, states, head.numpy())))
    second = replace(first, tensors=used | {"lm_head.weight": head})
    whole = replace(first, tensors=tensors | {"lm_head.weight": head})
    return export_with(second, folder / "second", stored, ["ort"]), whole


def compare(checkout: str, python: str, case: str, folder: Path, folders: dict[tuple[str, int], Path]) -> bool:
    """One line of figures; whether all tokens are equal."""
    name, memory = CASES[case]
    bundle, checkpoint = prepare(memory, folder, folders)
    backend = OrtBackend(open_bundle(bundle), slots=1, threads=1)
    states = np.concatenate([backend.encode(one[None])[:, 0] for one in song()])
    found, log_probs = decode(backend, memory, states)
    answer = ask(checkout, python, folder, name, memory.length if memory else 0, checkpoint, song())
    equal = int((found == answer["tokens"]).all(-1).sum())
    lengths = [int(np.flatnonzero(row)[-1]) for row in answer["tokens"]]
    distance = float(np.abs(np.subtract(log_probs, answer["log_probs"])).max()) if equal == len(found) else np.nan
    sys.stdout.write(
        f"{case:<14} {name:<19} {equal} of {len(found)} segments equal, tokens {lengths}, log-probabilities within "
        f"{distance:.1e}, smallest gap {answer['gaps'].min():.1e}\n"
    )
    sys.stdout.flush()
    return equal == len(found)


def song() -> np.ndarray:
    """Normalised log-mel-like frames [segments, frames, bins]."""
    shape = (len(LENGTHS), FEATURES.segment_frames, FEATURES.bins)
    walk = np.cumsum(np.random.default_rng(SEED).normal(size=shape), axis=1)
    return np.clip(walk / 40 + 0.4, 0, 1).astype(np.float32)


def main(checkout: str, python: str) -> None:
    torch.set_num_threads(1)
    folders: dict[tuple[str, int], Path] = {}
    results = []
    with tempfile.TemporaryDirectory() as name:
        for index, case in enumerate(CASES):
            folder = Path(name) / str(index)
            folder.mkdir()
            results.append(compare(checkout, python, case, folder, folders))
    sys.exit(not all(results))


if __name__ == "__main__":
    main(*sys.argv[1:3])
