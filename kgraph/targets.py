"""From the name of a target to what kernels are generated for."""

from __future__ import annotations

from kgraph.codegen.cuda.target import CudaTarget, make_target, simulator_target
from kgraph.codegen.target import Target, host_target
from kgraph.runtime.cuda.device import device_for


def resolve(name: str) -> Target | CudaTarget:
    """The target called "cpu", "cuda" or "cuda-simulator".

    Raises DeviceError where there is no such device, saying what is missing.
    """
    if name == "cpu":
        return host_target()
    device = device_for(name)
    return simulator_target() if name == "cuda-simulator" else make_target(device.capability, device.num_sms)
