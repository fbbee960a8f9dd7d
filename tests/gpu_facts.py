"""What may be found of GPUs on made-up machines."""

from __future__ import annotations

from mt3_runtime.gpu_needs import Facts
from mt3_runtime.gpu_probe import Driver, Gpu, Package, Runtime

L4, H200 = Gpu("NVIDIA L4", 89), Gpu("NVIDIA H200", 90)
GOOD = Facts(
    driver=Driver("580.65.06", (13, 0), (L4, H200)),
    runtime=Runtime("1.31.1", "13.0", has_provider=True),
    tensorrt=Package("tensorrt", "11.4.0", 13),
    tensorrt_rtx=Package(),
    bindings=Package("cuda.bindings", "13.5.0"),
)
NO_DRIVER = Driver(problem="NVIDIA's driver is not installed or not passed on (libcuda.so.1 is missing)")
OLD_DRIVER = Driver("535.104.05", (12, 2), (L4,))
