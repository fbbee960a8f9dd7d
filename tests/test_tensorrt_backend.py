"""How engines are talked to, and which are refused; without TensorRT and without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from device_cases import LENGTH, small_manifest
from device_schedules import SLOTS, play
from engine_stand_ins import TRT, StandInContext, StandInEngine, engines
from mt3_runtime.backends import tensorrt
from mt3_runtime.backends.device_rows import DeviceOptions, DeviceRows
from mt3_runtime.backends.fake_gpu import FakeGpu
from mt3_runtime.backends.tensorrt import TensorRTBackend
from mt3_runtime.backends.tensorrt_graphs import TYPES, TrtGraphs, check_engine, first_input
from mt3_runtime.errors import BundleError, DeviceError
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
