"""The contract of every graph: names, types and shapes, written once.

The exporter traces against it, bundles record it, backends bind by it. A dimension is a number, or the name of
an axis that may take any size: `segments` and `rows` count sequences, `length` is the room of the self-attention
cache in positions, `written` the number of tokens before all others are fill.

What is written here is the fp32 form. In fp16 and bf16 the tensors that stay on the device between graphs (states,
vectors of memory, keys and values) have that type, see `GraphSpec.typed`; what a host reads or writes does not change.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from mt3_runtime.specs import FeatureSpec, MemorySpec, ModelSpec

DType = Literal["float32", "float16", "bfloat16", "int32"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "w8", "w4", "qdq"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
UNCALIBRATED: tuple[Precision, ...] = ("int8", "w8", "w4")  # weights of 8 or 4 bits, on the CPU
QUANTIZED: tuple[Precision, ...] = (*UNCALIBRATED, "qdq")  # and 8 bits with scales that audio was needed for
HALVES: dict[Precision, DType] = {  # what stays on the device between graphs
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", **dict.fromkeys(QUANTIZED, "float32"),
}  # fmt: skip
HOST_TENSORS = ("samples", "features", "log_prob", "logits")  # float32 in every precision
GRAPH_NAMES = ("encoder", "cross_kv", "decode_step")  # of every model
FEATURES = "features"  # of bundles for devices: on a CPU the runtime computes them itself, in float64


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named input or output."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Inputs and outputs of one graph, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs, in order."""
        return [tensor.name for tensor in self.inputs]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in order."""
        return [tensor.name for tensor in self.outputs]

    def typed(self, precision: Precision) -> GraphSpec:
        """The same graph as it is written in another precision."""

        def tensors(listed: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(
                replace(tensor, dtype=HALVES[precision])
                if tensor.dtype == "float32" and tensor.name not in HOST_TENSORS
                else tensor
                for tensor in listed
            )

        return GraphSpec(self.name, tensors(self.inputs), tensors(self.outputs))


def layer_tensors(kind: str, layers: int, shape: tuple[int | str, ...]) -> tuple[TensorSpec, ...]:
    """Keys of every layer, then values of every layer: `{kind}_key.{i}`, `{kind}_value.{i}`."""
    return tuple(
        TensorSpec(f"{kind}_{half}.{layer}", "float32", shape) for half in ("key", "value") for layer in range(layers)
    )


def features_spec(features: FeatureSpec) -> GraphSpec:
    """Segments of audio to their features, where audio and not features is to be sent to a device.

    `frames` counts the real frames of each segment; later ones become 0. In every precision it computes in float32.
    """
    samples = TensorSpec("samples", "float32", ("segments", features.segment_samples))
    shape = ("segments", features.segment_frames, features.bins)
    return GraphSpec(
        FEATURES, (samples, TensorSpec("frames", "int32", ("segments",))), (TensorSpec("features", "float32", shape),)
    )


def encoder_spec(model: ModelSpec, features: FeatureSpec) -> GraphSpec:
    """Features to the encoder states of every channel of every segment."""
    frames, bins = features.segment_frames, features.bins
    return GraphSpec(
        "encoder",
        (TensorSpec("features", "float32", ("segments", frames, bins)),),
        (TensorSpec("states", "float32", ("segments", model.channels, frames, model.d_model)),),
    )


def memory_spec(model: ModelSpec, memory: MemorySpec) -> GraphSpec:
    """Tokens of the segment before to the vectors that the decoder is told of it.

    `written` is at least `memory.length` and at most `memory.span`: the tokens from there to the span are fill, and
    cost nothing.
    """
    return GraphSpec(
        "memory",
        (TensorSpec("tokens", "int32", ("rows", "written")),),
        (TensorSpec("memory", "float32", ("rows", memory.length, model.d_model)),),
    )


def cross_kv_spec(model: ModelSpec, features: FeatureSpec) -> GraphSpec:
    """Encoder states of some rows, and vectors of memory behind them, to what every decoder layer attends to."""
    states = [TensorSpec("states", "float32", ("rows", features.segment_frames, model.d_model))]
    if model.extra_context:
        states.append(TensorSpec("memory", "float32", ("rows", model.extra_context, model.d_model)))
    return GraphSpec("cross_kv", tuple(states), layer_tensors("cross", model.decoder_layers, _cross(model, features)))


def prefix_spec(model: ModelSpec, features: FeatureSpec) -> GraphSpec:
    """Vectors before the first token to what every decoder layer keeps of them in its cache."""
    shape = ("rows", model.num_heads, model.prefix_length, model.d_kv)
    return GraphSpec(
        "prefix",
        (
            TensorSpec("memory", "float32", ("rows", model.prefix_length, model.d_model)),
            *layer_tensors("cross", model.decoder_layers, _cross(model, features)),
        ),
        layer_tensors("prefix", model.decoder_layers, shape),
    )


def _cross(model: ModelSpec, features: FeatureSpec) -> tuple[int | str, ...]:
    return ("rows", model.num_heads, features.segment_frames + model.extra_context, model.d_kv)


def decode_step_spec(model: ModelSpec, features: FeatureSpec) -> GraphSpec:
    """One token of every row, each at its own position.

    `present_*` may share memory with `self_*`: only the entry at each row's position is written. What stands behind
    a row's position may be anything up to 1e30, and does not count.
    `log_prob` is the log-probability of `next_token`, NaN when any logit of the row is not finite.
    `position` counts from the first entry of the cache: a row with a prefix has its first token behind that.
    `logits` is there for verification; a backend that does not bind it does not pay for it.
    """
    layers, heads, width = model.decoder_layers, model.num_heads, model.d_kv
    cache = ("rows", heads, "length", width)
    return GraphSpec(
        "decode_step",
        (
            TensorSpec("token", "int32", ("rows",)),
            TensorSpec("position", "int32", ("rows",)),
            *layer_tensors("cross", layers, _cross(model, features)),
            *layer_tensors("self", layers, cache),
        ),
        (
            TensorSpec("next_token", "int32", ("rows",)),
            TensorSpec("log_prob", "float32", ("rows",)),
            *layer_tensors("present", layers, cache),
            TensorSpec("logits", "float32", ("rows", model.vocab_size)),
        ),
    )


def graph_specs(model: ModelSpec, features: FeatureSpec, *, takes_audio: bool = False) -> dict[str, GraphSpec]:
    """Every graph of a model, by name, in the order of the data flow; `takes_audio`: that of the features too."""
    specs = [features_spec(features)] if takes_audio else []
    specs.append(encoder_spec(model, features))
    if model.memory:
        specs.append(memory_spec(model, model.memory))
    specs.append(cross_kv_spec(model, features))
    if model.prefix_length:
        specs.append(prefix_spec(model, features))
    specs.append(decode_step_spec(model, features))
    return {spec.name: spec for spec in specs}
