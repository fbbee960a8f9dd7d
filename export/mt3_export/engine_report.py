"""What there is to say of an engine: layers, types, sizes, time."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from mt3_export.trt_network import count_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_export.recipes import EnginePlan
    from mt3_export.trt_graph import ReadyGraph
    from mt3_export.trt_network import Parsed
    from mt3_runtime.engine_cache import Engine

MOST_WARNINGS = 50
KERNELS = 16 << 20  # bytes of a plan that are not weights, at most
COLUMNS = ("engine", "products", "layers", "compared", "weights", "plan", "activations", "seconds", "from")


def make_report(
    trt: Any,
    logger: Any,
    plan: EnginePlan,
    graph: ReadyGraph,
    parsed: Parsed,
    engine: bytes,
    seconds: float,
    *,
    at_hand: bool,
) -> dict[str, Any]:
    """A report as plain data: sizes in bytes.

    `layers` are those of the network that was built from, `products` those of the graph; `kernels` what TensorRT made
    of them, which it tells only where the engine can be loaded, as is `activation_bytes`: None elsewhere.
    """
    weights = weights_bytes(parsed)
    loaded = _loaded(trt, logger, engine) if at_hand else {"kernels": None, "activation_bytes": None}
    return {
        "profile": plan.profile,
        "axes": {axis: list(sizes) for axis, sizes in plan.axes.items()},
        "layers": count_layers(parsed.layers),
        "products": dict(graph.products),
        "compared_tensors": parsed.compared,
        "operators": dict(graph.operators),
        "weights_bytes": weights,
        "plan_bytes": len(engine),
        **loaded,
        "build_seconds": round(seconds, 3),
        "warnings": _warnings(logger, weights, len(engine)),
    }


def weights_bytes(parsed: Parsed) -> int:
    """Bytes of the constants of a network."""
    network, total = parsed.network, 0
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type.name == "CONSTANT":
            tensor = layer.get_output(0)
            count = 1
            for size in tensor.shape:
                count *= size
            total += count * tensor.dtype.itemsize
    return total


def to_table(engines: Sequence[Engine]) -> str:
    """The reports of engines, a line each."""
    rows = [COLUMNS, *map(_cells, engines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cells(engine: Engine) -> tuple[str, ...]:
    report = engine.entry.report
    products = " ".join(f"{count} {dtype}" for dtype, count in report["products"].items())
    activations = report["activation_bytes"]
    return (
        engine.entry.key.title,
        products,
        str(sum(report["layers"].values())),
        str(report["compared_tensors"]),
        _mib(report["weights_bytes"]),
        _mib(report["plan_bytes"]),
        "unknown" if activations is None else _mib(activations),
        f"{report['build_seconds']:.1f}",
        engine.origin,
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _warnings(logger: Any, weights: int, plan: int) -> list[str]:
    texts = {text[:300] for kind, text in logger.problems if kind == "warning"}
    if plan > 1.6 * weights + KERNELS:
        texts.add(f"the plan takes {_mib(plan)}, the weights {_mib(weights)}: TensorRT holds some in a wider type")
    listed = sorted(texts)
    more = [f"and {len(listed) - MOST_WARNINGS} more warnings"] if len(listed) > MOST_WARNINGS else []
    return [*listed[:MOST_WARNINGS], *more]  # a description in the cache has a largest size


def _loaded(trt: Any, logger: Any, plan: bytes) -> dict[str, Any]:  # pragma: no cover -- needs a GPU
    """What only a loaded engine tells; API: `ICudaEngine`, `EngineInspector` of TensorRT's Python reference."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return {"kernels": None, "activation_bytes": None}
    size = getattr(engine, "device_memory_size_v2", None)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    kernels = Counter(_kernel(layer) for layer in layers)
    return {
        "kernels": dict(sorted(kernels.items())),
        "activation_bytes": engine.device_memory_size if size is None else size,
    }


def _kernel(layer: Any) -> str:  # pragma: no cover -- needs a GPU
    if not isinstance(layer, dict):
        return "unnamed"
    outputs = layer.get("Outputs") or [{}]
    return f"{layer.get('LayerType', 'unnamed')} {outputs[0].get('Format/Datatype', '-')}"
