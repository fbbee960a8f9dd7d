"""How engines are talked to, and which are refused; without TensorRT and without a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from device_cases import LENGTH, small_manifest
from device_schedules import SLOTS, play
from engine_stand_ins import TRT, StandInContext, StandInEngine, engines
from mt3_runtime.backends import tensorrt
from mt3_runtime.backends.device_rows import DeviceOptions, DeviceRows
from mt3_runtime.backends.fake_gpu import THREAD, FakeGpu
from mt3_runtime.backends.gpu import DeviceTensor
from mt3_runtime.backends.tensorrt import TensorRTBackend
from mt3_runtime.backends.tensorrt_graphs import TYPES, TrtGraphs, check_engine, first_input
from mt3_runtime.errors import BundleError, DeviceError, OptionError
from mt3_runtime.gpu_probe import Driver, Gpu


@pytest.fixture(scope="module")
def manifest(tiny_bundle):
    return small_manifest(tiny_bundle.manifest)


@pytest.mark.parametrize("eager", [False, True], ids=["late", "at once"])
def test_engines_are_given_shapes_and_addresses(manifest, eager):
    gpu = FakeGpu(eager=eager)
    gpu.stream = 7
    graphs = TrtGraphs(TRT, gpu, engines(gpu, manifest))
    assert (graphs.lengths, graphs.segments, graphs.rows) == ((8, 16, LENGTH), 4, 8)
    backend = DeviceRows(manifest, gpu, graphs, DeviceOptions(SLOTS, chunk=4), device="tensorrt:0", provider="stand-in")
    play(backend, 2, segments=9)
    assert backend.captured
    for (graph, length), engine in graphs.engines.items():
        assert engine.engine.contexts <= (4 if length else 1), graph


def test_two_devices_in_turn_and_another_thread(manifest):
    """TensorRT works on the device that its thread uses."""
    backends = []
    for _ in range(2):
        gpu = FakeGpu()
        gpu.stream = 7
        graphs = TrtGraphs(TRT, gpu, engines(gpu, manifest))
        backends.append(DeviceRows(manifest, gpu, graphs, DeviceOptions(2, chunk=4), device="", provider=""))
    for seed in range(2):
        for backend in backends:
            play(backend, seed, segments=2)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(play, backends[0], 3, segments=2).result()
    used, close = [], backends[0].graphs.close
    backends[0].graphs._contexts = SimpleNamespace(clear=lambda: used.append(THREAD.gpu))
    backends[1].gpu.use()
    close()
    assert used == [backends[0].gpu]


def test_an_odd_address_is_refused(manifest):
    gpu = FakeGpu()
    graphs = TrtGraphs(TRT, gpu, engines(gpu, manifest))
    with pytest.raises(DeviceError, match="states of cross_kv stands at an address that TensorRT does not take"):
        graphs.bind("cross_kv", [DeviceTensor("states", "float16", (1, 17, 32), gpu.allocate(4096) + 128)])


@pytest.mark.parametrize("made", [False, True], ids=["before its graphs", "after its graphs"])
def test_what_could_not_be_made_is_given_back(tiny_bundle, monkeypatch, made):
    closed = []

    class Closing:
        engines, name, rows, lengths, captures = {}, "", 1, None, True

        def __init__(self, *arguments):
            self.kind = "graphs" if len(arguments) == 3 else "gpu"
            if self.kind == "graphs" and not made:
                raise DeviceError("no room")

        def use(self):
            pass

        def synchronize(self):
            closed.append("wait")

        def close(self):
            closed.append(self.kind)

    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda name: TRT)
    monkeypatch.setattr(tensorrt, "this_host", lambda *_: SimpleNamespace(gpu="Stand-in"))
    monkeypatch.setattr(tensorrt, "find_engines", lambda *_, **__: {})
    monkeypatch.setattr(TensorRTBackend, "_load", lambda *_: ({}, {}))
    monkeypatch.setattr(tensorrt, "CudaGpu", Closing)
    monkeypatch.setattr(tensorrt, "TrtGraphs", Closing)
    with pytest.raises(OptionError if made else DeviceError):
        TensorRTBackend(tiny_bundle, slots=8)  # more than the rows of its graphs
    assert closed[: 2 + made] == ["wait", *["graphs"] * made, "gpu"]


def test_an_engine_that_is_not_the_graph_is_refused(manifest):
    gpu = FakeGpu()
    for spec in manifest.contracts:
        contract = spec.typed("fp16")
        dropped = StandInEngine(gpu, replace(contract, inputs=contract.inputs[1:]), None, 8)
        with pytest.raises(BundleError, match=f"engine of {spec.name} lacks an input {first_input(spec.name)}"):
            check_engine(TRT, dropped, contract)
        with pytest.raises(BundleError, match=f"engine of {spec.name} (lacks|has) an (in|out)put"):
            check_engine(TRT, StandInEngine(gpu, spec, None, 8), spec.typed("bf16"))


def test_tensorrt_has_what_is_called():
    """The names are TensorRT-RTX's, which is installed where these tests run; its engines cannot be loaded there."""
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    for real, stand_in in ((trt.ICudaEngine, StandInEngine), (trt.IExecutionContext, StandInContext)):
        called = {name for name in vars(stand_in) if not name.startswith("_")} - {"sizes"}
        assert called <= set(dir(real))
    config = {"create_runtime_cache", "set_runtime_cache", "cuda_graph_strategy"}
    config |= {"set_execution_context_allocation_strategy", "dynamic_shapes_kernel_specialization_strategy"}
    assert config <= set(dir(trt.IRuntimeConfig))
    assert hasattr(trt.ICudaEngine, "create_runtime_config")
    assert {"serialize", "deserialize"} <= set(dir(trt.IRuntimeCache))
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert trt.CudaGraphStrategy.DISABLED is not None
    assert trt.DynamicShapesKernelSpecializationStrategy.EAGER is not None
    assert set(TYPES) <= set(trt.DataType.__members__)


def test_a_machine_without_engines_is_told_how_to_build_them(tiny_bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("MT3_ENGINE_CACHE", str(tmp_path / "engines"))
    monkeypatch.setattr(tensorrt, "import_tensorrt", lambda name: TRT)
    monkeypatch.setattr(tensorrt, "probe_driver", lambda: Driver("580.1", (13, 0), (Gpu("Stand-in", 89),)))
    with pytest.raises(DeviceError, match=r"no engines of .* sm_89, 8 rows .*: run mt3-export engines"):
        TensorRTBackend(tiny_bundle, module="tensorrt_rtx")
    with pytest.raises(DeviceError, match="there is no GPU 3, only 1"):
        TensorRTBackend(tiny_bundle, device_index=3)
