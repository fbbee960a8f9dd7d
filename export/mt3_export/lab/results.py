"""What the lab finds, as plain frozen data: kept as JSON, and all that a report is made of.

None stands for what was not measured, and for a score of what neither side has. Everything is finite.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mt3_runtime.errors import BundleError
from mt3_runtime.strict import build, parse_json

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")

REFERENCE = "fp32-cpu"  # the combination that all others are compared with
FORMAT, VERSION = "mt3-runtime-precision-lab", 1
Outcome = Literal["done", "failed", "impossible"]  # impossible: cannot run on this machine or with this bundle


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over clips or segments, and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured in processes of its own, in turns with all others, on the bundle as a user loads it; medians.

    `encode_ms`: of one segment. `step_ms`: a decoding step of one row; `batch_step_ms`: of `batch_rows` rows.
    `latency_ms`: of encoding a segment and the steps of one row, alone, with the median number of steps of this audio.
    `times_realtime`: seconds of audio transcribed per second, many segments side by side. `peak_mb`: resident memory.
    """

    load_s: float
    encode_ms: float
    step_ms: float
    batch_step_ms: float
    batch_rows: int
    latency_ms: float
    times_realtime: float
    peak_mb: float


@dataclass(frozen=True, slots=True)
class GraphError:
    """How far one graph's outputs are from fp32's when both are given what fp32's graphs before it gave.

    `relative`: norm of the difference over the norm. `psnr_db`: peak of fp32's outputs over the root mean square
    difference, None if there is no difference. `largest`: of all numbers that its products read or give, in fp32;
    `limit` is the largest number of the type they are rounded to, None where scales follow the numbers.
    `non_finite`: numbers of the outputs that are not finite; they count as 0.
    """

    graph: str
    max: float
    relative: float
    cosine: float
    psnr_db: float | None
    largest: float
    limit: float | None
    non_finite: int


@dataclass(frozen=True, slots=True)
class LayerError:
    """Of what one product gives, with the errors of all before it in its graph; `largest` as in `GraphError`."""

    graph: str
    layer: str
    relative: float
    largest: float
    non_finite: int


@dataclass(frozen=True, slots=True)
class Forced:
    """Told fp32's own tokens step by step, through all graphs: does it choose the same next token?

    `kl_*`: nats from fp32's distribution of the next token to this one's; None where only tokens come back (devices).
    `segments`: rows that were looked at. `non_finite`: steps whose logits were not all finite.
    """

    segments: int
    tokens: int
    equal: int
    agreement: Estimate
    kl_mean: float | None
    kl_p99: float | None
    kl_max: float | None
    non_finite: int


@dataclass(frozen=True, slots=True)
class FreeRun:
    """Decoding on its own: for every row the step of the first token that is not fp32's (-1: none), and fp32's steps.

    `names`: whose row it is, as "clip:segment" or "clip:segment:channel".
    """

    names: tuple[str, ...]
    first: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class F1s:
    """F1 scores, see `mt3_runtime.scoring.Scores`; `leakage`: share of notes on programs that the other side lacks."""

    onset: float | None
    onset_offset: float | None
    onset_offset_program: float | None
    drums: float | None
    leakage: float | None


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip in one combination: F1s against fp32's own notes, and against reference MIDI where there is some."""

    name: str
    seconds: float
    notes: int
    against_fp32: F1s
    against_reference: F1s | None


@dataclass(frozen=True, slots=True)
class Scored:
    """Means over clips of `F1s`, by name. `loss`: fp32's score less this one's, clip by clip; empty for fp32 itself."""

    scores: dict[str, Estimate]
    loss: dict[str, Estimate]


@dataclass(frozen=True, slots=True)
class Combination:
    """One precision on one device. `emulated`: by rounding, on the CPU; such a one has no speed.

    `size_bytes`: of the graphs and weights that it reads. `problem`: why it is not done, one line; else empty.
    `fallback_rows`: rows that gave numbers that are not finite, and were decoded again in fp32. `compared_with`: digest
    of what fp32 said and heard, and of the plan, which a result is good for and no other.
    """

    precision: str
    device: str
    emulated: bool
    outcome: Outcome
    problem: str = ""
    size_bytes: int | None = None
    speed: Speed | None = None
    graphs: tuple[GraphError, ...] = ()
    layers: tuple[LayerError, ...] = ()
    forced: Forced | None = None
    free: FreeRun | None = None
    fallback_rows: int = 0
    compared_with: str = ""
    clips: tuple[Clip, ...] = ()
    against_fp32: Scored | None = None
    against_reference: Scored | None = None

    @property
    def name(self) -> str:
        """Precision and device, as files and headings have them."""
        return f"{self.precision}-{self.device}"


@dataclass(frozen=True, slots=True)
class Suspect:
    """A product, and what it costs alone: the mean KL in nats when nothing but it is in the lower precision.

    `share`: of the cost of all products together, those aside that make it infinite. `non_finite`: steps without finite
    logits; one is worse than any KL.
    """

    graph: str
    layer: str
    cost: float
    share: float
    non_finite: int


@dataclass(frozen=True, slots=True)
class Bisection:
    """Which products cost a precision its agreement: worst first, of those that were singled out.

    `cost_all` and `agreement_all` are of all products in that precision, `cost_kept` and `agreement_kept` with those
    of `kept` (graph -> layers) in fp32. `runs`: how often the model was run. `plan`: the file that was written.
    """

    precision: str
    cost_all: float
    agreement_all: float
    suspects: tuple[Suspect, ...]
    kept: dict[str, tuple[str, ...]]
    cost_kept: float
    agreement_kept: float
    runs: int
    plan: str


@dataclass(frozen=True, slots=True)
class Results:
    """A whole run of the lab. `audio`: what was heard, in words. `allowed_loss`: of F1, see `--allow`."""

    format: str
    version: int
    model: str
    bundle: str
    bundle_sha256: str
    audio: str
    clips: int
    seconds: float
    has_reference: bool
    allowed_loss: float
    machine: str
    versions: dict[str, str]
    command: str
    combinations: tuple[Combination, ...]
    bisections: tuple[Bisection, ...]


def one_line(text: str) -> str:
    """Text of any origin as results may hold it: on one line, and without signs that a terminal would obey."""
    return "".join(sign if sign.isprintable() else " " for sign in " ".join(text.split()))


def to_json(value: Any) -> bytes:
    """A dataclass of this module as JSON."""
    return json.dumps(dataclasses.asdict(value), indent=1, allow_nan=False).encode() + b"\n"


def read_kept(kind: type[T], path: Path) -> T | None:
    """A dataclass of this module from a file that an earlier run may have left; None where it cannot be read."""
    try:
        return build(kind, parse_json(path.read_bytes(), path.name), path.name)
    except (OSError, BundleError):
        return None


def read_results(path: Path) -> Results:
    """What `to_json` wrote.

    Raises:
        BundleError: it is not such a file.
    """
    return build(Results, parse_json(path.read_bytes(), path.name), path.name)
