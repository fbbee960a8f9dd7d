"""One combination, in a process of its own: what fails or crashes here stops no other.

`python -m mt3_export.lab.worker` reads a job from standard input, writes its result, and says on standard output what
it is doing, a line of JSON each, or why it could not write.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_export.calibration import calibrate
from mt3_export.lab.clips import hear_clips
from mt3_export.lab.forcing import Forcing
from mt3_export.lab.isolation import graph_errors
from mt3_export.lab.job import CALIBRATED, PROBLEM, held_for_cpu, read_job
from mt3_export.lab.layers import layer_errors
from mt3_export.lab.listening import read_samples
from mt3_export.lab.logits import open_backend
from mt3_export.lab.material import Material, choose_rows, gather, read_rows
from mt3_export.lab.probes import Pair
from mt3_export.lab.results import REFERENCE, Combination, one_line, to_json
from mt3_export.lab.size import bytes_read
from mt3_export.lab.variants import write_variant
from mt3_export.mixed_plan import read_plan
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import Bundle, open_bundle
from mt3_runtime.devices import LOWERINGS, parse_device
from mt3_runtime.errors import DependencyError, DeviceError, Mt3Error, OptionError
from mt3_runtime.files import atomic_write
from mt3_runtime.loading import load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mt3_export.lab.job import Job
    from mt3_export.lab.results import Forced, GraphError, LayerError, Outcome
    from mt3_runtime.transcriber import Transcriber

    Say = Callable[..., None]

LOOKED_INTO = 8  # rows whose graphs and layers are compared
FALLBACK_SLOTS = 4


@dataclass(frozen=True, slots=True)
class Ready:
    """A combination that can run: the bundle, the precision as that lists it, and the transcriber."""

    bundle: Bundle
    label: str
    emulated: bool
    transcriber: Transcriber


def main() -> int:
    """Carry out the job on standard input; 0 if there is a result, be it that it failed.

    The bundle that was made for it stays, to be timed.
    """
    job = read_job(sys.stdin.buffer.read())
    try:
        atomic_write(job.result, to_json(run(job, _say)))
    except OSError as error:  # on a disk that is full the log stays empty, too
        _tell({PROBLEM: str(error)})
        raise
    return 0


def run(job: Job, say: Say) -> Combination:
    """Everything about one combination; what went wrong is told in it."""
    emulated = job.device == "cpu" and job.variant.is_half
    loaded = False
    try:
        say("loads")
        ready = prepare(job)
        loaded = True
        return _measure(job, ready, say)
    except Mt3Error as error:
        not_here = not loaded and isinstance(error, DeviceError | DependencyError | OptionError)
        outcome: Outcome = "impossible" if not_here else "failed"
        return Combination(job.title, job.device, emulated, outcome, one_line(str(error)))


def prepare(job: Job) -> Ready:
    """Load the bundle in the precision, or make one that has it.

    Raises:
        Mt3Error: that cannot run here.
    """
    bundle, variant = open_bundle(job.bundle), job.variant
    kind, threads = parse_device(job.device).kind, job.threads or None
    if kind != "cpu":
        if variant.graphs is not None:
            raise OptionError(f"{variant.name} is for the CPU: leave {job.device} out, or the precision")
        transcriber = load(bundle.path, job.device, precision=variant.precision, threads=threads)
        return Ready(bundle, variant.precision, emulated=False, transcriber=transcriber)
    made = _made(job, bundle)
    label = "fp32" if variant.is_half else variant.precision
    transcriber = load(made.path, "cpu", precision=label, threads=threads)
    if variant.is_half:  # as on a GPU: rows with numbers that are not finite are decoded again
        transcriber.fallback = cache(lambda: OrtBackend(bundle, slots=FALLBACK_SLOTS, threads=threads))
    return Ready(made, label, emulated=variant.is_half, transcriber=transcriber)


def _made(job: Job, bundle: Bundle) -> Bundle:
    variant = job.variant
    if variant.graphs is None and not variant.is_half and not job.plan and variant.precision in held_for_cpu(bundle):
        return bundle
    job.work.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(job.work, ignore_errors=True)
    keep = read_plan(Path(job.plan)).keep if job.plan else {}
    return write_variant(bundle, variant, job.work, keep, _scales(job, bundle))


def _scales(job: Job, bundle: Bundle) -> Mapping[str, Mapping[str, float]] | None:
    """Scales from audio, where the precision needs some."""
    if job.variant.precision not in CALIBRATED:
        return None
    threads = job.threads or None
    if job.calibration:
        return calibrate(bundle, [Path(path) for path in job.calibration], threads=threads).scales
    # Of the clips what is measured, and no more: the rest of them may be other music.
    return calibrate(bundle, [sound.file.audio for sound in job.clips], threads=threads, seconds=job.seconds).scales


def _measure(job: Job, ready: Ready, say: Say) -> Combination:
    heard = hear_clips(job, ready.transcriber, lambda done, count: say("transcribes", done, count))
    forced, graphs, layers = (None, (), ()) if job.name == REFERENCE else _compare(job, ready, say)
    return Combination(
        precision=job.title,
        device=job.device,
        emulated=ready.emulated,
        outcome="done",
        size_bytes=_size(job, ready),
        graphs=graphs,
        layers=layers,
        forced=forced,
        free=heard.free,
        fallback_rows=heard.fallback_rows,
        compared_with=job.compared_with(),
        clips=heard.clips,
    )


def _compare(job: Job, ready: Ready, say: Say) -> tuple[Forced | None, tuple[GraphError, ...], tuple[LayerError, ...]]:
    """Tell it what fp32 said, and look into its graphs, where they can be looked into."""
    original = open_bundle(job.bundle)
    material = material_of(job, ready.transcriber)
    if not material.rows:
        return None, (), ()
    length = len(material.rows[0].inputs)
    reference = open_backend(original, "fp32", length, job.threads)
    say("is told fp32's tokens")
    if job.device != "cpu":
        return Forcing(reference, material).run(ready.transcriber.backend).summary(), (), ()
    other = open_backend(ready.bundle, ready.label, length, job.threads)
    forced = Forcing(reference, material).run(other).summary()
    say("is looked into")
    few = Material(material.features, material.rows[:: -(-len(material.rows) // LOOKED_INTO)])
    pair = Pair(original, ready.bundle, job.variant, ready.label)
    layers, largest = layer_errors(pair, reference, few)
    return forced, graph_errors(reference, other, few, largest, job.variant.limit), layers


def material_of(job: Job, transcriber: Transcriber) -> Material:
    """Rows of fp32 that are told to others, from all over the clips."""
    said, manifest = read_rows(job.reference_rows, len(job.clips)), transcriber.bundle.manifest
    rate = manifest.features.sample_rate
    chosen = choose_rows(said, job.rows)
    return gather(
        manifest,
        transcriber.extractor,
        said,
        chosen,
        lambda clip: read_samples(job.clips[clip].file.audio, rate, job.seconds),
    )


def _size(job: Job, ready: Ready) -> int | None:
    """Bytes that it reads; None if it is emulated, and the bundle has no graphs of that precision."""
    if not ready.emulated:
        return bytes_read(ready.bundle, LOWERINGS[parse_device(job.device).kind], ready.label)
    if job.plan:  # in whose graphs some weights are larger
        return None
    original, precision = open_bundle(job.bundle), job.variant.precision
    return bytes_read(original, "tensorrt", precision) or bytes_read(original, "cuda", precision)


def _say(stage: str, done: int = 0, count: int = 0) -> None:
    _tell([stage, done, count])


def _tell(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
