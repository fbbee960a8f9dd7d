"""Scales of what products read, found by transcribing audio in fp32 and counting what comes by."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from mt3_export.graph_reading import read_graph
from mt3_export.histogram import Histogram
from mt3_export.lab.dataset import find_sounds
from mt3_export.lab.listening import beginning
from mt3_export.qdq import LEVELS, factors
from mt3_runtime.audio import DEFAULT_LIMITS, open_audio
from mt3_runtime.backends.ort import LOWERING, OrtBackend
from mt3_runtime.backends.sessions import PROVIDER, import_onnxruntime, session_options
from mt3_runtime.errors import BundleError, OptionError
from mt3_runtime.segments import segment_count, stream_segments
from mt3_runtime.silence import DIGITAL
from mt3_runtime.transcriber import Transcriber

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from mt3_runtime.arrays import FloatArray
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.segments import Segment
    from mt3_runtime.specs import FeatureSpec

SEGMENTS = 64  # at most
# Of the numbers that a product reads, what the largest level stands for; measured, see docs/quantization.md.
SHARE = 0.99999


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scales by graph and product; one that is not there saw zeros only. `segments`: heard, silence aside."""

    scales: Mapping[str, Mapping[str, float]]
    segments: int


def calibrate(
    bundle: Bundle,
    audio: Sequence[Path],
    *,
    segments: int = SEGMENTS,
    threads: int | None = None,
    seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Transcribe segments of audio, evenly spaced over all of it, and choose the scales.

    Rows are decoded alone, each on what the model itself says. Of a model with memory, every other segment is told of
    the one before it. The order of files does not matter.

    Args:
        bundle: with graphs for the CPU in fp32.
        audio: files and folders.
        segments: how many at most.
        threads: of ONNX Runtime.
        seconds: of each file, from its start; None for all.
        progress: is told how many passages of audio are done, and how many there are.

    Raises:
        AudioError: a file cannot be read.
        BundleError: the bundle is damaged, or computes numbers that are not finite.
        DependencyError: onnxruntime is not installed.
        OptionError: there is no audio, or nothing to hear in it.
    """
    passages = choose_passages(bundle, audio, segments, seconds)
    watch = Watch(bundle, threads)
    transcriber = Transcriber(bundle, watch, name=str(bundle.path), silence=DIGITAL)
    heard = 0
    for done, samples in enumerate(_read(bundle, passages, seconds), start=1):
        found = transcriber.transcribe(samples, bundle.manifest.features.sample_rate).provenance
        heard += found.segments - len(found.silent_segments)
        if progress:
            progress(done, sum(map(len, passages.values())))
    if not heard:
        raise OptionError("there is nothing to hear in the audio for calibration: give music")
    return Calibration(watch.scales(), heard)


def choose_passages(
    bundle: Bundle, audio: Sequence[Path], segments: int, seconds: float | None = None
) -> dict[Path, list[int]]:
    """Which passages of which files are heard: as many segments of audio as `passage_length` says, from 0 on."""
    features = bundle.manifest.features
    length = passage_length(bundle)
    counts: dict[Path, int] = {}
    for path in sorted(find_sounds(audio)):
        with open_audio(path, sample_rate=features.sample_rate) as stream:
            samples = stream.expected
            if seconds is not None:
                samples = min(samples, round(seconds * features.sample_rate))
            counts[path] = -(-segment_count(samples, features) // length)
    total = sum(counts.values())
    wanted = min(total, max(1, segments // length))
    picked = (2 * np.arange(wanted) + 1) * total // (2 * wanted)
    first, passages = 0, {}
    for path, count in counts.items():
        passages[path] = [int(place) - first for place in picked if first <= place < first + count]
        first += count
    return {path: places for path, places in passages.items() if places}


def passage_length(bundle: Bundle) -> int:
    """Segments that are heard in a row: a memory is told of the one before."""
    return 2 if bundle.manifest.model.memory else 1


def _read(
    bundle: Bundle, passages: Mapping[Path, Collection[int]], seconds: float | None = None
) -> Iterator[FloatArray]:
    """Samples of every passage; a passage too short to be transcribed is left out."""
    features, vocabulary = bundle.manifest.features, bundle.manifest.vocabulary
    length = passage_length(bundle)
    for path, places in passages.items():
        with open_audio(path, sample_rate=features.sample_rate) as stream:
            blocks = beginning(stream.blocks, features.sample_rate, seconds)
            segments = stream_segments(blocks, features, vocabulary)
            for place, passage in groupby(segments, lambda segment: segment.index // length):
                if place in places:
                    samples = _joined(list(passage), features)
                    if len(samples) >= DEFAULT_LIMITS.min_samples:
                        yield samples


def _joined(passage: Sequence[Segment], features: FeatureSpec) -> FloatArray:
    """Samples that make the same segments again; without what fills the last one up."""
    samples = np.concatenate([segment.samples for segment in passage])
    if features.centred:
        return samples
    # Whole hops would be followed by one more, of zeros.
    frames = features.segment_frames * (len(passage) - 1) + passage[-1].frames
    return samples[: frames * features.hop_length - 1]


class Watch(OrtBackend):
    """The runtime's own backend with room for one row, whose products are listened to."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__(bundle, slots=1, threads=threads)
        self._histograms: dict[str, dict[str, Histogram]] = {}
        ort, options = import_onnxruntime(), session_options(bundle, self.threads)
        for name in list(self._sessions):
            entry = bundle.graph(name, LOWERING, "fp32")
            model = read_graph(bundle, entry)
            read = factors(model.graph)
            heard = {value.name or "": Histogram() for value in read.values()}
            self._histograms[name] = {product: heard[value.name or ""] for product, value in read.items()}
            text = _with_outputs(model, list(dict.fromkeys(read.values())))
            session = ort.InferenceSession(text, options, providers=[PROVIDER])
            self._sessions[name] = _Heard(session, heard, f"{entry.file} of {bundle.path}")

    def scales(self) -> dict[str, dict[str, float]]:
        """Of what was heard until now, by graph and product."""
        return {
            graph: {
                product: threshold / LEVELS
                for product, histogram in products.items()
                if (threshold := histogram.threshold(SHARE))
            }
            for graph, products in self._histograms.items()
        }


def _with_outputs(model: ir.Model, values: Sequence[ir.Value]) -> bytes:
    """A graph that gives some of its values too, behind its own outputs, by copies: inputs can be among them."""
    for value in values:
        copy = ir.node("Identity", [value], name=f"{value.name}.heard")
        output = copy.outputs[0]
        output.name, output.type, output.shape = f"{value.name}.heard", ir.TensorType(ir.DataType.FLOAT), value.shape
        model.graph.append(copy)
        model.graph.outputs.append(output)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


class _Heard:
    """A session that counts, at every run, the numbers of some values; used as `OrtBackend` uses sessions."""

    def __init__(self, session: Any, heard: Mapping[str, Histogram], file: str) -> None:
        self._session, self._heard, self._file = session, heard, file
        self._names = [f"{name}.heard" for name in heard]

    def run(self, names: Sequence[str], feed: Mapping[str, FloatArray]) -> list[FloatArray]:
        found: list[FloatArray] = self._session.run([*self._names, *names], feed)
        self._count(found[: len(self._names)])
        return found[len(self._names) :]

    def io_binding(self) -> Any:
        binding = self._session.io_binding()
        for name in self._names:
            binding.bind_output(name)
        return binding

    def run_with_iobinding(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)
        self._count([value.numpy() for value in binding.get_outputs()[: len(self._names)]])

    def _count(self, arrays: Sequence[FloatArray]) -> None:
        for (name, histogram), array in zip(self._heard.items(), arrays, strict=True):
            if not histogram.add(array):
                raise BundleError(f"{name} in {self._file} is not finite: export a checkpoint that is whole")
