"""Which device runs: names, what is missing for it, and how a choice is made; no GPU is needed."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from gpu_facts import GOOD, L4, NO_DRIVER, OLD_DRIVER
from mt3_runtime.devices import Device, default_slots, encode_group, parse_device
from mt3_runtime.doctor_gpu import Gpus, check_gpus
from mt3_runtime.errors import DeviceError
from mt3_runtime.gpu_needs import Facts, problems, require_usable
from mt3_runtime.gpu_probe import (
    CUDNN,
    LIBRARIES,
    Driver,
    Gpu,
    Package,
    Runtime,
    has_gpu,
    probe_driver,
    probe_package,
    probe_runtime,
)
from mt3_runtime.loading import load

# ---- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "device"), [
    ("auto", Device("auto")), ("cpu", Device("cpu")), ("cuda", Device("cuda")), ("cuda:1", Device("cuda", 1)),
    ("tensorrt", Device("tensorrt")), ("tensorrt:3", Device("tensorrt", 3)),
    ("tensorrt-rtx:12", Device("tensorrt-rtx", 12)),
])  # fmt: skip
def test_names_of_devices(name, device):
    assert parse_device(name) == device
    assert parse_device(str(device)) == device


@pytest.mark.parametrize(
    "name", ["", "gpu", "CPU", "cpu:0", "auto:1", "cuda:", "cuda:-1", "cuda:x", "cuda:123", "cuda:²"]
)
def test_other_names_are_refused(name):
    with pytest.raises(DeviceError, match=r"does not exist: use auto, cpu, cuda, tensorrt, tensorrt-rtx, or cuda:1"):
        parse_device(name)


def test_defaults_by_device(tiny_bundle, channels_bundle):
    kinds = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")
    assert [default_slots(tiny_bundle.manifest, kind) for kind in kinds] == [8, 32, 16, 16]
    assert [default_slots(channels_bundle.manifest, kind) for kind in kinds] == [12, 12, 6, 6]
    assert [encode_group(tiny_bundle.manifest, device) for device in ("cpu", "cuda:0", "tensorrt:1")] == [4, 8, 8]
    assert [encode_group(channels_bundle.manifest, device) for device in ("cpu", "cuda:0")] == [1, 4]


# ---- facts ------------------------------------------------------------------------------------------------


class FakeDriver:
    """As much of libcuda as is asked."""

    def __init__(self, gpus, version=13000, status=0):
        self.gpus, self.version, self.status = gpus, version, status

    def cuInit(self, flags):  # noqa: N802
        return self.status

    def cuDriverGetVersion(self, number):  # noqa: N802
        number._obj.value = self.version

    def cuDeviceGetCount(self, number):  # noqa: N802
        number._obj.value = len(self.gpus)

    def cuDeviceGet(self, device, index):  # noqa: N802
        device._obj.value = index

    def cuDeviceGetName(self, name, size, device):  # noqa: N802
        name.value = self.gpus[device.value][0].encode()[: size - 1]

    def cuDeviceGetAttribute(self, number, attribute, device):  # noqa: N802
        number._obj.value = self.gpus[device.value][1][{75: 0, 76: 1}[attribute]]


def missing(name):
    raise OSError(f"{name}: cannot open shared object file")


def test_the_driver_is_asked(tmp_path):
    folder = tmp_path / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\nGCC 12.2.0\n"
    )
    library = FakeDriver([("NVIDIA L4", (8, 9)), ("NVIDIA H200", (9, 0))])
    assert probe_driver({"libcuda.so.1": library}.get, tmp_path) == GOOD.driver


@pytest.mark.parametrize(("load_library", "words"), [
    (missing, "libcuda.so.1 is missing"),
    (lambda _: FakeDriver([], status=100), "shows no GPU (CUDA_VISIBLE_DEVICES may hide it)"),
    (lambda _: FakeDriver([], status=999), "cuInit gives error 999"),
    (lambda _: FakeDriver([]), "knows of no GPU"),
])  # fmt: skip
def test_a_driver_that_is_of_no_use(load_library, words, tmp_path):
    found = probe_driver(load_library, tmp_path)
    assert words in found.problem
    assert found.gpus == ()


def fake_onnxruntime(providers, cuda="13.0"):
    printed = lambda: print("Failed to load libcudnn")  # noqa: E731, T201
    return SimpleNamespace(
        __version__="1.31.1", cuda_version=cuda, get_available_providers=lambda: providers, preload_dlls=printed
    )


def only(*names):
    def load_library(name):
        return object() if name in names else missing(name)

    return load_library


GPU_BUILD = fake_onnxruntime(["CUDAExecutionProvider", "CPUExecutionProvider"])


@pytest.mark.parametrize(("there", "lacking"), [
    ((*LIBRARIES[13], CUDNN), ()),
    (LIBRARIES[13], (CUDNN,)),
    ((CUDNN,), LIBRARIES[13]),
])  # fmt: skip
def test_libraries_of_the_provider(there, lacking, capsys):
    found = probe_runtime(only(*there), lambda _: GPU_BUILD)
    assert found == Runtime("1.31.1", "13.0", has_provider=True, missing=lacking)
    assert capsys.readouterr().out == ""


def test_libraries_of_another_version_are_named():
    found = probe_runtime(only(*LIBRARIES[12], "libcudnn.so.8"), lambda _: GPU_BUILD)
    assert found.others == ("libcudart.so.12", "libcudnn.so.8")
    [problem] = problems(Device("cuda"), replace(GOOD, runtime=found))
    assert (
        "there is libcudart.so.12, libcudnn.so.8) for onnxruntime 1.31.1, which is built for CUDA 13.0" in problem.text
    )


def test_an_onnxruntime_without_gpus_and_none_at_all():
    cpu = fake_onnxruntime(["CPUExecutionProvider"], cuda="")
    assert probe_runtime(missing, lambda _: cpu) == Runtime("1.31.1")

    def absent(name):
        raise ModuleNotFoundError("No module named 'onnxruntime'")

    assert probe_runtime(missing, absent).problem == "No module named 'onnxruntime'"


def test_packages_are_found_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "made_up_trt"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('it was imported')")
    record = tmp_path / "made_up_trt_cu13-11.4.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-trt-cu13\nVersion: 11.4.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert probe_package(("none", "made_up_trt"), ("no", "made-up-trt-cu13")) == Package("made_up_trt", "11.4.0", 13)
    assert probe_package(("made_up_trt",), ()) == Package("made_up_trt", "of unknown version")
    assert probe_package(("none", "none.inside"), ("numpy",)) == Package()


@pytest.mark.parametrize("name", ["dev/nvidiactl", "dev/nvidia0", "dev/dxg"])
def test_a_gpu_is_reachable_by_its_device_not_by_its_driver(tmp_path, name):
    driver = tmp_path / "proc/driver/nvidia/version"
    driver.parent.mkdir(parents=True)
    driver.write_text("NVRM version")
    assert not has_gpu(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / name).touch()
    assert has_gpu(tmp_path)


# ---- what is missing --------------------------------------------------------------------------------------

CASES = {
    "no driver": ("cuda", {"driver": NO_DRIVER}, "libcuda.so.1 is missing", "--gpus all"),
    "driver too old": ("cuda", {"driver": OLD_DRIVER}, "535.104.05 supports CUDA 12.2 at most, too old", "to 580.65"),
    "too old for TensorRT": ("tensorrt", {"driver": OLD_DRIVER}, "too old for tensorrt 11.4.0 for CUDA 13", "580.65"),
    "no cuDNN": (
        "cuda", {"runtime": replace(GOOD.runtime, missing=(CUDNN,))},
        "cuDNN 9 missing (libcudnn.so.9) for onnxruntime 1.31.1, which is built for CUDA 13.0", "[cuda,cudnn]",
    ),
    "no CUDA": (
        "cuda", {"runtime": replace(GOOD.runtime, missing=("libcublas.so.13", CUDNN))},
        "libraries of CUDA missing (libcublas.so.13, libcudnn.so.9)", "[cuda,cudnn]",
    ),
    "a GPU that is not there": (
        "cuda:2", {}, "there is no GPU 2, only cuda:0 (NVIDIA L4), cuda:1 (NVIDIA H200)", "use cuda:0",
    ),
    "a build for the CPU": ("cuda", {"runtime": Runtime("1.31.1")}, "a build for the CPU", "mt3-runtime[cuda]"),
    "no onnxruntime": ("cuda", {"runtime": Runtime(problem="No module")}, "cannot be imported (No module)", "[cuda]"),
    "an old GPU": ("cuda", {"driver": Driver("580.1", (13, 0), (Gpu("V100", 70),))}, "V100 (sm_70) is too old", "new"),
    "no TensorRT": ("tensorrt", {"tensorrt": Package()}, "tensorrt is not installed", "mt3-runtime[tensorrt]"),
    "no RTX": ("tensorrt-rtx", {}, "tensorrt-rtx is not installed", "mt3-runtime[tensorrt-rtx]"),
    "bindings too new": (
        "cuda", {"driver": replace(OLD_DRIVER, cuda=(12, 4)), "runtime": replace(GOOD.runtime, cuda="12.8")},
        "cuda-bindings 13.5.0 is for CUDA 13, the driver supports 12 at most", "pip install 'cuda-bindings<13'",
    ),
    "a GPU that is hidden": (
        "cuda", {"driver": Driver(problem="shows no GPU", hidden=True)}, "shows no GPU", "unset CUDA_VISIBLE_DEVICES",
    ),
    "no bindings": ("tensorrt", {"bindings": Package()}, "cuda-bindings is not installed", "cuda-bindings>=12.8"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_is_named_with_its_fix(case):
    name, changes, text, fix = CASES[case]
    device, facts = parse_device(name), replace(GOOD, **changes)
    [problem] = problems(device, facts)
    assert text in problem.text
    assert fix in problem.fix
    with pytest.raises(DeviceError) as error:
        require_usable(device, facts)
    assert str(error.value).startswith(f"device {device} cannot be used: ")
    assert str(error.value).endswith(problem.fix)
    assert "\n" not in str(error.value)


def test_everything_that_is_missing_is_named_at_once():
    facts = Facts(NO_DRIVER, Runtime("1.31.1"), Package(), Package(), Package())
    with pytest.raises(DeviceError) as error:
        require_usable(Device("cuda"), facts)
    for words in ("libcuda.so.1", "without the CUDA provider", "cuda-bindings is not installed", "pip install"):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "tensorrt", "tensorrt:1"])
def test_nothing_is_missing(name):
    require_usable(parse_device(name), GOOD)


def test_a_driver_for_a_newer_cuda_is_new_enough():
    runtime = replace(GOOD.runtime, cuda="12.8")
    assert problems(Device("cuda"), replace(GOOD, runtime=runtime)) == []
    old = Driver("470.1", (11, 4), (L4,))
    [problem] = problems(Device("cuda"), replace(GOOD, runtime=runtime, driver=old))
    assert "update NVIDIA's driver to 525.60 or newer" in problem.fix


# ---- this machine, if it has no GPU ---------------------------------------------------------------------------

no_gpu = pytest.mark.skipif(has_gpu(), reason="there is a GPU")


@no_gpu
def test_auto_loads_no_library_of_a_gpu(tiny_folder):
    code = (
        "import sys, mt3_runtime; busy = mt3_runtime.load(sys.argv[1])\n"
        "print(busy.backend.device, '|', busy.device_reason)\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('cuda', 'tensorrt', 'tensorrt_rtx_bindings')])\n"
        "print([line for line in open('/proc/self/maps') if 'libcuda' in line or 'nvinfer' in line])"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_folder], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["cpu | no NVIDIA GPU can be reached", "[]", "[]"]


@no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tensorrt", "tensorrt-rtx"])
def test_a_gpu_that_was_asked_for_and_is_not_there(tmp_path, device):
    started = time.monotonic()
    command = [sys.executable, "-m", "mt3_runtime.cli", "transcribe", "x.wav", "--device", device]
    code = "import sys; from mt3_runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *command[3:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert time.monotonic() - started < 10
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(
        f"mt3-run: error: device {parse_device(device)} cannot be used: NVIDIA's driver is not installed"
    )
    assert "libcuda.so.1" in line
    assert line.endswith(("'mt3-runtime[cuda]'", "--gpus all", f"'mt3-runtime[{device}]'", "'cuda-bindings>=12.8'"))
    assert list(tmp_path.iterdir()) == []


@no_gpu
def test_the_reason_is_in_the_provenance(tiny_folder):
    import numpy as np  # noqa: PLC0415

    result = load(tiny_folder).transcribe(np.zeros(16_000, np.float32), 16_000)
    assert result.provenance.device_reason == "no NVIDIA GPU can be reached"
    assert '"device_reason": "no NVIDIA GPU can be reached"' in result.to_json()
    assert load(tiny_folder, "cpu").device_reason == ""


# ---- the doctor -----------------------------------------------------------------------------------------------


def findings(facts, started, *, reachable=True):
    return [
        (each.level, each.text, each.fix)
        for each in check_gpus(Gpus(is_reachable=reachable, facts=facts, started=started))
    ]


def test_the_doctor_on_a_machine_where_all_is_well():
    found = findings(GOOD, {"cuda": "", "tensorrt": ""})
    assert [level for level, _, _ in found] == ["ok"] * 3
    assert found[0][1] == "tensorrt starts on the GPU (tensorrt 11.4.0 for CUDA 13)"
    assert found[2][1] == "cuda starts on the GPU (onnxruntime 1.31.1 for CUDA 13)"
    assert found[1][1:] == ("tensorrt-rtx is not installed", "pip install 'mt3-runtime[tensorrt-rtx]'")
    text = Gpus(is_reachable=True, facts=GOOD).to_text()
    assert text == "NVIDIA L4 (sm_89), NVIDIA H200 (sm_90); driver 580.65.06 for CUDA 13.0"


def test_the_doctor_names_what_is_missing_and_what_does_not_start():
    facts = replace(GOOD, runtime=replace(GOOD.runtime, missing=(CUDNN,)))
    levels = {text: (level, fix) for level, text, fix in findings(facts, {"cuda": "?", "tensorrt": "no kernel image"})}
    [cuda] = [text for text in levels if text.startswith("cuda cannot be used: cuDNN 9 missing (libcudnn.so.9)")]
    assert levels[cuda] == ("warning", "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    [trt] = [
        text for text in levels if text == "tensorrt does not start (tensorrt 11.4.0 for CUDA 13): no kernel image"
    ]
    assert levels[trt][0] == "warning"


def test_the_doctor_without_a_gpu():
    facts = replace(GOOD, driver=NO_DRIVER)
    said = "no NVIDIA GPU can be reached (tensorrt 11.4.0, cuda 1.31.1 would need one): transcription runs on the CPU"
    assert findings(facts, {}, reachable=False) == [("ok", said, "")]
    bare = replace(facts, tensorrt=Package(), runtime=Runtime("1.31.1"))
    said = "no NVIDIA GPU can be reached: transcription runs on the CPU"
    assert findings(bare, {}, reachable=False) == [("ok", said, "")]
    assert Gpus(is_reachable=False, facts=facts).to_text() == "none"
    assert "libcuda.so.1" in Gpus(is_reachable=True, facts=facts).to_text()
