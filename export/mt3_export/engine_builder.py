"""Builds TensorRT engines from a bundle's graphs: one code path for TensorRT 10 and 11 and for TensorRT-RTX."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mt3_export.engine_report import make_report
from mt3_export.trt_graph import ready_graph
from mt3_export.trt_network import one_line, parse
from mt3_runtime.engine_cache import Built
from mt3_runtime.engine_key import FLAGS, EngineKey
from mt3_runtime.errors import BundleError, DeviceError, OptionError
from mt3_runtime.graphs import FEATURES
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt3_export.mixed_plan import MixedPlan
    from mt3_export.recipes import EnginePlan
    from mt3_export.trt_network import Parsed
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.engine_lookup import Host
    from mt3_runtime.trt import TrtName

TURING = "sm_75"  # whose engines TensorRT-RTX builds without float32 products


@dataclass(frozen=True, slots=True)
class Target:
    """What engines are built for: the GPU at hand (`host`), or compute capabilities spelt sm_89."""

    backend: TrtName
    version: str
    targets: tuple[str, ...]
    host: Host | None


def capabilities(trt: Any) -> list[str]:
    """Targets that this TensorRT builds for without such a GPU; none but for TensorRT-RTX."""
    names = getattr(trt, "ComputeCapability", None)
    members = () if names is None else names.__members__
    return sorted((f"sm_{name[2:]}" for name in members if name.startswith("SM")), key=lambda name: int(name[3:]))


def check_targets(trt: Any, backend: TrtName, wanted: Sequence[str]) -> tuple[str, ...]:
    """The targets, without repetition.

    Raises:
        OptionError: TensorRT does not build for one of them from afar.
    """
    known = capabilities(trt) if backend == "tensorrt-rtx" else []
    if not known:
        raise OptionError("TensorRT builds for the GPU at hand only: give --target this, or --backend tensorrt-rtx")
    for target in wanted:
        if target not in known:
            raise OptionError(f"TensorRT-RTX has no target {target!r:.40}: use {', '.join(known)}, or --target this")
    return tuple(dict.fromkeys(wanted))


def engine_key(bundle: Bundle, plan: EnginePlan, target: Target, mixed: MixedPlan | None = None) -> EngineKey:
    """What the engine of a plan depends on; `mixed` says which products of it stay in float32."""
    files, host = bundle.manifest.files, target.host
    sums = () if whole_products(target) else ("products as sums",)
    kept = (f"plan {mixed.label}",) if mixed and plan.spec.name != FEATURES else ()
    return EngineKey(
        graph=plan.spec.name,
        graph_sha256=files[plan.file.file].sha256,
        weights_sha256=files[plan.file.weights].sha256,
        precision=plan.precision,
        computed=plan.file.precision,
        profile=plan.profile,
        axes=dict(plan.axes),
        backend=target.backend,
        backend_version=target.version,
        targets=target.targets,
        gpu=host.gpu if host else "",
        cuda=host.cuda if host else "",
        driver=host.driver if host else "",
        flags=(*FLAGS, *sums, *kept),
        version=__version__,
    )


def build_engine(trt: Any, bundle: Bundle, plan: EnginePlan, target: Target, mixed: MixedPlan | None = None) -> Built:
    """Parse, check and build one engine, with a report.

    Args:
        trt: the module of TensorRT or TensorRT-RTX.
        bundle: holds the graph.
        plan: which graph, and its sizes.
        target: what to build for.
        mixed: which products stay in float32.

    Raises:
        BundleError: the graph cannot be parsed, or its types were changed.
        DeviceError: TensorRT cannot build it for the target.
    """
    start = time.perf_counter()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    if builder is None:  # pragma: no cover -- TensorRT without a GPU
        raise DeviceError(f"TensorRT cannot start ({_problems(logger)}): run mt3-run doctor")
    graph = ready_graph(bundle, plan, sums=not whole_products(target), mixed=mixed)
    parsed = parse(trt, builder, logger, graph)
    config = builder.create_builder_config()
    _configure(trt, config, target)
    config.add_optimization_profile(_profile(builder, parsed, plan))
    data = builder.build_serialized_network(parsed.network, config)
    if data is None:
        raise _failure(logger, plan, target)
    seconds = time.perf_counter() - start
    with memoryview(data) as view:
        plan_bytes = bytes(view)
    return Built(
        plan_bytes, make_report(trt, logger, plan, graph, parsed, plan_bytes, seconds, at_hand=bool(target.host))
    )


def whole_products(target: Target) -> bool:
    """Whether TensorRT multiplies matrices in float32 for all of the target."""
    return target.backend != "tensorrt-rtx" or TURING not in target.targets


def make_logger(trt: Any) -> Any:
    """A logger that prints nothing and keeps warnings and errors in `problems`, as (kind, text)."""
    problems: list[tuple[str, str]] = []

    def log(_: Any, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            problems.append(("error", message))
        elif severity == trt.ILogger.WARNING:
            problems.append(("warning", message))

    logger = type("Logger", (trt.ILogger,), {"log": log})()
    logger.problems = problems
    return logger


def _configure(trt: Any, config: Any, target: Target) -> None:
    tf32 = getattr(trt.BuilderFlag, "TF32", None)
    if tf32 is not None:
        config.clear_flag(tf32)
    config.max_aux_streams = 0
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if target.backend == "tensorrt-rtx":
        names = ["CURRENT"] if target.host else [f"SM{name[3:]}" for name in target.targets]
        config.num_compute_capabilities = len(names)
        for place, name in enumerate(names):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), place):
                raise DeviceError(f"TensorRT-RTX refuses {name} here: give other targets")


def _profile(builder: Any, parsed: Parsed, plan: EnginePlan) -> Any:
    sizes: dict[str, tuple[int, int, int]] = {str(axis): given for axis, given in plan.axes.items()}
    profile = builder.create_optimization_profile()
    for tensor in plan.spec.inputs:
        shapes = [
            tuple(sizes[size][place] if isinstance(size, str) else size for size in tensor.shape) for place in range(3)
        ]
        profile.set_shape(tensor.name, *shapes)
    if not profile or parsed.network.num_inputs != len(plan.spec.inputs):
        raise BundleError(f"the sizes of {plan.profile} do not fit {plan.spec.name}: correct the recipe")
    return profile


def _problems(logger: Any) -> str:
    errors = [text for kind, text in logger.problems if kind == "error"]
    return one_line(errors[-1] if errors else "it gives no reason")


def _failure(logger: Any, plan: EnginePlan, target: Target) -> DeviceError:
    problem = _problems(logger)
    fix = "try another precision or target"
    if "sm75" in problem.lower():
        fix = "leave sm_75 out, or ask for fp16"
    elif "cudaError" in problem:
        fix = "run mt3-run doctor"
    where = f"{target.backend} {target.version}"
    return DeviceError(
        f"{where} cannot build {plan.spec.name} in {plan.precision} for {', '.join(target.targets)} ({problem}): {fix}"
    )
