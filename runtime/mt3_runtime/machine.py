"""What this machine lets us use: cores, memory, CPU features, package versions.

Everything is read from /proc and /sys below a `root` that tests replace; what cannot be read is None.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

ROOT = Path("/")
SPIN = "MT3_SPIN"  # of the environment
MIB = 1 << 20
UNIFIED = ""  # the name /proc/self/cgroup gives to version 2's one tree; version 1 has a tree per controller

# What decides the speed of fp32 and int8 matrix products, spelt as in /proc/cpuinfo: x86, then Arm.
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip

PACKAGES = (
    "numpy", "soundfile", "soxr", "pretty_midi", "mido", "tqdm", "pillow", "onnxruntime", "onnxruntime-gpu",
    "tensorrt", "tensorrt-rtx", "cuda-bindings",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """One process's share of the machine.

    Memory in bytes. `cpu_quota` (in cores) and `memory_limit` are what control groups allow, None without a
    limit; `memory_available` is also bounded by what the control group has left.
    """

    system: str
    cpu_name: str
    cpu_flags: tuple[str, ...]
    allowed_cpus: int
    physical_cores: int
    cpu_quota: float | None
    usable_cores: int
    memory_total: int | None
    memory_available: int | None
    memory_limit: int | None


def describe_machine(root: Path = ROOT) -> Machine:
    """Read everything once."""
    cpus = allowed_cpus()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu_name=cpu_name(root),
        cpu_flags=cpu_flags(root),
        allowed_cpus=len(cpus),
        physical_cores=physical_cores(cpus, root),
        cpu_quota=cpu_quota(root),
        usable_cores=usable_cores(root, cpus),
        memory_total=total_memory(root),
        memory_available=available_memory(root),
        memory_limit=memory_limit(root),
    )


def usable_cores(root: Path = ROOT, cpus: Collection[int] | None = None) -> int:
    """Count the physical cores that this process may keep busy, at least 1.

    Args:
        root: where /proc and /sys are found.
        cpus: logical CPUs it may run on; None asks the scheduler (affinity, cpusets).

    Returns:
        Physical cores among `cpus`, no more than the control group's CPU quota, a half rounded up: of a quota of 1.5
        two threads make more than one.
    """
    cores = physical_cores(allowed_cpus() if cpus is None else cpus, root)
    quota = cpu_quota(root)
    # Measured with a quota of 1.5: two threads that sleep while they wait do more than one, though they are stopped.
    return cores if quota is None else max(1, min(cores, int(quota + 0.5)))


def default_threads(root: Path = ROOT) -> int:
    """Return the intra-op threads to start when nobody asked for a number: one per usable physical core."""
    return usable_cores(root)


def asked_to_spin() -> bool | None:
    """Return what `MT3_SPIN` asks for; None if it is not set.

    Raises:
        OptionError: it is neither 0 nor 1.
    """
    asked = os.environ.get(SPIN, "")
    if asked not in ("", "0", "1"):
        raise OptionError(f"{SPIN} is {asked!r:.40}: set it to 0 or 1, or not at all")
    return asked == "1" if asked else None


def may_spin(threads: int, root: Path = ROOT) -> bool:
    """Say whether so many threads may wait for work awake: whether each has a core for itself.

    A thread that spins uses up the control group's quota while it does nothing, and then all are stopped until the
    next period; where two threads share a core, it keeps the other one from working. Nothing here tells that other
    processes want the cores: `MT3_SPIN=0` does, and `MT3_SPIN=1` overrules what was found.

    Raises:
        OptionError: `MT3_SPIN` is something else.
    """
    asked = asked_to_spin()
    if asked is not None:
        return asked
    quota = cpu_quota(root)
    return threads <= physical_cores(allowed_cpus(), root) and (quota is None or threads <= quota)


def allowed_cpus() -> frozenset[int]:
    """Return the logical CPUs that the scheduler may put this process on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return frozenset(affinity(0) if affinity else range(os.cpu_count() or 1))


