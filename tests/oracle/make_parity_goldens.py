"""Write tests/golden/parity.npz: what the authors' network computes with the tiny random weights.

    python tests/oracle/make_parity_goldens.py

Run it in the environment of the tests, where scripts/oracle has built `.oracle` or MT3_ORACLE names another python.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from authors import GOLDEN, Answer, ask, find_python, fingerprint, log_mel_frames, thin, tiny_checkpoint

SMALLEST_GAP = 1e-3  # logits; a hundred times the error, so that no machine can choose another token


def main() -> None:
    python, checkpoint = find_python(), tiny_checkpoint()
    if python is None:
        sys.exit("no oracle here: build it with scripts/oracle, or set MT3_ORACLE")
    with tempfile.TemporaryDirectory() as folder:
        answer = thin(ask(python, checkpoint, Path(folder)))
    if answer.gaps.min() < SMALLEST_GAP:
        sys.exit(f"two logits are only {answer.gaps.min():.1e} apart: choose another TINY_SEED")
    arrays = {name: getattr(answer, name) for name in Answer.__slots__}
    question = fingerprint(checkpoint.tensors, log_mel_frames())
    np.savez_compressed(GOLDEN, question=np.array(question), **arrays)
    sys.stdout.write(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
