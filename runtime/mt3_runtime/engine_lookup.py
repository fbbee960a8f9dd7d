"""Which engines of the cache may run here: those built for this bundle, this TensorRT and this GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_runtime.engine_key import FLAGS
from mt3_runtime.errors import DeviceError
from mt3_runtime.graphs import FEATURES
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from mt3_runtime.bundle import Bundle
    from mt3_runtime.engine_cache import EngineCache, Entry
    from mt3_runtime.engine_key import EngineKey
    from mt3_runtime.graphs import Precision
    from mt3_runtime.trt import TrtName


@dataclass(frozen=True, slots=True)
class Host:
    """What an engine must have been built for. `target` is the GPU's compute capability, spelt sm_89."""

    backend: TrtName
    backend_version: str
    target: str
    gpu: str
    cuda: str
    driver: str


def find_engines(
    cache: EngineCache,
    bundle: Bundle,
    host: Host,
    precision: Precision,
    *,
    rows: int = 1,
    profile: str | None = None,
) -> dict[str, tuple[Entry, ...]]:
    """The engines of every graph of a bundle, those of a graph by rising cache length; of the features where it is.

    Args:
        cache: where they are.
        bundle: what they were built from.
        host: what they must run on.
        precision: of their inputs and outputs.
        rows: how many rows each must take.
        profile: of all of them; None: that of the fewest rows that are enough.

    Raises:
        DeviceError: no profile has an engine for every graph; the message says what differs.
    """
    entries = cache.entries()
    fitting = [entry for entry in entries if _difference(entry.key, bundle, host, precision) is None]
    graphs = [spec.name for spec in bundle.manifest.contracts if spec.name != FEATURES]
    choices = []
    for name in {entry.key.profile for entry in fitting if profile in {None, entry.key.profile}}:
        chosen = {graph: _of_graph(fitting, graph, name, rows) for graph in graphs}
        audio = _of_graph(fitting, FEATURES, name, rows)
        if all(chosen.values()) and (chosen["decode_step"][-1].key.length or 0) >= bundle.manifest.model.positions:
            most = min(
                entry.key.axes["rows"][2] for found in chosen.values() for entry in found if "rows" in entry.key.axes
            )
            choices.append((most, name, {FEATURES: audio, **chosen} if audio else chosen))
    if not choices:
        raise DeviceError(_explain(entries, bundle, host, precision, rows, profile))
    return min(choices, key=lambda choice: choice[:2])[2]


def _of_graph(fitting: list[Entry], graph: str, profile: str, rows: int) -> tuple[Entry, ...]:
    """One engine for every cache length, the newest."""
    found: dict[int, Entry] = {}
    for entry in sorted(fitting, key=lambda entry: entry.built):
        key = entry.key
        if (key.graph, key.profile) == (graph, profile) and key.axes.get("rows", (1, 1, rows))[2] >= rows:
            found[key.length or 0] = entry
    return tuple(found[length] for length in sorted(found))


def _difference(key: EngineKey, bundle: Bundle, host: Host, precision: Precision) -> str | None:
    """What of an engine does not fit, in words; None if it may run. What it was built from comes first."""
    files = bundle.manifest.files
    made_from = {
        (files[entry.file].sha256, files[entry.weights].sha256)
        for entry in bundle.manifest.graphs
        if (entry.graph, entry.lowering, entry.precision) == (key.graph, "tensorrt", key.computed)
    }
    if (key.graph_sha256, key.weights_sha256) not in made_from:
        return "another bundle"
    if key.version != __version__ or not set(FLAGS) <= set(key.flags):
        return f"another version of this package ({key.version})"
    if key.precision != precision:
        return f"precision {key.precision}"
    if (key.backend, key.backend_version) != (host.backend, host.backend_version):
        return f"{key.backend} {key.backend_version}"
    if host.target not in key.targets:
        return f"{', '.join(key.targets)}"
    if key.gpu and (key.gpu, key.cuda, key.driver) != (host.gpu, host.cuda, host.driver):
        return f"{key.gpu} with CUDA {key.cuda} and driver {key.driver}"
    return None


def _explain(
    entries: list[Entry], bundle: Bundle, host: Host, precision: Precision, rows: int, profile: str | None
) -> str:
    differences = [_difference(entry.key, bundle, host, precision) for entry in entries]
    other = sorted({text for text in differences if text not in {None, "another bundle"}})
    wanted = f"{host.backend} {host.backend_version}, {precision}, {host.target}, {rows} rows"
    wanted += f", profile {profile}" if profile else ""
    if None in differences:
        problem = "some graphs of that are missing"
    elif other:
        problem = f"there are engines for {'; '.join(str(text) for text in other)}"
    else:
        problem = "there are no engines of this bundle"
    fitting = [entry.key for entry, text in zip(entries, differences, strict=True) if text is None]
    most = max((key.axes["rows"][2] for key in fitting if "rows" in key.axes), default=rows)
    if most < rows:
        return f"the engines of {bundle.path} take at most {most} rows, not {rows}: use --slots {most} or fewer"
    command = f"mt3-export engines {bundle.path} --backend {host.backend} --precision {precision} --target this"
    return f"no engines of {bundle.path} for {wanted} ({problem}): run {command}"
