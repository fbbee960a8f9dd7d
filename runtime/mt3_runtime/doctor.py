"""Looks over an installation: what is there, what is missing, and how to get it.

`diagnose` runs small checks, each a function from facts to findings; the `probe_` functions gather the facts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mt3_runtime.bundle import open_bundle
from mt3_runtime.devices import default_slots, encode_bytes
from mt3_runtime.doctor_gpu import check_gpus, probe_gpus
from mt3_runtime.errors import Mt3Error
from mt3_runtime.findings import LEVELS, Finding
from mt3_runtime.gpu_needs import gather
from mt3_runtime.machine import MIB, ROOT, Machine, describe_machine, package_versions
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from mt3_runtime.bundle import Bundle

T = TypeVar("T")

REQUIRED = ("numpy", "soundfile", "soxr", "pretty_midi", "mido", "tqdm")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INSTALL_CPU, INSTALL_CUDA = 'pip install "mt3-runtime[cpu]"', 'pip install "mt3-runtime[cuda]"'

# Resident memory of a process that has imported everything and loaded nothing: 38 to 51 MiB measured, doubled.
PROCESS_BYTES = 100 * MIB
# Peak growth per byte, measured with ONNX Runtime 1.31: 1.2 for weights (repacked), 1.4 for caches (activations).
HEADROOM = 1.5

# One Identity node on one float, opset 13: the smallest graph that makes a provider load its libraries.
PROBE_GRAPH = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a"
    "0a08080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)


@dataclass(frozen=True, slots=True)
class Engine:
    """What ONNX Runtime did when it was asked to run something.

    `distributions` are the installed packages that provide it, `available` the providers it was built with,
    `started` those that a graph really ran on, `failure` what was raised if the CPU is not among them.
    """

    distributions: tuple[str, ...]
    available: tuple[str, ...] = ()
    started: tuple[str, ...] = ()
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found; `exit_code` is 1 when something keeps transcription from working."""

    runtime: str
    python: str
    machine: Machine
    packages: Mapping[str, str | None]
    providers: tuple[str, ...]
    bundle: str | None
    findings: tuple[Finding, ...]
    gpu: str = "none"

    @property
    def exit_code(self) -> int:
        """0, or 1 if any finding is an error; warnings do not count."""
        return int(any(finding.level == "error" for finding in self.findings))

    def to_json(self) -> str:
        """Return the diagnosis as one JSON object, sizes in bytes."""
        return json.dumps({**asdict(self), "exit_code": self.exit_code}, indent=2)

    def to_text(self) -> str:
        """Return the report for a terminal: facts, then findings with the worst last."""
        lines = [*self._facts(), ""]
        for finding in sorted(self.findings, key=lambda finding: LEVELS.index(finding.level)):
            lines.append(f"{finding.level:<8} {finding.text}")
            lines += [f"{'':<8} fix: {finding.fix}"] if finding.fix else []
        levels = [finding.level for finding in self.findings]
        return "\n".join([*lines, "", f"errors: {levels.count('error')}, warnings: {levels.count('warning')}"])

    def _facts(self) -> list[str]:
        machine = self.machine
        installed = [f"{name} {version}" for name, version in self.packages.items() if version]
        memory = f"{_size(machine.memory_available)} available of {_size(machine.memory_total)}"
        limit = "none" if machine.memory_limit is None else _size(machine.memory_limit)
        quota = "none" if machine.cpu_quota is None else f"{machine.cpu_quota:g} cores"
        return [
            f"mt3-runtime {self.runtime}, Python {self.python}, {machine.system}",
            f"packages   {', '.join(installed)}",
            f"providers  {', '.join(self.providers) or 'none'}",
            f"processor  {machine.cpu_name} ({' '.join(machine.cpu_flags) or 'no vector extensions known'})",
            f"cores      {machine.usable_cores} usable of {machine.physical_cores}; container quota: {quota}",
            f"gpu        {self.gpu}",
            f"memory     {memory}; container limit: {limit}",
            f"bundle     {self.bundle or 'none given'}",
        ]


