"""Write tests/golden/features.npz: log-mel frames and mel matrices as other libraries compute them.

    python tests/oracle/make_feature_goldens.py torchaudio librosa
    python tests/oracle/make_feature_goldens.py tensorflow

Each name needs that package alone and replaces its own entries only, so the packages may live in environments of
their own. The published file was written with torchaudio 2.11.0 (torch 2.13.0), librosa 0.11.0, tensorflow 2.21.0.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from feature_cases import GOLDEN_FRAMES, RATE, SEGMENT, golden_segments  # noqa: E402

TARGET = TESTS / "golden" / "features.npz"
FFT, HOP, MELS, LOW, HIGH = 2048, 128, 512, 20.0, 7600.0


def padded() -> np.ndarray:
    """The segments, with zeros for the frames that reach past their end: [3, 34688]."""
    return np.pad(golden_segments(), ((0, 0), (0, FFT - HOP)))


def torchaudio_entries() -> dict[str, np.ndarray]:
    import torch  # noqa: PLC0415
    import torchaudio  # noqa: PLC0415

    transform = torchaudio.transforms.MelSpectrogram(
        sample_rate=RATE, n_fft=FFT, hop_length=HOP, f_min=LOW, f_max=HIGH, n_mels=MELS, power=1.0, center=False
    )
    mel = transform(torch.from_numpy(padded())).transpose(1, 2)  # [3, 256, 512]
    log_mel = torch.log(torch.where(mel <= 0, torch.tensor(1e-5), mel))
    return {"torchaudio": log_mel.numpy(), "torchaudio_matrix": transform.mel_scale.fb.numpy()}


def librosa_entries() -> dict[str, np.ndarray]:
    import librosa  # noqa: PLC0415

    spectrum = np.abs(librosa.stft(padded(), n_fft=FFT, hop_length=HOP, window="hann", center=False))
    matrix = librosa.filters.mel(sr=RATE, n_fft=FFT, n_mels=MELS, fmin=LOW, fmax=HIGH, htk=True, norm=None)
    mel = (matrix @ spectrum).swapaxes(1, 2)  # [3, 256, 512]
    return {"librosa": np.log(np.where(mel <= 0, 1e-5, mel))}


def tensorflow_entries() -> dict[str, np.ndarray]:
    import tensorflow as tf  # noqa: PLC0415

    spectrum = tf.abs(tf.signal.stft(golden_segments(), FFT, HOP, FFT, pad_end=True))
    matrix = tf.signal.linear_to_mel_weight_matrix(MELS, FFT // 2 + 1, RATE, LOW, HIGH)
    mel = tf.tensordot(spectrum, matrix, 1)  # [3, 256, 512]
    log_mel = tf.math.log(tf.where(mel <= 0, 1e-5, mel))
    return {"tensorflow": log_mel.numpy(), "tensorflow_matrix": matrix.numpy()}


MAKERS = {"torchaudio": torchaudio_entries, "librosa": librosa_entries, "tensorflow": tensorflow_entries}


def compact(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Keep a few frames of features, and of a matrix its weights above zero with their places."""
    value = np.asarray(value, np.float32)
    if name.endswith("_matrix"):
        places = np.flatnonzero(value)
        return {name: value.ravel()[places], f"{name}_places": places.astype(np.int32)}
    assert value.shape == (3, SEGMENT // HOP, MELS), value.shape
    return {name: value[:, GOLDEN_FRAMES]}


def main(names: list[str]) -> None:
    entries: dict[str, np.ndarray] = {}
    if TARGET.exists():
        with np.load(TARGET, allow_pickle=False) as old:
            entries.update(old)
    warnings.simplefilter("ignore")  # every library remarks on the two empty filters
    for name in names:
        for key, value in MAKERS[name]().items():
            entries.update(compact(key, value))
    TARGET.parent.mkdir(exist_ok=True)
    np.savez_compressed(TARGET, **dict(sorted(entries.items())))
    print(f"{TARGET.name}: {', '.join(sorted(entries))}, {TARGET.stat().st_size} bytes")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:] or list(MAKERS))
