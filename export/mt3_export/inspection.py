"""What a bundle holds, checked byte by byte and said in a page."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mt3_export.graph_reading import read_graph
from mt3_runtime.bundle import open_bundle
from mt3_runtime.specs import MT3_FRONTENDS

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from mt3_runtime.manifest import Manifest
    from mt3_runtime.specs import FeatureSpec, MemorySpec


@dataclass(frozen=True, slots=True)
class Inspection:
    """A verified bundle: its manifest and, by graph file, how often each operator occurs."""

    manifest: Manifest
    sha256: str
    operators: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"sha256": self.sha256, "manifest": asdict(self.manifest), "operators": self.operators}

    def to_text(self) -> str:
        """A page for a person."""
        model, features, origin = self.manifest.model, self.manifest.features, self.manifest.origin
        size = sum(record.size for record in self.manifest.files.values())
        tools = ", ".join(f"{name} {version}" for name, version in origin.tools.items())
        layers = f"{model.encoder_layers} + {model.decoder_layers} layers, d_model {model.d_model}, d_ff {model.d_ff}"
        attention = f"{model.num_heads} heads x {model.d_kv}, position base {model.position_base}"
        room = f"at most {model.max_length} tokens" + (f" in each of {model.channels} channels" * (model.channels > 1))
        lines = [
            f"{model.name} ({model.family}), bundle {self.sha256[:16]}, {size / 1e6:.1f} MB, every file verified",
            f"from      {origin.checkpoint} (sha256 {origin.checkpoint_sha256}), weights in {origin.weights_storage}",
            f"exported  by {origin.exporter} with {tools}",
            f"network   {layers}, {attention}, vocabulary {model.vocab_size}, {room}",
            f"features  {features.frontend}, {_describe(features)}",
        ]
        lines += [f"memory    {_describe_memory(model.memory)}"] if model.memory else []
        lines += [f"notice    {origin.notice}"] if origin.notice else []
        for file, counts in self.operators.items():
            kinds = ", ".join(f"{name} {count}" for name, count in counts.items())
            lines.append(f"graph     {file}: {sum(counts.values())} nodes ({kinds})")
        return "\n".join(lines)


def _describe(features: FeatureSpec) -> str:
    frames = f"{features.segment_frames} frames x {features.bins} bins"
    if features.frontend == "yourmt3_spectrum":
        return frames
    norm = f"normalisation {'on' if features.mel_norm else 'off'}, " if features.frontend in MT3_FRONTENDS else ""
    return f"{norm}{frames}, {features.f_min:g}-{features.f_max:g} Hz"


def _describe_memory(memory: MemorySpec) -> str:
    place = {"context": "behind the encoder states", "prefix": "before the first token"}[memory.injection]
    told = ", ".join(map(str, memory.first_tokens))
    return (
        f"{memory.injection}: {memory.length} vectors {place}, made from {memory.span} tokens of the segment before "
        f"(first segment: {told})"
    )


def inspect_bundle(path: Path) -> Inspection:
    """Open a bundle, verify all of its files and count the operators of its graphs.

    Raises:
        BundleError: the bundle or one of its files is not what the manifest says.
    """
    bundle = open_bundle(path)
    for name in bundle.manifest.files:
        bundle.verify(name)
    operators = {entry.file: _operators(read_graph(bundle, entry)) for entry in bundle.manifest.graphs}
    return Inspection(bundle.manifest, bundle.sha256, operators)


def _operators(model: ir.Model) -> dict[str, int]:
    nodes = model.graph.all_nodes()  # those of loops and branches too
    names = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)
    return dict(names.most_common())
