"""The backend on TensorRT or TensorRT-RTX: engines that `mt3-export engines` built for this very machine."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from mt3_runtime.backends.device_rows import DeviceOptions, DeviceRows, bucket_of, give_back
from mt3_runtime.backends.gpu_memory import CudaGpu
from mt3_runtime.backends.tensorrt_graphs import TrtGraphs, load_engine
from mt3_runtime.engine_cache import EngineCache
from mt3_runtime.engine_lookup import Host, find_engines
from mt3_runtime.errors import DeviceError, OutputError
from mt3_runtime.gpu_probe import probe_driver
from mt3_runtime.trt import import_tensorrt

if TYPE_CHECKING:
    from mt3_runtime.backends.tensorrt_graphs import Engine, EngineName
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.engine_cache import Entry
    from mt3_runtime.graphs import Precision
    from mt3_runtime.trt import TrtName

NAMES: dict[str, TrtName] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
CHUNK = 16  # steps
RUNTIME_CACHE = "runtime cache of {gpu}"


class TensorRTBackend(DeviceRows):
    """Runs the engines of a bundle on an NVIDIA GPU.

    Raises:
        BundleError: an engine is damaged, or is not one of this bundle's graphs.
        DependencyError: TensorRT or cuda-bindings is not installed.
        DeviceError: the GPU or its driver is missing, or there are no engines for it.
        OutOfMemoryError: fewer slots may fit.
        OptionError: see `DeviceRows`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        module: Literal["tensorrt", "tensorrt_rtx"] = "tensorrt",
        device_index: int = 0,
        slots: int = 8,
        length: int | None = None,
        precision: Precision = "fp16",
        profile: str | None = None,
        chunk: int = CHUNK,
        capture: bool = True,
        cache: EngineCache | None = None,
    ) -> None:
        name = NAMES[module]
        trt = import_tensorrt(name)
        self._cache = cache or EngineCache()
        host = this_host(name, trt, device_index)
        found = find_engines(self._cache, bundle, host, precision, rows=bucket_of(max(slots, 1)), profile=profile)
        gpu = CudaGpu(device_index)
        graphs: TrtGraphs | None = None
        try:
            gpu.use()
            self._entries, engines = self._load(trt, bundle, found, precision, host)
            self._gpu_key = RUNTIME_CACHE.format(gpu=host.gpu)
            graphs = TrtGraphs(trt, gpu, engines)
            options = DeviceOptions(slots, length, precision, chunk, capture)
            device, provider = f"{name}:{device_index}", f"{name} {trt.__version__}"
            super().__init__(bundle.manifest, gpu, graphs, options, device=device, provider=provider)
            # made after that of `DeviceRows`, and so called before it
            self._saver = weakref.finalize(self, _save, self._cache, self._gpu_key, self._entries, graphs)
        except BaseException:
            give_back(gpu, graphs)
            raise

    def _load(
        self, trt: Any, bundle: Bundle, found: dict[str, tuple[Entry, ...]], precision: Precision, host: Host
    ) -> tuple[dict[EngineName, Entry], dict[EngineName, Engine]]:
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # must outlive its engines
        contracts = {spec.name: spec.typed(precision) for spec in bundle.manifest.contracts}
        kept = RUNTIME_CACHE.format(gpu=host.gpu)
        entries = {(graph, entry.key.length): entry for graph, listed in found.items() for entry in listed}
        engines, compiled = {}, self._cache.extra
        for name, entry in entries.items():
            plan = self._cache.load(entry.key).plan
            engines[name] = load_engine(trt, self._runtime, plan, contracts[name[0]], compiled(entry.key, kept))
        return entries, engines

    def close(self) -> None:
        """See `DeviceRows.close`; what was compiled is kept."""
        self._saver()
        super().close()


def _save(cache: EngineCache, name: str, entries: dict[EngineName, Entry], graphs: TrtGraphs) -> None:
    """Keep what TensorRT-RTX compiled for this GPU beside its engines, for the next process."""
    for engine_name, engine in graphs.engines.items():
        if engine.runtime_cache is None:
            continue
        with suppress(OutputError), memoryview(engine.runtime_cache.serialize()) as content:
            cache.keep_extra(entries[engine_name].key, name, bytes(content))


def this_host(name: TrtName, trt: Any, index: int) -> Host:
    """What an engine must have been built for to run on GPU `index` of this machine.

    Raises:
        DeviceError: there is no such GPU.
    """
    driver = probe_driver()
    if driver.problem:
        raise DeviceError(f"{driver.problem}: install NVIDIA's driver, see mt3-run doctor")
    if not 0 <= index < len(driver.gpus):
        raise DeviceError(f"there is no GPU {index}, only {len(driver.gpus)}: name one of those")
    gpu = driver.gpus[index]
    cuda = ".".join(map(str, driver.cuda))
    return Host(name, trt.__version__, f"sm_{gpu.sm}", gpu.name, cuda, driver.version)
