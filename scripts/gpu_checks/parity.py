"""Whether a backend decodes what the CPU decodes in fp32, what spoiled caches do to it, and where its nodes run."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_checks.inputs import admit_all, clip_features, cpu_tokens, forced
from mt3_runtime.backends.gpu import SIZES, to_device_type

if TYPE_CHECKING:
    from gpu_checks.plan import Plan, Target
    from mt3_runtime.backends.device_rows import DeviceRows

# agreement of tokens where the same were read before, and difference of log-probabilities; those of half precision
# are guesses from emulated types on a CPU until they were measured on a GPU
LIMITS = {"fp32": (0.999, 1e-2), "fp16": (0.97, 0.2), "bf16": (0.9, 1.0)}
LARGE = {"fp32": 1e30, "fp16": 6e4, "bf16": 1e30}


def parity(target: Target, plan: Plan) -> dict[str, Any]:
    """Tokens of the CPU are read by the backend: how often it goes on as the CPU did; and rows decoded freely."""
    bundle, start = plan.open(), plan.open().manifest.model.start_token
    features = clip_features(bundle, plan.parity_segments)
    wanted, wanted_log_probs = cpu_tokens(bundle, features, plan.parity_tokens)
    backend = target.make(plan, slots=wanted.shape[1])
    admit_all(backend, bundle, features)
    found, log_probs = forced(backend, wanted, start)
    same = found == wanted
    error = float(np.abs(log_probs - wanted_log_probs)[same].max()) if same.any() else float("inf")
    admit_all(backend, bundle, features)
    free = in_launches(backend, plan.parity_tokens, wanted.shape[1], start)
    backend.close()
    agreement, limits = float(same.mean()), LIMITS[target.precision]
    return {
        "passed": agreement >= limits[0] and error <= limits[1] and bool(np.isfinite(log_probs).all()),
        "agreement": agreement,
        "log_prob_error": error,
        "rows_identical": int((free == wanted).all(axis=0).sum()),
        "rows": wanted.shape[1],
        "tokens": wanted.shape[0],
        "limits": {"agreement": limits[0], "log_prob_error": limits[1]},
    }


def poisoned(target: Target, plan: Plan) -> dict[str, Any]:
    """What stands in a cache where a row has written nothing must not count.

    `large`: numbers of any size, which an engine must not see behind a row's position. `stale_nan`: NaN of a row that
    failed, in a slot that is given to another one. `nan`: NaN behind the position of a live row, which never happens
    here; it says whether the engine masks or multiplies by zero.
    """
    bundle, start = plan.open(), plan.open().manifest.model.start_token
    features = clip_features(bundle, plan.parity_segments)
    rows = len(features) * bundle.manifest.model.channels
    backend, steps = target.make(plan, slots=rows), plan.parity_tokens
    admit_all(backend, bundle, features)
    wanted = in_launches(backend, steps, rows, start)
    same = {}
    for name, value, before in (
        ("large", LARGE[target.precision], False),
        ("stale_nan", np.nan, True),
        ("nan", np.nan, False),
    ):
        if before:
            spoil(backend, value)
        admit_all(backend, bundle, features)
        if not before:
            spoil(backend, value, skip=bundle.manifest.model.prefix_length)
        same[name] = bool((in_launches(backend, steps, rows, start) == wanted).all())
    backend.close()
    return {"passed": same["large"] and same["stale_nan"], **same}


def placement(target: Target, plan: Plan) -> dict[str, Any]:
    """Where every node runs: ONNX Runtime says it by provider; engines run on the GPU as a whole."""
    backend = target.make(plan, slots=1)
    graphs: Any = backend.graphs
    if hasattr(graphs, "placement"):
        nodes = graphs.placement()
        elsewhere = {name: {k: v for k, v in who.items() if k != backend.provider} for name, who in nodes.items()}
        result = {"passed": not backend.capture_problem, "nodes": nodes, "elsewhere": elsewhere}
    else:
        result = {
            "passed": True,
            "engines": [f"{name} {length or ''}".strip() for name, length in engine_names(graphs)],
        }
    backend.close()
    result["capture_problem"] = backend.capture_problem
    return {**result, "device": backend.device, "provider": backend.provider, "gpu": backend.gpu_name}


def engine_names(graphs: Any) -> list[tuple[str, int | None]]:
    return list(getattr(graphs, "engines", {}))


def in_launches(backend: DeviceRows, steps: int, rows: int, start: int) -> Any:
    """Tokens that rows decode freely, fed back on the device [steps, rows]; the next launch is made ahead."""
    backend.seed(0, np.full(rows, start, np.int32))
    starts, found = list(range(0, steps, backend.chunk)), []
    for index, first in enumerate(starts):
        backend.launch(np.full(rows, first, np.int32), min(backend.chunk, steps - first))
        if index:
            found.append(backend.collect()[0].copy())
    found.append(backend.collect()[0].copy())
    return np.concatenate(found)


def spoil(backend: DeviceRows, value: float, skip: int = 0) -> None:
    """Fill the self-attention caches behind the first `skip` positions."""
    _, own = backend.caches()
    layers, slots, heads, length, width = own.shape
    count = (length - skip) * width
    stage = backend.gpu.pinned(count * SIZES[own.dtype])
    stage[:] = to_device_type(np.full(count, value, np.float32), own.dtype).view(np.uint8)
    offset = skip * width * SIZES[own.dtype]
    for layer, head in product(range(layers), range(slots * heads)):
        backend.gpu.upload(own.address + layer * own.layer + head * own.stretch + offset, stage)
    backend.synchronize()
