"""The manifest of a bundle: what it holds, in a schema without room for surprises."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from mt3_runtime.graphs import FEATURES, GraphSpec, Precision, graph_specs
from mt3_runtime.specs import FeatureSpec, MemorySpec, ModelSpec, VocabularySpec, require
from mt3_runtime.strict import build, parse_json

FORMAT, VERSION = "mt3-runtime-bundle", 3
MANIFEST_NAME = "manifest.json"
MANIFEST_LIMIT = 64 * 1024  # bytes
SIZE_LIMIT = 2**20  # of any one size or constant of a spec
ROOM_LIMIT = 2**28  # numbers in any one array whose size a manifest decides; MT3 needs 3 million
FILE_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
SHA256 = re.compile(r"[0-9a-f]{64}")

LoweringName = Literal["ort", "cuda", "tensorrt"]
WeightsStorage = Literal["fp32", "fp16"]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        require(self.size >= 0, f"a file has size {self.size}: export the bundle again")
        require(SHA256.fullmatch(self.sha256) is not None, f"{self.sha256!r:.80} is not a sha256: export again")


@dataclass(frozen=True, slots=True)
class GraphFile:
    """One graph in one lowering and precision, and the file that its large weights stand in."""

    graph: str
    lowering: LoweringName
    precision: Precision
    file: str
    weights: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a bundle comes from. `notice` is shown to whoever uses it; empty when there is nothing to say."""

    checkpoint: str
    checkpoint_sha256: str | None
    weights_storage: WeightsStorage
    exporter: str
    tools: dict[str, str]
    notice: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything the runtime needs to know before it opens another file."""

    format: str
    version: int
    model: ModelSpec
    features: FeatureSpec
    vocabulary: VocabularySpec
    contracts: tuple[GraphSpec, ...]
    graphs: tuple[GraphFile, ...]
    files: dict[str, FileRecord]
    origin: Origin

    def __post_init__(self) -> None:
        for name in self.files:
            plain = FILE_NAME.fullmatch(name) is not None and name != MANIFEST_NAME
            require(plain, f"{name!r:.80} is no file name of a bundle: export the bundle again")
        self._check_sizes()
        self._check_contracts()
        forms = [(entry.graph, entry.lowering, entry.precision) for entry in self.graphs]
        require(len(set(forms)) == len(forms), "a graph stands twice in the manifest: export the bundle again")
        for entry in self.graphs:
            self._check_graph(entry)

    @property
    def takes_audio(self) -> bool:
        """Whether there is a graph of the features, for devices."""
        return any(spec.name == FEATURES for spec in self.contracts)

    def _check_sizes(self) -> None:
        """What a manifest asks for must fit a machine, whoever wrote it."""
        model, features = self.model, self.features
        specs: list[ModelSpec | FeatureSpec | VocabularySpec | MemorySpec] = [model, features, self.vocabulary]
        for spec in [*specs, model.memory] if model.memory else specs:
            for field in dataclasses.fields(spec):
                value = getattr(spec, field.name)
                fits = not isinstance(value, int) or value <= SIZE_LIMIT
                require(fits, f"{field.name} is larger than {SIZE_LIMIT}: export the bundle again")
        positions = max(model.positions, features.segment_frames + model.extra_context)
        widest = max(features.hop_length, features.fft_length, features.bins, model.d_model)
        arrays = {
            "cache of a row": model.decoder_layers * model.num_heads * positions * model.d_kv,
            "segment": features.segment_frames * widest,
            "encoder state": model.channels * features.segment_frames * model.d_model,
            "mel matrix": features.fft_length * features.bins,
            "memory": (model.memory.span if model.memory else 0) * max(model.d_model, model.num_heads * model.d_kv),
        }
        for name, count in arrays.items():
            require(count <= ROOM_LIMIT, f"a {name} would take {count} numbers: export the bundle again")

    def _check_contracts(self) -> None:
        listed = sum(len(spec.inputs) for spec in self.contracts)
        # the first half keeps a made-up number of layers from being spelled out
        same = self.model.decoder_layers <= listed and self.contracts == tuple(
            graph_specs(self.model, self.features, takes_audio=self.takes_audio).values()
        )
        require(same, "the graphs have other inputs or outputs than the model: export the bundle again")

    def _check_graph(self, entry: GraphFile) -> None:
        known = any(entry.graph == spec.name for spec in self.contracts)
        require(known, f"unknown graph {entry.graph!r:.80}: use a bundle made by this version")
        for name in (entry.file, entry.weights):
            require(name in self.files, f"file {name!r:.80} of graph {entry.graph} is not listed: export again")


def read_manifest(text: bytes) -> Manifest:
    """Parse and check the bytes of a manifest.

    Raises:
        BundleError: too large, not JSON, of another format or version, inconsistent, or not to the byte what
            `write_manifest` writes, its checksum included.
    """
    require(len(text) <= MANIFEST_LIMIT, f"{MANIFEST_NAME} is larger than {MANIFEST_LIMIT} bytes: export again")
    data = parse_json(text, MANIFEST_NAME)
    ours = isinstance(data, dict) and data.get("format") == FORMAT
    require(ours, f"{MANIFEST_NAME} is not of a {FORMAT}: name a folder made by mt3-export bundle")
    found = data.get("version")
    shown = f"{found!r:.20}" if type(found) is int else "unknown"
    require(
        type(found) is int and found == VERSION,
        f"bundle version {shown}, but this runtime reads {VERSION}: export it with this version of mt3-export",
    )
    data.pop("checksum", None)  # compared with the rest of the text below
    manifest = build(Manifest, data, "manifest")
    require(
        write_manifest(manifest) == text, f"{MANIFEST_NAME} was changed or damaged: copy or export the bundle again"
    )
    return manifest


def write_manifest(manifest: Manifest) -> bytes:
    """The one canonical text of a manifest: the same bundle always hashes the same.

    Its last entry is the sha256 of the text without that entry, so that no damaged byte goes unnoticed.
    """
    content = dataclasses.asdict(manifest)
    return _text({**content, "checksum": hashlib.sha256(_text(content)).hexdigest()})


def _text(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"