def diagnose(
    bundle: Path | None = None,
    *,
    start: Callable[[Path], object] | None = None,
    root: Path = ROOT,
) -> Diagnosis:
    """Look at this installation, this machine and, where one is given, a bundle.

    Args:
        bundle: folder to check.
        start: loads a bundle as transcription would; raises an Mt3Error if it does not start. None leaves it out.
        root: where /proc, /sys and /dev are found.
    """
    gather()  # loads the libraries that ONNX Runtime's provider needs below
    machine, engine, packages = describe_machine(root), probe_engine(), package_versions()
    gpus = probe_gpus(root, cuda_started=CUDA in engine.started)
    findings = [
        *check_imports(probe_imports()),
        *check_engine(engine, nvidia=gpus.is_reachable),
        *check_gpus(gpus),
        *check_extras(packages),
        *check_processor(machine),
    ]
    opened, about_bundle = check_bundle(bundle, start) if bundle else (None, [])
    findings += [*about_bundle, *check_memory(machine.memory_available, opened)]
    return Diagnosis(
        runtime=__version__,
        python=platform.python_version(),
        machine=machine,
        packages=packages,
        providers=engine.available,
        bundle=None if bundle is None else str(bundle),
        findings=tuple(findings),
        gpu=gpus.to_text(),
    )


def probe_imports(names: Iterable[str] = REQUIRED) -> dict[str, str]:
    """Import each package; return why those that failed did."""
    attempts = {name: _attempt(partial(importlib.import_module, name)) for name in names}
    return {name: why for name, (_, why) in attempts.items() if why}


def probe_engine() -> Engine:
    """Run one node on each provider that this project uses."""
    distributions = tuple(sorted(set(importlib.metadata.packages_distributions().get("onnxruntime", ()))))
    # A half-removed package can still be imported as an empty folder: asking for its providers tells.
    available, why = _attempt(lambda: tuple(importlib.import_module("onnxruntime").get_available_providers()))
    if available is None:
        return Engine(distributions, failure=why)
    wanted = [name for name in (CPU, CUDA) if name in available]
    attempts = {name: _attempt(partial(_runs_on, name)) for name in wanted}
    started = tuple(name for name, (ran, _) in attempts.items() if ran)
    return Engine(distributions, available, started, failure=attempts.get(CPU, (None, ""))[1])


def check_imports(failures: Mapping[str, str]) -> list[Finding]:
    """Report the packages that must be there."""
    if not failures:
        return [Finding("ok", f"all required packages can be imported: {', '.join(REQUIRED)}")]
    return [
        Finding("error", f"{name} cannot be imported: {why}", f"pip install --force-reinstall {name}")
        for name, why in failures.items()
    ]


def check_engine(engine: Engine, *, nvidia: bool) -> list[Finding]:
    """Report on ONNX Runtime: installed once, and working on the CPU."""
    install = INSTALL_CUDA if nvidia else INSTALL_CPU
    if not engine.distributions and not engine.started:
        return [Finding("error", "ONNX Runtime is not installed: nothing can be transcribed", install)]
    names = " and ".join(engine.distributions) or "onnxruntime of unknown origin"
    reinstall = f"pip uninstall -y {' '.join(engine.distributions) or 'onnxruntime'} && {install}"
    findings = []
    if len(engine.distributions) > 1:
        findings.append(Finding("warning", f"{names} overwrite each other's files: keep one", reinstall))
    if CPU not in engine.started:
        why = engine.failure or "it gave a wrong result for a graph of one node"
        return [*findings, Finding("error", f"{names} does not work: {why}", reinstall)]
    return [*findings, Finding("ok", f"{names} runs graphs on the CPU")]


def check_extras(packages: Mapping[str, str | None]) -> list[Finding]:
    """Report optional packages; their absence is no fault."""
    if packages.get("pillow"):
        return []
    return [Finding("ok", "pillow is not installed: no piano-roll pictures", 'pip install "mt3-runtime[picture]"')]


