"""Cores and memory on made-up /proc and /sys trees, and the real ones where another source can be asked."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mt3_runtime.errors import OptionError
from mt3_runtime.machine import (
    available_memory,
    cpu_flags,
    cpu_name,
    cpu_quota,
    default_threads,
    describe_machine,
    may_spin,
    memory_limit,
    package_versions,
    peak_rss_mb,
    physical_cores,
    total_memory,
    usable_cores,
)

CGROUP2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"
CGROUP1 = (
    "31 23 0:28 {base} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:29 {base} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1000000 kB\nMemAvailable:    8388608 kB\n"
GIB = 1 << 30


@pytest.fixture
def tree(tmp_path):
    """Write files below a fake root, with 16 GiB of memory unless told otherwise."""

    def write(files):
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def topology(siblings, name="core_cpus_list"):
    """Files of a processor whose core i has the logical CPUs siblings[i]."""
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/{name}": ",".join(map(str, core)) + "\n"
        for core in siblings
        for cpu in core
    }


def version2(path, files):
    return {
        "proc/self/mountinfo": "24 1 0:22 / /proc rw - proc proc rw\n" + CGROUP2,
        "proc/self/cgroup": f"0::{path}\n",
        **{f"sys/fs/cgroup{name}": text for name, text in files.items()},
    }


def version1(path, files, base="/"):
    return {
        "proc/self/mountinfo": CGROUP1.format(base=base),
        "proc/self/cgroup": f"5:memory:{path}\n4:cpu,cpuacct:{path}\n3:cpuset:{path}\n",
        **{f"sys/fs/cgroup{name}": text for name, text in files.items()},
    }


EIGHT = topology([(core, core + 8) for core in range(8)])


@pytest.mark.parametrize(
    ("cpus", "cores"),
    [((0,), 1), ((0, 8), 1), ((0, 1), 2), ((0, 1, 8, 9), 2), (range(16), 8), ((3, 12, 5), 3)],
)
@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_hyperthreads_share_a_core(tree, cpus, cores, name):
    root = tree(topology([(core, core + 8) for core in range(8)], name))
    assert physical_cores(cpus, root) == cores
    assert usable_cores(root, cpus) == cores


def test_without_topology_every_cpu_is_a_core(tree):
    assert usable_cores(tree({}), range(6)) == 6


@pytest.mark.parametrize(
    ("text", "quota", "cores"),
    [
        ("max 100000\n", None, 8),
        ("50000 100000\n", 0.5, 1),
        ("100000 100000\n", 1.0, 1),
        ("149000 100000\n", 1.49, 1),
        ("250000 100000\n", 2.5, 3),
        ("20000 10000\n", 2.0, 2),
        ("6400000 100000\n", 64.0, 8),
    ],
)
def test_quota_of_version_2(tree, text, quota, cores):
    root = tree({**EIGHT, **version2("/", {"/cpu.max": text})})
    assert cpu_quota(root) == quota
    assert usable_cores(root, range(16)) == cores
    assert usable_cores(root, (0, 8)) == 1


def test_the_tightest_group_on_the_way_down_counts(tree):
    groups = {
        "/pod/cpu.max": "150000 100000",
        "/pod/box/cpu.max": "max 100000",
        "/pod/memory.max": f"{2 * GIB}",
        "/pod/memory.current": f"{GIB}",
        "/pod/box/memory.max": f"{3 * GIB}",
        "/other/cpu.max": "1000 100000",
    }
    root = tree(version2("/pod/box", groups))
    assert cpu_quota(root) == 1.5
    assert memory_limit(root) == 2 * GIB
    assert available_memory(root) == GIB


@pytest.mark.parametrize(("microseconds", "quota", "cores"), [("-1", None, 8), ("50000", 0.5, 1), ("400000", 4.0, 4)])
@pytest.mark.parametrize("seen_from", ["host", "container"])
def test_quota_of_version_1(tree, microseconds, quota, cores, seen_from):
    """Seen from the host the group is a folder of the mount; seen from a container the mount is the group."""
    path = "/docker/4c01db0b"
    folder = "/cpu,cpuacct" + (path if seen_from == "host" else "")
    files = {f"{folder}/cpu.cfs_quota_us": microseconds, f"{folder}/cpu.cfs_period_us": "100000"}
    root = tree({**EIGHT, **version1(path, files, base="/" if seen_from == "host" else path)})
    assert cpu_quota(root) == quota
    assert usable_cores(root, range(16)) == cores


def test_a_path_outside_the_mount_falls_back_to_the_mount(tree):
    files = version1("/system.slice/ssh", {"/cpu,cpuacct/cpu.cfs_quota_us": "200000"}, base="/docker/4c01")
    files["sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us"] = "100000"
    assert cpu_quota(tree(files)) == 2.0


@pytest.mark.parametrize(
    ("quota", "threads", "spins"),
    [("max", 8, True), ("max", 9, False), ("800000", 8, True), ("200000", 2, True), ("150000", 2, False),
     ("150000", 1, True), ("50000", 1, False)],
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2])
def test_threads_spin_where_each_has_a_core_of_its_own(tree, monkeypatch, version, quota, threads, spins):
    monkeypatch.delenv("MT3_SPIN", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    files = {"/cpu,cpuacct/cpu.cfs_quota_us": quota.replace("max", "-1"), "/cpu,cpuacct/cpu.cfs_period_us": "100000"}
    group = version1("/", files) if version == 1 else version2("/", {"/cpu.max": f"{quota} 100000\n"})
    assert may_spin(threads, tree({**EIGHT, **group})) == spins


@pytest.mark.parametrize(("asked", "spins"), [("", False), ("0", False), ("1", True)])
def test_the_environment_has_the_last_word_on_spinning(tree, monkeypatch, asked, spins):
    monkeypatch.setenv("MT3_SPIN", asked)
    root = tree({**EIGHT, **version2("/", {"/cpu.max": "150000 100000\n"})})
    assert may_spin(2, root) == spins
    assert may_spin(1, tree(version2("/", {"/cpu.max": "max 100000\n"}))) == (asked != "0")


def test_an_environment_that_makes_no_sense_is_an_error(monkeypatch):
    monkeypatch.setenv("MT3_SPIN", "yes")
    with pytest.raises(OptionError, match=r"^MT3_SPIN is 'yes': set it to 0 or 1, or not at all$"):
        may_spin(1)


def test_two_threads_of_one_core_do_not_spin(tree, monkeypatch):
    monkeypatch.delenv("MT3_SPIN", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: (3, 11), raising=False)
    root = tree(EIGHT)
    assert (may_spin(1, root), may_spin(2, root)) == (True, False)


def test_hybrid_machine_reads_both_versions(tree):
    old = version1("/job", {"/memory/job/memory.limit_in_bytes": f"{4 * GIB}"})
    root = tree(
        {
            **old,
            "proc/self/mountinfo": old["proc/self/mountinfo"] + CGROUP2.replace("cgroup rw", "cgroup/unified rw", 1),
            "proc/self/cgroup": old["proc/self/cgroup"] + "0::/session\n",
            "sys/fs/cgroup/unified/session/cpu.max": "300000 100000",
        }
    )
    assert cpu_quota(root) == 3.0
    assert memory_limit(root) == 4 * GIB


def test_memory_of_version_2(tree):
    """File cache that the kernel can drop is still available."""
    files = {
        "/memory.max": f"{2 * GIB}\n",
        "/memory.current": f"{GIB}\n",
        "/memory.stat": f"anon 12\nfile 99\ninactive_file {GIB // 4}\nactive_file 7\n",
    }
    root = tree(version2("/", files))
    assert memory_limit(root) == 2 * GIB
    assert available_memory(root) == GIB + GIB // 4


@pytest.mark.parametrize(("limit", "expected"), [(9223372036854771712, None), (3 * GIB, 3 * GIB)])
def test_memory_of_version_1(tree, limit, expected):
    files = {
        "/memory/memory.limit_in_bytes": f"{limit}",
        "/memory/memory.usage_in_bytes": f"{GIB}",
        "/memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB // 2}\n",
    }
    root = tree(version1("/", files))
    assert memory_limit(root) == expected
    assert available_memory(root) == (8 * GIB if expected is None else 2 * GIB + GIB // 2)


def test_memory_without_limits(tree):
    root = tree(version2("/", {"/memory.max": "max\n", "/memory.current": "1\n"}))
    assert (memory_limit(root), total_memory(root), available_memory(root)) == (None, 16 * GIB, 8 * GIB)


def test_an_empty_root_is_unknown_not_wrong(tmp_path):
    machine = describe_machine(tmp_path)
    assert (machine.memory_total, machine.memory_available, machine.memory_limit) == (None, None, None)
    assert machine.cpu_quota is None
    assert machine.cpu_flags == ()
    assert machine.cpu_name
    assert machine.usable_cores == machine.allowed_cpus >= 1
    assert default_threads(tmp_path) == machine.usable_cores
    assert peak_rss_mb(tmp_path) > 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30), mount=st.text(max_size=30))
def test_nonsense_is_no_limit(tree, text, mount):
    """Whatever the files hold, there is an answer and no exception."""
    names = ("cpu.max", "memory.max", "memory.current", "memory.stat")
    files = version2("/", {f"/{name}": text for name in names})
    files["proc/self/mountinfo"] = mount.replace("\r", "") + "\n" + CGROUP2
    files["proc/meminfo"] = f"MemTotal: {text}"
    root = tree({name: content.encode("utf-8", "replace").decode() for name, content in files.items()})
    assert 1 <= usable_cores(root, range(4)) <= 4
    assert describe_machine(root).usable_cores >= 1


@pytest.mark.parametrize(
    ("cpuinfo", "name", "flags"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx avx2 fma avx512f xavx512_vnni\n",
         "Some CPU @ 2 GHz", ("avx2", "fma", "avx512f")),
        ("processor\t: 0\nmodel name\t: Server\nflags\t\t: avx2 avx_vnni amx_int8\n",
         "Server", ("avx2", "avx_vnni", "amx_int8")),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n", os.uname().machine, ("asimddp", "i8mm")),
    ],
)  # fmt: skip
def test_processor(tree, cpuinfo, name, flags):
    root = tree({"proc/cpuinfo": cpuinfo})
    assert (cpu_name(root), cpu_flags(root)) == (name, flags)


def test_package_versions_are_the_installed_ones():
    assert package_versions(("numpy", "no-such-package")) == {"numpy": version("numpy"), "no-such-package": None}
    assert "onnxruntime" in package_versions()


def test_affinity_of_this_process_counts():
    """One allowed CPU is one usable core, whatever the machine."""
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from mt3_runtime.machine import default_threads; print(default_threads())"
    )
    assert run(code) == "1"


def test_this_machine_agrees_with_psutil():
    machine = describe_machine()
    assert machine.memory_total == psutil.virtual_memory().total
    assert machine.allowed_cpus == len(psutil.Process().cpu_affinity())
    assert 1 <= machine.usable_cores <= machine.physical_cores <= machine.allowed_cpus


def test_peak_memory_follows_an_allocation_and_stays():
    code = (
        "from mt3_runtime.machine import peak_rss_mb\n"
        "before = peak_rss_mb(); block = bytearray(b'x') * (96 << 20); held = peak_rss_mb(); del block\n"
        "print(held - before, peak_rss_mb() - before)"
    )
    held, after = map(float, run(code).split())
    assert held == pytest.approx(96, abs=4)
    assert after == pytest.approx(held, abs=4)


def test_peak_memory_is_this_process_alone():
    """A small child of a large parent is small."""
    code = (
        "import subprocess, sys\n"
        "block = bytearray(b'x') * (200 << 20)\n"
        "child = 'from mt3_runtime.machine import peak_rss_mb; print(peak_rss_mb())'\n"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, check=True).stdout)"
    )
    assert 1 < float(run(code)) < 100


def test_peak_memory_unit(tree):
    root = tree({"proc/self/status": "Name:\tx\nVmPeak:\t  999999 kB\nVmHWM:\t   10240 kB\nVmRSS:\t 1 kB\n"})
    assert peak_rss_mb(root) == 10.0


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
