"""How CUDA is talked to: over a stand-in that makes every call to the real module too, which checks its arguments."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from device_cases import Numbers, small_manifest
from device_schedules import SLOTS, play
from host_cuda import HAS_GPU, HostCuda, HostGraphs, runtime
from mt3_runtime.backends import gpu_memory
from mt3_runtime.backends.device_rows import DeviceOptions, DeviceRows
from mt3_runtime.backends.gpu import contiguous
from mt3_runtime.backends.gpu_memory import CudaGpu, cuda_error
from mt3_runtime.errors import DependencyError, DeviceError, DeviceLostError, OutOfMemoryError


@pytest.fixture(scope="module")
def manifest(tiny_bundle):
    return small_manifest(tiny_bundle.manifest)


@pytest.fixture
def host(monkeypatch):
    if HAS_GPU:
        pytest.skip("the real calls would do something here")
    host = HostCuda()
    monkeypatch.setattr(gpu_memory, "import_cuda", lambda: host)
    return host


def test_cuda_is_called_as_it_asks_to_be(manifest, host):
    gpu = CudaGpu(1)
    assert (gpu.name, gpu.capability, gpu.stream, gpu.free_memory) == ("Stand-in 1", (8, 9), 7, 1000)
    assert gpu.versions == {"driver": "13.1", "runtime": "12.8"}
    graphs = HostGraphs(host, Numbers("fp16").functions())
    backend = DeviceRows(manifest, gpu, graphs, DeviceOptions(SLOTS, chunk=4), device="cuda:1", provider="stand-in")
    play(backend, 0)
    assert backend.captured
    assert host.names.count("cudaGraphLaunch") > 3
    backend.close()
    assert not host.memory
    assert not host.host
    assert host.names[-1] == "cudaStreamDestroy"
    before = len(host.names)
    gpu.close()
    assert len(host.names) == before


def test_a_gpu_that_is_not_there_is_named(host):
    with pytest.raises(DeviceError, match="there is no GPU 2, only 2: use --device cuda:0 to cuda:1"):
        CudaGpu(2)


def test_errors_of_cuda_become_ours(manifest, host):
    host.size = 1 << 16
    gpu = CudaGpu()
    with pytest.raises(OutOfMemoryError, match="use fewer --slots"):
        DeviceRows(manifest, gpu, HostGraphs(host, {}), DeviceOptions(SLOTS), device="", provider="")
    for code, kind in {
        "cudaErrorMemoryAllocation": OutOfMemoryError,
        "cudaErrorIllegalAddress": DeviceLostError,
        "cudaErrorECCUncorrectable": DeviceLostError,
        "cudaErrorNoDevice": DeviceError,
        "cudaErrorInvalidValue": DeviceError,
    }.items():
        assert hasattr(runtime.cudaError_t, code)
        error = cuda_error(code, "cudaMalloc", host)
        assert type(error) is kind
        assert "\n" not in str(error)


def test_every_error_that_ends_a_process_exists():
    assert all(hasattr(runtime.cudaError_t, code) for code in gpu_memory.LOST)


def test_a_capture_that_fails_ends_its_capture(host):
    gpu = CudaGpu()

    def fail():
        raise DeviceError("no")

    with pytest.raises(DeviceError, match="no"):
        gpu.capture(fail)
    assert host.names[-3:] == ["cudaStreamEndCapture", "cudaGetLastError", "cudaGraphDestroy"]
    host.refused = ("cudaStreamEndCapture",)
    with pytest.raises(DeviceError, match="no"):
        gpu.capture(fail)
    assert host.names[-2:] == ["cudaStreamEndCapture", "cudaGetLastError"]


def test_a_graph_that_cannot_be_launched_is_destroyed(host):
    gpu = CudaGpu()
    host.refused = ("cudaGraphInstantiate",)
    with pytest.raises(DeviceError, match="CUDA refused cudaGraphInstantiate"):
        gpu.capture(lambda: None)
    assert host.names[-3:] == ["cudaGraphInstantiate", "cudaGetLastError", "cudaGraphDestroy"]


def test_every_call_is_made_on_its_own_gpu(manifest, host):
    """Two GPUs in turn in one thread, and one of them in another thread."""
    gpus = [CudaGpu(index) for index in range(2)]

    def calls_of(gpu, use):
        host.devices.clear()
        use(gpu)
        assert len(host.devices) > 3
        return {device for name, device in host.devices if name != "cudaSetDevice"}

    def some(gpu):
        at, event = gpu.allocate(512), gpu.event()
        gpu.upload(at, gpu.pinned(8))
        gpu.record(event)
        gpu.wait(event)
        gpu.capture(lambda: gpu.clear(contiguous(at, 8)))()
        gpu.synchronize()
        gpu.free(at)

    for index in (0, 1, 0):
        assert calls_of(gpus[index], some) == {index}
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(calls_of, gpus[1], some).result() == {1}
        for index in (1, 0):
            assert thread.submit(calls_of, gpus[index], CudaGpu.close).result() == {index}


def test_without_cuda_bindings_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(DependencyError, match=r"pip install 'mt3-runtime\[cuda\]'"):
        gpu_memory.import_cuda()