def check_processor(machine: Machine) -> list[Finding]:
    """Report cores that a container withholds, and a processor without vector extensions."""
    findings = []
    if machine.cpu_quota is not None and machine.cpu_quota < 1:
        text = f"the container may use {machine.cpu_quota:g} of a core: it will be stopped again and again"
        findings.append(Finding("warning", text, "raise the container's CPU limit to 1 or more"))
    else:
        cores = f"{machine.usable_cores} of {machine.physical_cores} physical cores can be used"
        findings.append(Finding("ok", cores))
    if "x86_64" in machine.system and machine.cpu_flags and "avx2" not in machine.cpu_flags:
        text = f"{machine.cpu_name} has no AVX2: expect a fraction of the usual speed"
        findings.append(Finding("warning", text, "use a processor made since 2015, or pass the host's CPU to the VM"))
    return findings


def check_bundle(path: Path, start: Callable[[Path], object] | None) -> tuple[Bundle | None, list[Finding]]:
    """Report on a bundle's manifest, files and graphs, in that order, up to the first that fails."""
    findings = []
    try:
        bundle = open_bundle(path)
        for name in bundle.manifest.files:
            bundle.verify(name)
        size = sum(record.size for record in bundle.manifest.files.values())
        text = f"bundle {path}: {bundle.manifest.model.name}, {_size(size)} on disk, every file is as listed"
        findings.append(Finding("ok", text))
        if start:
            start(path)
            findings.append(Finding("ok", f"bundle {path}: its graphs start"))
    except Mt3Error as error:
        # Every error of ours ends with ": what to do".
        what, _, fix = _one_line(error).rpartition(": ")
        return None, [*findings, Finding("error", what or fix, fix if what else "export the bundle again")]
    except Exception as error:  # noqa: BLE001 - a broken package shows first where it is used
        text = f"bundle {path} cannot be used: {_one_line(error)}"
        fix = "put right what else is reported here; if nothing is, check the path and its permissions"
        return None, [*findings, Finding("error", text, fix)]
    return bundle, findings


def check_memory(available: int | None, bundle: Bundle | None) -> list[Finding]:
    """Report whether the memory that is needed, an estimate, can be had with a quarter to spare."""
    needed = PROCESS_BYTES if bundle is None else memory_needed(bundle)
    purpose = "without a bundle" if bundle is None else f"to transcribe with {bundle.manifest.model.name}"
    text = f"about {_size(needed)} of memory is needed {purpose}, {_size(available)} is available"
    if available is None or available >= needed * 1.25:
        return [Finding("ok", text)]
    fix = "close other programs, raise the container's memory limit, or use a smaller bundle"
    return [Finding("warning" if available >= needed else "error", text, fix)]


def memory_needed(bundle: Bundle, slots: int | None = None) -> int:
    """Estimate the peak resident bytes of a transcription on the CPU: process, weights, and caches of the slots."""
    manifest, model = bundle.manifest, bundle.manifest.model
    positions = model.max_length + manifest.features.segment_frames
    cache = 2 * model.decoder_layers * model.num_heads * model.d_kv * positions * 4  # keys and values, float32
    loaded = {name for entry in manifest.graphs if entry.lowering == "ort" for name in (entry.file, entry.weights)}
    weights = sum(manifest.files[name].size for name in loaded)
    count = default_slots(manifest) if slots is None else slots
    return PROCESS_BYTES + encode_bytes(manifest) + round(HEADROOM * (weights + count * cache))


def _attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result, or why there is none."""
    try:
        return work(), ""
    except Exception as error:  # noqa: BLE001 - whatever a broken package raises is the finding
        return None, _one_line(error)


def _runs_on(provider: str) -> bool:
    """Say whether a graph really runs on `provider`: ONNX Runtime falls back to the CPU with a mere log line."""
    make = importlib.import_module("onnxruntime").InferenceSession
    session = make(PROBE_GRAPH, providers=[provider], enable_fallback=0)  # which would print, and hide why
    output = session.run(None, {"x": importlib.import_module("numpy").ones(1, "float32")})[0]
    return bool(session.get_providers()[0] == provider and output[0] == 1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / MIB:.0f} MiB" if count < 1024 * MIB else f"{count / MIB / 1024:.1f} GiB"
