"""Asks the authors' YourMT3 networks; runs in the oracle's environment alone and imports nothing of this project.

    .oracle/bin/python tests/oracle/run_yourmt3.py --model yptf-moe-multi ymt3plus --size tiny --seed 3 4 \
        --audio audio.npy --steps 32 --output FOLDER

audio.npy: [segments, 32767] float32, 16 kHz. Written for each model: FOLDER/MODEL.ckpt, a Lightning checkpoint like the
published ones (`lightning_yourmt3.py`), and FOLDER/MODEL.npz, what the network computes (`stages` of
`authors_yourmt3.py`). The network that answers was read back from the checkpoint by mt3-infer's own loader, where that
can read it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# YourMT3 needs this older transformers; scripts/oracle puts it beside the one that MR-MT3 needs.
LEGACY = Path(sys.prefix) / "legacy"
if LEGACY.is_dir():
    sys.path.insert(0, str(LEGACY))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from authors_yourmt3 import VARIANTS, build_network, stages  # noqa: E402
from lightning_yourmt3 import save_checkpoint  # noqa: E402
from mt3_infer.models.yourmt3.inference_loader import load_model_for_inference  # noqa: E402

if TYPE_CHECKING:
    from mt3_infer.models.yourmt3.model.ymt3 import YourMT3

VERSION = "4.45.2"


def read_back(network: YourMT3, path: Path, model: str) -> YourMT3:
    """The network that mt3-infer makes of the file; it cannot read pitch-shift files, there `network` stays."""
    if model.endswith("-ps"):
        return network
    with contextlib.redirect_stdout(sys.stderr):
        loaded = load_model_for_inference(str(path), task_name=VARIANTS[model].task)
    wanted, found = network.state_dict(), loaded.state_dict()
    if wanted.keys() != found.keys() or not all(torch.equal(wanted[key], found[key]) for key in wanted):
        sys.exit("mt3-infer reads other weights from the checkpoint than were written")
    return loaded


def answer(model: str, seed: int, asked: argparse.Namespace) -> None:
    """Write the two files of one model."""
    network = build_network(model, asked.size, seed)
    path = asked.output / f"{model}.ckpt"
    save_checkpoint(network, path, pitch_shift=model.endswith("-ps"))
    network = read_back(network, path, model)
    audio = torch.from_numpy(np.load(asked.audio, allow_pickle=False))
    entries = np.array(len(network.state_dict()))
    np.savez(path.with_suffix(".npz"), entries=entries, **stages(network, audio, asked.steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=VARIANTS, nargs="+", required=True)
    parser.add_argument("--size", choices=("tiny", "full"), required=True)
    parser.add_argument("--seed", type=int, nargs="+", required=True, help="one for each model")
    parser.add_argument("--audio", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    if transformers.__version__ != VERSION:
        sys.exit(f"transformers {transformers.__version__} is here, {VERSION} is needed: build with scripts/oracle")
    if asked.size == "tiny":
        torch.set_num_threads(1)  # threads only wait for each other in so small a network
    asked.output.mkdir(parents=True, exist_ok=True)
    for model, seed in zip(asked.model, asked.seed, strict=True):
        answer(model, seed, asked)


if __name__ == "__main__":
    main()
