"""What one process of the lab is asked to do, and where it leaves what it finds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_export.lab.dataset import ClipFile
from mt3_export.lab.results import REFERENCE
from mt3_export.lab.variants import VARIANTS
from mt3_export.mixed_plan import read_plan
from mt3_runtime.devices import LOWERINGS
from mt3_runtime.graphs import QUANTIZED, UNCALIBRATED

if TYPE_CHECKING:
    from mt3_export.lab.variants import Variant
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.graphs import Precision

WITH_PLAN = "+plan"
PROBLEM = "problem"  # of a line of JSON: what a process could not leave in a file
CALIBRATED = tuple(name for name in QUANTIZED if name not in UNCALIBRATED)


@dataclass(frozen=True, slots=True)
class Sound:
    """A clip of the job; `reference` is empty where there is none."""

    name: str
    audio: str
    reference: str

    @property
    def file(self) -> ClipFile:
        """As the data set has it."""
        return ClipFile(self.name, Path(self.audio), Path(self.reference) if self.reference else None)


@dataclass(frozen=True, slots=True)
class Job:
    """One combination. `seconds`: of each clip, from its start; `rows`: told at most; `threads`: of the CPU, 0 for all.

    `plan`: file of what stays in fp32, empty for nothing. `calibration`: files or folders that scales are made from;
    none for the clips themselves.
    """

    bundle: str
    precision: str
    device: str
    plan: str
    output: str
    clips: tuple[Sound, ...]
    calibration: tuple[str, ...]
    seconds: float | None
    rows: int
    threads: int

    @property
    def name(self) -> str:
        """Of the combination."""
        return f"{self.title}-{self.device}"

    @property
    def title(self) -> str:
        """Of the precision, as results have it."""
        return f"{self.precision}{WITH_PLAN}" if self.plan else self.precision

    @property
    def variant(self) -> Variant:
        """Of the precision."""
        return VARIANTS[self.precision]

    @property
    def results(self) -> Path:
        """Folder of what combinations found."""
        return Path(self.output) / "combinations"

    @property
    def result(self) -> Path:
        """File of what this one found."""
        return self.results / f"{self.name}.json"

    @property
    def work(self) -> Path:
        """Folder of the bundle that is made for it."""
        return Path(self.output) / "work" / self.name

    @property
    def reference_rows(self) -> Path:
        """What fp32 said."""
        return self.results / f"{REFERENCE}.rows.npz"

    @property
    def reference_notes(self) -> Path:
        """What fp32 heard, to the last digit, which MIDI rounds."""
        return self.results / f"{REFERENCE}.notes.json"

    def midi(self, clip: str) -> Path:
        """File of the notes of a clip."""
        return Path(self.output) / "midi" / self.name / f"{clip}.mid"

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(dataclasses.asdict(self))

    def compared_with(self) -> str:
        """See `Combination.compared_with`; empty for fp32 itself, and where it is not there."""
        digest = hashlib.sha256()
        for path in (self.reference_rows, self.reference_notes):
            if self.name == REFERENCE or not path.exists():
                return ""
            digest.update(path.read_bytes())
        digest.update((read_plan(Path(self.plan)).digest if self.plan else "").encode())
        return digest.hexdigest()


def held_for_cpu(bundle: Bundle) -> frozenset[Precision]:
    """The precisions whose graphs a bundle has for the CPU: they are taken as they are."""
    return frozenset(entry.precision for entry in bundle.manifest.graphs if entry.lowering == LOWERINGS["cpu"])


def read_job(text: bytes) -> Job:
    """What `to_json` wrote: by the process that started this one, with paths of any signs."""
    data = json.loads(text)
    clips, calibration = tuple(Sound(**clip) for clip in data.pop("clips")), tuple(data.pop("calibration"))
    return Job(**data, clips=clips, calibration=calibration)
