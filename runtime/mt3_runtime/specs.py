"""What a bundle promises about its model: sizes, features, vocabulary. Pure data, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mt3_runtime.errors import BundleError

MT3_FRONTENDS = ("ddsp", "torchaudio")
YOURMT3_FRONTENDS = ("yourmt3_mel", "yourmt3_spectrum")
FRONTENDS = MT3_FRONTENDS + YOURMT3_FRONTENDS
FAMILIES = ("mt3", "yourmt3")
POSITION_BASES = (255, 256)
INJECTIONS = ("context", "prefix")


def require(condition: bool, message: str) -> None:
    """Raise BundleError with `message` unless `condition` holds."""
    if not condition:
        raise BundleError(message)


def require_positive(owner: object, *names: str) -> None:
    """Raise BundleError unless each named attribute is a positive int."""
    for name in names:
        value = getattr(owner, name)
        require(
            type(value) is int and value > 0,
            f"{type(owner).__name__}.{name} is {value!r}, not a positive integer: export the bundle again",
        )


@dataclass(frozen=True, slots=True)
class MemorySpec:
    """How a segment is told of the one before it: its tokens, summed up in vectors (MR-MT3 `models/t5_segmem*.py`).

    `injection`: "context" puts the vectors behind the encoder states, for cross-attention (T5SegMemV2,
    T5SegMemV2WithPrev); "prefix" puts them before the embedded tokens (T5SegMem).
    `length` is the number of vectors that the decoder sees, `span` the number of tokens they are made from, which is
    part of the result: shorter sequences are filled up with `fill_token`. The first segment of a piece of audio is told
    of `first_tokens`, every other one of start token, tokens and, where it came, end token of the one before it.
    """

    injection: Literal["context", "prefix"]
    length: int
    span: int
    fill_token: int
    first_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        require(self.injection in INJECTIONS, f"unknown injection {self.injection!r}: use one of {INJECTIONS}")
        require_positive(self, "length", "span")
        require(
            max(self.length, len(self.first_tokens)) <= self.span,
            f"a memory of {self.span} tokens gives no {self.length} vectors: export the bundle again",
        )


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and constants of one encoder-decoder network.

    `channels` is the number of token sequences a segment is written as, each decoded for itself: 1, or 13 for the
    multi-channel models of YourMT3. What an encoder is made of is the exporter's business: here stands what a
    runtime has to know.
    `position_base` names the rule of the sinusoid's frequencies by what it gives at d_model 512: frequency i is
    10000^(-i/255) for weights trained by Magenta (magenta/mt3 `layers.py` divides by d_model/2 - 1), and
    10000^(-i/256) for those trained with the PyTorch ports (d_model/2).
    `max_length` counts the tokens of a row. `memory`: None where segments know nothing of each other.
    """

    family: Literal["mt3", "yourmt3"]
    name: str
    d_model: int
    num_heads: int
    d_kv: int
    d_ff: int
    encoder_layers: int
    decoder_layers: int
    vocab_size: int
    position_base: int
    max_length: int
    start_token: int
    end_token: int
    channels: int = 1
    memory: MemorySpec | None = None

    def __post_init__(self) -> None:
        require(self.family in FAMILIES, f"unknown model family {self.family!r}: use one of {FAMILIES}")
        require(bool(self.name) and isinstance(self.name, str), "the model has no name: export it again")
        require_positive(
            self, "d_model", "num_heads", "d_kv", "d_ff", "encoder_layers", "decoder_layers", "vocab_size",
            "max_length", "channels",
        )  # fmt: skip
        known = type(self.position_base) is int and self.position_base in POSITION_BASES
        require(known, f"position_base is {self.position_base!r}: use 255 (Magenta) or 256 (MR-MT3)")
        require(
            self.d_model % 2 == 0,
            f"d_model {self.d_model} is odd, but positions are sine and cosine halves: use an even one",
        )
        tokens = {"start_token": self.start_token, "end_token": self.end_token}
        if self.memory:
            require(self.channels == 1, "a memory of several channels is not defined: export the bundle again")
            tokens |= {"fill_token": self.memory.fill_token}
            tokens |= {f"first_tokens[{i}]": token for i, token in enumerate(self.memory.first_tokens)}
        for name, token in tokens.items():
            inside = type(token) is int and 0 <= token < self.vocab_size
            require(inside, f"{name} {token!r} is outside the vocabulary: export the bundle again")

    @property
    def prefix_length(self) -> int:
        """Vectors before the first token of a row: positions of its cache that are not tokens."""
        return self.memory.length if self.memory and self.memory.injection == "prefix" else 0

    @property
    def extra_context(self) -> int:
        """Vectors behind the encoder states that cross-attention sees too."""
        return self.memory.length if self.memory and self.memory.injection == "context" else 0

    @property
    def positions(self) -> int:
        """Positions of the longest row."""
        return self.prefix_length + self.max_length


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """How audio becomes frames of features.

    `frontend`:
        "ddsp" (MT3): log-mel of magnitudes, triangles linear in mel, TensorFlow's matrix.
        "torchaudio" (MR-MT3): the same, linear in Hz.
        "yourmt3_mel" (YMT3+): log-mel of powers, linear in Hz, scaled to 0..1 by each segment's own range.
        "yourmt3_spectrum" (YPTF): log of magnitudes without the constant component, scaled likewise; `f_min` and
        `f_max` do not apply.
    `mel_norm`: clip to [-12, 5] and scale to [0, 1]; on for weights trained by MR-MT3, off for all others.
    `bins` of one frame. Lengths in samples, frequencies in Hz. YourMT3's frames are centred on their time, and one
    more of them fits a segment.
    """

    frontend: Literal["ddsp", "torchaudio", "yourmt3_mel", "yourmt3_spectrum"]
    mel_norm: bool
    sample_rate: int = 16_000
    hop_length: int = 128
    fft_length: int = 2048
    bins: int = 512
    f_min: float = 20.0
    f_max: float = 7600.0
    segment_samples: int = 32_768

    def __post_init__(self) -> None:
        require(self.frontend in FRONTENDS, f"unknown frontend {self.frontend!r}: use one of {FRONTENDS}")
        require(type(self.mel_norm) is bool, "mel_norm is neither true nor false: export the bundle again")
        require_positive(self, "sample_rate", "hop_length", "fft_length", "bins", "segment_samples")
        require(
            0 < self.f_min < self.f_max <= self.sample_rate / 2,
            f"mel range {self.f_min}..{self.f_max} Hz does not fit {self.sample_rate} Hz audio: use at most half of it",
        )
        if self.centred:
            require(not self.mel_norm, f"mel_norm is on, but {self.frontend} scales by itself: export the bundle again")
            require(
                self.segment_samples > self.fft_length // 2,
                f"a segment of {self.segment_samples} samples is too short to be reflected: export the bundle again",
            )
        else:
            require(
                self.segment_samples % self.hop_length == 0,
                f"segment_samples {self.segment_samples} is no multiple of hop_length: export the bundle again",
            )
        if self.frontend == "yourmt3_spectrum":
            require(self.bins == self.fft_length // 2, f"{self.bins} bins are not half an FFT: export the bundle again")

    @property
    def centred(self) -> bool:
        """Whether a frame stands around its time, with the segment reflected at both ends, and not after it."""
        return self.frontend in YOURMT3_FRONTENDS

    @property
    def segment_frames(self) -> int:
        """Frames of one segment."""
        return self.segment_samples // self.hop_length + self.centred


@dataclass(frozen=True, slots=True)
class VocabularySpec:
    """The MT3 event vocabulary: special ids, then shift, pitch, velocity, tie, program and drum classes.

    Order and sizes: magenta/mt3 `vocabularies.py` with one velocity bin. `max_shift_steps` is in steps.
    """

    steps_per_second: int = 100
    max_shift_steps: int = 1000
    velocity_bins: int = 1
    special_tokens: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "steps_per_second", "max_shift_steps", "velocity_bins", "special_tokens")
