"""Sessions of the CUDA backend, with the CPU in the place of the GPU: how they are bound, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from decoding_cases import follow
from mt3_runtime.backends import cuda
from mt3_runtime.backends.cuda import CudaBackend, run_error
from mt3_runtime.backends.fake_gpu import FakeGpu
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.errors import DeviceError, DeviceLostError, OptionError, OutOfMemoryError


@pytest.fixture
def on_cpu(monkeypatch):
    """The CUDA backend, told that the CPU is its GPU."""
    binding = pytest.importorskip("onnxruntime").IOBinding
    for name in ("bind_input", "bind_output"):
        bind = getattr(binding, name)
        monkeypatch.setattr(binding, name, lambda self, tensor, _, *rest, bind=bind: bind(self, tensor, "cpu", *rest))
    monkeypatch.setattr(cuda, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(cuda, "LOWERING", "ort")
    monkeypatch.setattr(cuda, "provider_options", lambda *_, **__: {})
    gpu = FakeGpu(eager=True)
    gpu.stream = 7
    monkeypatch.setattr(cuda, "CudaGpu", lambda index: gpu)


@pytest.mark.parametrize("kind", ["tiny", "prefix"])
def test_sessions_are_bound_to_memory_of_the_device(request, on_cpu, kind):
    bundle = request.getfixturevalue(f"{kind}_bundle")
    backend = CudaBackend(bundle, slots=3, precision="fp32", chunk=4)
    assert (backend.device, backend.provider, backend.precision) == ("cuda:0", "CPUExecutionProvider", "fp32")
    own = OrtBackend(bundle, slots=3, threads=1)
    features, model = bundle.manifest.features, bundle.manifest.model
    noise = np.random.default_rng(1).normal(-5, 3, (3, features.segment_frames, features.bins)).astype(np.float32)
    told = np.tile(np.arange(2, 18, dtype=np.int32), (3, model.memory.span // 16)) if model.memory else None
    backend.admit(0, [channels[0] for channels in backend.encode(noise)], told)
    own.admit(0, own.encode(noise)[:, 0], told)
    for found, wanted in zip(follow(backend, 12, 3), follow(own, 12, 3), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert set(backend.graphs.placement()["encoder"]) == {"CPUExecutionProvider"}


def test_sessions_are_given_up_before_the_gpu(tiny_bundle, on_cpu, monkeypatch):
    order, gpu = [], cuda.CudaGpu(0)
    close = cuda.CudaGraphs.close
    monkeypatch.setattr(cuda.CudaGraphs, "close", lambda self: (order.append("graphs"), close(self)))
    monkeypatch.setattr(gpu, "close", lambda: order.append("gpu"))
    with pytest.raises(OptionError):
        CudaBackend(tiny_bundle, slots=0, precision="fp32")
    assert order[:2] == ["graphs", "gpu"]


def test_a_network_that_would_run_elsewhere_is_refused(tiny_bundle, on_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "CPU", "")
    placed = {"CUDAExecutionProvider": ["MatMul"], "CPUExecutionProvider": ["Shape", "Conv", "Gather"]}
    monkeypatch.setattr(cuda, "placed", lambda session: placed)
    entry = tiny_bundle.graph("encoder", "ort", "fp32")
    session = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"1 nodes of .* would not run on CUDAExecutionProvider but as Conv"):
        cuda.check_placement(entry, session, "CUDAExecutionProvider")
    placed["CPUExecutionProvider"] = ["Shape", "Add", "Cast", "Gather"]
    cuda.check_placement(entry, session, "CUDAExecutionProvider")
    monkeypatch.setattr(cuda, "STEP", "encoder")
    with pytest.raises(DeviceError, match=r"1 nodes .* as Add"):
        cuda.check_placement(entry, session, "CUDAExecutionProvider")
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match="could not start CUDAExecutionProvider and went to CPUExecutionProvider"):
        cuda.check_placement(entry, fallen, "CUDAExecutionProvider")


def test_a_step_that_cannot_be_captured_is_run_without(tiny_bundle, on_cpu, monkeypatch):
    opened, open_session = [], cuda.open_session

    def refuse(bundle, entry, contract, providers):
        opened.append((entry.graph, providers[0][1]["capture"]))
        if providers[0][1]["capture"]:
            raise DeviceError("no graphs of this graph: export again")
        return open_session(bundle, entry, contract, [("CPUExecutionProvider", {})])

    monkeypatch.setattr(cuda, "provider_options", lambda *_, capture: {"capture": capture})
    monkeypatch.setattr(cuda, "open_session", refuse)
    backend = CudaBackend(tiny_bundle, precision="fp32")
    assert backend.capture_problem == "no graphs of this graph: export again"
    assert opened == [("encoder", False), ("cross_kv", False), ("decode_step", True), ("decode_step", False)]
    monkeypatch.setattr(cuda, "open_session", lambda *_: (_ for _ in ()).throw(OutOfMemoryError("full")))
    with pytest.raises(OutOfMemoryError):
        CudaBackend(tiny_bundle, precision="fp32")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", OutOfMemoryError),
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9", OutOfMemoryError),
        ("CUDA failure 700: an illegal memory access was encountered", DeviceLostError),
        ("something\nelse", DeviceError),
    ],
)
def test_errors_of_onnx_runtime_become_ours(text, kind):
    error = run_error("decode_step", RuntimeError(text))
    assert type(error) is kind
    assert "\n" not in str(error)


def test_a_build_without_cuda_is_told_apart(tiny_bundle, monkeypatch):
    monkeypatch.setattr(cuda, "PROVIDER", "NoSuchProvider")
    with pytest.raises(DeviceError, match="built without CUDA: pip uninstall onnxruntime, then pip install"):
        CudaBackend(tiny_bundle)
