"""The command `mt3-export engines`: TensorRT engines of every graph of a bundle, into this machine's cache."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from mt3_runtime.bundle import open_bundle
from mt3_runtime.engine_cache import EngineCache
from mt3_runtime.errors import DependencyError, OptionError
from mt3_runtime.graphs import FEATURES
from mt3_runtime.trt import MODULES, import_tensorrt

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from mt3_export.engine_builder import Target
    from mt3_export.mixed_plan import MixedPlan
    from mt3_export.recipes import EnginePlan
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.engine_cache import Engine
    from mt3_runtime.trt import TrtName

THIS = "this"
ENGINES = ("fp16", "bf16", "fp32")  # their precisions


def build_engines(arguments: argparse.Namespace, say: Callable[[str], None], cache: EngineCache | None = None) -> str:
    """Build what is not in the cache yet; returns what the command prints.

    Args:
        arguments: bundle, precision, plan, backend, target, profile, recipe and json, see `mt3-export engines --help`.
        say: is told which engine is next, and which one was damaged.
        cache: where to (default: the user's).

    Raises:
        Mt3Error: whatever is missing or does not fit; engines that were finished before stay.
    """
    from mt3_export.engine_builder import TURING, build_engine, engine_key, whole_products  # noqa: PLC0415 -- onnx takes a second to import
    from mt3_export.engine_report import to_table  # noqa: PLC0415
    from mt3_export.recipes import plan_engines, recipe_for  # noqa: PLC0415

    bundle = open_bundle(arguments.bundle)
    recipe = recipe_for(bundle.manifest, arguments.recipe)
    profiles = [arguments.profile] if arguments.profile is not None else list(recipe.profiles)
    plans = [plan for profile in profiles for plan in plan_engines(bundle, recipe, arguments.precision, profile)]
    backend, trt = choose_backend(arguments.backend)
    target = choose_target(trt, backend, arguments.target)
    mixed = _mixed_plan(arguments, bundle, plans)
    cache = cache or EngineCache()
    engines: list[Engine] = []
    for plan in plans:
        if plan.spec.name == FEATURES and not whole_products(target):
            say(f"{FEATURES} is left out: {backend} has no float32 products for {TURING}, the host computes it there")
            continue
        key = engine_key(bundle, plan, target, mixed)
        say(f"{key.title} ...")
        engines.append(cache.get(key, partial(build_engine, trt, bundle, plan, target, mixed), say))
    if arguments.json:
        return json.dumps([{"title": e.entry.key.title, "origin": e.origin, **e.entry.report} for e in engines])
    warnings = sorted({text for engine in engines for text in engine.entry.report["warnings"]})
    return "\n".join([to_table(engines), *(f"TensorRT warns: {text}" for text in warnings), str(cache.folder)])


def _mixed_plan(arguments: argparse.Namespace, bundle: Bundle, plans: Iterable[EnginePlan]) -> MixedPlan | None:
    """What `--plan` names, checked against every graph before the first engine is built."""
    from mt3_export.mixed_plan import plans_by_precision, read_plan  # noqa: PLC0415
    from mt3_export.trt_graph import check_plan  # noqa: PLC0415

    if arguments.plan is None:
        return None
    mixed = read_plan(arguments.plan)
    if mixed.precision != arguments.precision:
        fix = (
            f"give --precision {mixed.precision}"
            if mixed.precision in ENGINES
            else f"give one for {arguments.precision}"
        )
        raise OptionError(f"{arguments.plan} is a plan for {mixed.precision}, not {arguments.precision}: {fix}")
    plans_by_precision([mixed], bundle.manifest.model.name, [plan.spec.name for plan in plans])
    check_plan(bundle, {plan.spec.name: plan for plan in plans}.values(), mixed)
    return mixed


def choose_backend(name: TrtName | None, find: Callable[[TrtName], Any] = import_tensorrt) -> tuple[TrtName, Any]:
    """The backend asked for, or else the first that is installed, and its module.

    Raises:
        DependencyError: it is not installed, or none is.
    """
    if name:
        return name, find(name)
    problems = []
    for backend in MODULES:
        try:
            return backend, find(backend)
        except DependencyError as error:
            problems.append(str(error).rsplit(": ", 1)[0])
    raise DependencyError(f"{' and '.join(problems)}: pip install 'mt3-runtime[tensorrt]', or [tensorrt-rtx]")


def choose_target(trt: Any, backend: TrtName, text: str) -> Target:
    """What to build for: `this`, or compute capabilities with commas.

    Raises:
        OptionError: TensorRT does not build for one of them.
        DeviceError: there is no GPU here to build for.
    """
    from mt3_export.engine_builder import Target, capabilities, check_targets  # noqa: PLC0415
    from mt3_runtime.backends.tensorrt import this_host  # noqa: PLC0415
    from mt3_runtime.errors import DeviceError  # noqa: PLC0415

    if text != THIS:
        return Target(backend, trt.__version__, check_targets(trt, backend, text.split(",")), None)
    try:
        host = this_host(backend, trt, 0)
    except DeviceError as error:
        if backend != "tensorrt-rtx":
            raise
        known = ",".join(capabilities(trt))
        raise DeviceError(f"{error}; or build for other GPUs: give --target {known} or some of these") from None
    return Target(backend, trt.__version__, (host.target,), host)
