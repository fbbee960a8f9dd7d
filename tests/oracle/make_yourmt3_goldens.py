"""Write tests/golden/yourmt3_features.npz: the two YourMT3 spectrograms as the authors' own module computes them.

    .oracle/bin/python tests/oracle/make_yourmt3_goldens.py

Run it in the oracle's environment (scripts/oracle): it needs mt3-infer, torch and torchaudio, and nothing of this
project. The published file was written with mt3-infer 0.2.0, torch 2.13.0 and torchaudio 2.11.0.

What is in the file, for `kind` "melspec" (YMT3+: power log-mel, hop 128) and "spec" (the others: log-magnitude,
hop 300), of the segments `golden_segments()`, whose order is `SEGMENT_NAMES`:

    {kind}_exact        [segments, kept, bins] float32: the frames `KEPT[kind]`, computed in float64
    {kind}_frame_norms  [segments, frames] float32: of the same, norm of every frame over all bins
    {kind}_bin_norms    [segments, bins] float32: of the same, norm of every bin over all frames
    {kind}_authors      [segments, kept, bins / 8] float32: the same frames and bins `::8`, computed in float32
    {kind}_distance     [segments] float64: relative error in norm of the float32 features, whole segments; 0 of silence
    melspec_matrix, melspec_matrix_places: the mel weights above zero, and where in the flat [1025, 512] matrix
    window              [2048] float32: as the checkpoints hold it

All come from the authors' module. Float32 is how they run it; float64 is the same module with its float32 buffers
widened, but for the window, which is made in float64. The two differ by far more than the rounding of a logarithm:
every value is scaled by the smallest bin of the segment, and where a magnitude nearly vanishes, both the transform
and the window count with their rounding. `{kind}_distance` says how much, and is what features may differ from the
authors' own; from the exact ones they should differ by a few 1e-7.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from feature_cases import RATE, chord, noise  # noqa: E402

TARGET = TESTS / "golden" / "yourmt3_features.npz"
SAMPLES = 32_767  # one segment
FRAMES = {"melspec": 256, "spec": 110}
BINS = {"melspec": 512, "spec": 1024}
# The padding reaches into the first and last frames: 8 and 9 of hop 128, 3 and 4 of hop 300.
KEPT = {"melspec": (0, 3, 8, 100, 255), "spec": (0, 1, 3, 50, 109)}
STRIDE = 8  # bins of the float32 features
SEGMENT_NAMES = ("music", "silence", "loud tone", "quiet noise", "music that stops")


def golden_segments() -> np.ndarray:
    """Music over a noise floor, silence, a full-scale tone, noise at -80 dB, music for half a second: [5, SAMPLES]."""
    seconds = np.arange(SAMPLES) / RATE
    music = chord(SAMPLES) + 1e-3 * noise(SAMPLES)
    tone = 0.98 * np.sin(2 * np.pi * 997.0 * seconds + 0.4)
    quiet = 1e-4 * noise(SAMPLES)
    stops = np.where(seconds < 0.5, chord(SAMPLES), 0.0)
    return np.stack([music, np.zeros(SAMPLES), tone, quiet, stops]).astype(np.float32)


def build_module(kind: str) -> Any:
    """The authors' spectrogram module of the checkpoints with this codec, float32."""
    from mt3_infer.models.yourmt3.config.config import audio_cfg  # noqa: PLC0415
    from mt3_infer.models.yourmt3.model.spectrogram import get_spectrogram_layer_from_audio_cfg  # noqa: PLC0415

    changes = {"melspec": {}, "spec": {"codec": "spec", "hop_length": 300}}
    module, shape = get_spectrogram_layer_from_audio_cfg({**audio_cfg, **changes[kind]})
    assert tuple(shape) == (FRAMES[kind], BINS[kind]), shape
    return module


def widen(module: Any) -> Any:
    """The module in float64, with its window made in float64."""
    import torch  # noqa: PLC0415

    module = module.double()
    for name, buffer in module.named_buffers():
        if name.endswith("window"):
            buffer.copy_(torch.hann_window(len(buffer), dtype=torch.float64))
    return module


def features_of(kind: str) -> dict[str, np.ndarray]:
    """What is stored of the features of one module."""
    import torch  # noqa: PLC0415

    module, audio = build_module(kind), torch.from_numpy(golden_segments())[:, None]  # [segments, 1, samples]
    authors = module(audio).numpy()  # [segments, frames, bins]
    exact = widen(module)(audio.double()).numpy()
    error, size = (np.linalg.norm(array, axis=(1, 2)) for array in (authors - exact, exact))
    return {
        f"{kind}_exact": exact[:, KEPT[kind]].astype(np.float32),
        f"{kind}_frame_norms": np.linalg.norm(exact, axis=2).astype(np.float32),
        f"{kind}_bin_norms": np.linalg.norm(exact, axis=1).astype(np.float32),
        f"{kind}_authors": authors[:, KEPT[kind], ::STRIDE],
        f"{kind}_distance": error / np.where(size > 0, size, 1),
    }


def constants() -> dict[str, np.ndarray]:
    """The window, and the mel matrix as its weights above zero with their places."""
    buffers = {name.rpartition(".")[2]: value.numpy() for name, value in build_module("melspec").state_dict().items()}
    places = np.flatnonzero(buffers["fb"])
    weights = buffers["fb"].ravel()[places]
    return {
        "window": buffers["window"],
        "melspec_matrix": weights,
        "melspec_matrix_places": places.astype(np.int32),
    }


def main() -> None:
    stored = features_of("melspec") | features_of("spec") | constants()
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **dict(sorted(stored.items())))
    print(f"{TARGET.name}: {', '.join(sorted(stored))}, {TARGET.stat().st_size} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