def physical_cores(cpus: Collection[int], root: Path = ROOT) -> int:
    """Count the cores behind logical CPUs; a CPU whose siblings are unknown counts as a core of its own."""
    topology = root / "sys/devices/system/cpu"
    # thread_siblings_list is the name before Linux 5.6.
    siblings = {
        _text(topology / f"cpu{cpu}/topology/core_cpus_list")
        or _text(topology / f"cpu{cpu}/topology/thread_siblings_list")
        or f"cpu{cpu}"
        for cpu in cpus
    }
    return max(1, len(siblings))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the CPU time per second that control groups grant, in cores; None without a limit."""
    new = (_text(group / "cpu.max") for group in _groups(root, UNIFIED))
    old = (
        f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}" for group in _groups(root, "cpu")
    )
    return min(filter(None, map(_quota, (*new, *old))), default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the bytes that control groups allow; None without a limit below the machine's own memory."""
    limit = min((limit for limit, _ in _memory_groups(root)), default=None)
    total = total_memory(root)
    # Version 1 writes "no limit" as a number close to 2^63.
    return None if limit is None or (total is not None and limit >= total) else limit


def total_memory(root: Path = ROOT) -> int | None:
    """Return the bytes of memory in the machine."""
    return _kibibytes(root / "proc/meminfo", "MemTotal")


def available_memory(root: Path = ROOT) -> int | None:
    """Return the bytes that can be had without swapping or being killed by a control group."""
    free = [max(0, limit - used) for limit, used in _memory_groups(root)]
    available = _kibibytes(root / "proc/meminfo", "MemAvailable")
    return min([*free, available] if available is not None else free, default=None)


def peak_rss_mb(root: Path = ROOT) -> float:
    """Return the most resident memory that this process has ever had, in MiB.

    /proc first: `getrusage` starts from the parent's peak when a large process has started this one.
    """
    peak = _kibibytes(root / "proc/self/status", "VmHWM")
    if peak is not None:
        return peak / MIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def cpu_name(root: Path = ROOT) -> str:
    """Return the processor's own name, or its architecture where it has none."""
    return _field(root / "proc/cpuinfo", "model name") or platform.machine() or "unknown"


def cpu_flags(root: Path = ROOT) -> tuple[str, ...]:
    """Return those of `CPU_FLAGS` that the processor has."""
    cpuinfo = root / "proc/cpuinfo"
    present = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split())
    return tuple(flag for flag in CPU_FLAGS if flag in present)


def package_versions(names: Collection[str] = PACKAGES) -> dict[str, str | None]:
    """Return the installed version of each distribution, None where it is absent."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    from importlib import metadata  # noqa: PLC0415 -- slow to import, and no transcription needs it

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield this process's control groups in one tree, outermost first."""
    path = _group_path(root, controller)
    mount = _group_mount(root, controller)
    if path is None or mount is None:
        return
    base, group = mount
    yield group
    base = base.rstrip("/")
    # A container may be told the host's path while it sees only its own mount: then the mount is its group.
    inside = path.removeprefix(base) if f"{path}/".startswith(f"{base}/") else ""
    for name in filter(None, inside.split("/")):
        group /= name
        yield group


def _group_path(root: Path, controller: str) -> str | None:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            return path
    return None


def _group_mount(root: Path, controller: str) -> tuple[str, Path] | None:
    """Find the mounted hierarchy: the path it shows and where (see proc_pid_mountinfo(5))."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        kinds = {"cgroup2": {UNIFIED}, "cgroup": set(kind[2].split(","))}
        if controller in kinds.get(kind[0], set()):
            return fields[3], root / fields[4].lstrip("/")
    return None


def _quota(text: str) -> float | None:
    """Parse "MICROSECONDS PERIOD" into cores; "max" (version 2), -1 (version 1) and nonsense are no limit."""
    first, _, second = text.partition(" ")
    microseconds, period = _integer(first), _integer(second)
    if microseconds is None or period is None or microseconds <= 0 or period <= 0:
        return None
    return microseconds / period


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, used) in bytes of every group with a limit; file cache that can be dropped is free."""
    for controller, limit_name, used_name, cache_name in (
        (UNIFIED, "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in _groups(root, controller):
            limit = _number(group / limit_name)
            if limit is not None:
                cache = _integer(_field(group / "memory.stat", cache_name, separator=" ") or "")
                yield limit, max(0, (_number(group / used_name) or 0) - (cache or 0))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    return _integer(_text(path))


def _integer(text: str) -> int | None:
    return int(text) if text.removeprefix("-").isdecimal() else None


def _field(path: Path, name: str, separator: str = ":") -> str | None:
    """Return the value of the first line "name<separator>value"."""
    for line in _text(path).splitlines():
        key, found, value = line.partition(separator)
        if found and key.strip() == name:
            return value.strip()
    return None


def _kibibytes(path: Path, name: str) -> int | None:
    """Return a "name: 12 kB" line's value in bytes."""
    value = _integer((_field(path, name) or "").removesuffix("kB").strip())
    return None if value is None else value * 1024
