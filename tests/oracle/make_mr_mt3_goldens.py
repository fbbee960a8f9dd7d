"""Write tests/golden/mr_mt3.npz: what the authors' MR-MT3 computes with tiny random weights, in all three designs.

    python tests/oracle/make_mr_mt3_goldens.py CHECKOUT PYTHON

Run it in the environment of the tests; arguments as those of compare_mr_mt3.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from compare_mr_mt3 import ask, ending_row

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import TINY_MODEL
from memory_cases import (
    DESIGNS,
    END,
    GOLDEN,
    GOLDEN_LENGTHS,
    golden_checkpoint,
    log_mel_song,
    sources,
    told_after,
)
from t5_numpy import NumpyT5

SMALLEST_GAP = 1e-3  # logits; a thousand times the error, so that no machine can choose another token
KEPT = 8  # ids of each segment, and one in so many vectors of its memory


def end_row_of(network: NumpyT5) -> np.ndarray:
    """The end token's row with which segments end after `GOLDEN_LENGTHS` tokens."""
    inverse = np.linalg.pinv(network.tensors["lm_head.weight"])
    ends, others, tokens = [], [], None
    for features, length in zip(log_mel_song(len(GOLDEN_LENGTHS)), GOLDEN_LENGTHS, strict=True):
        parts = sources(network, network.encode(features), told_after(network.model.memory, tokens))
        tokens = []
        for place in range(1, length + 1):
            logits = network.decode([0, *tokens], *parts)[-1]
            (ends if place == length else others).append(inverse @ logits)
            tokens.append(END if place == length else int(logits.argmax()))
    return ending_row(np.stack(ends), np.stack(others))


def main(checkout: str, python: str) -> None:
    arrays = {}
    for name, memory in DESIGNS.items():
        plain = golden_checkpoint(TINY_MODEL, name)
        row = end_row_of(NumpyT5(plain.model, plain.tensors))
        checkpoint = golden_checkpoint(TINY_MODEL, name, row)
        with tempfile.TemporaryDirectory() as folder:
            song = log_mel_song(len(GOLDEN_LENGTHS))
            answer = ask(checkout, python, Path(folder), name, memory.length, checkpoint, song)
        if answer["gaps"].min() < SMALLEST_GAP or len(answer["gaps"]) != sum(GOLDEN_LENGTHS):
            sys.exit(
                f"{name}: {len(answer['gaps'])} tokens, two logits {answer['gaps'].min():.1e} apart: change the song"
            )
        arrays |= {f"{name}.row": row, f"{name}.tokens": answer["tokens"][:, :KEPT].astype(np.int16)}
        arrays[f"{name}.memory"] = answer["memory"][:, ::KEPT]
    np.savez_compressed(GOLDEN, **arrays)
    sys.stdout.write(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
