"""From the name of a target to what kernels are generated for."""

from __future__ import annotations

from dataclasses import replace

from kgraph.codegen.cuda.target import CudaTarget, make_target, simulator_target
from kgraph.codegen.target import Target, host_target
from kgraph.runtime.cuda.device import allows_tf32, device_for, get_device
from kgraph.runtime.steps import Convolution, Product


def resolve(name: str | None) -> Target | CudaTarget:
    """The target called "cpu", "cuda" (a GPU: that of `set_device`, or the first), "cuda:N" or "cuda-simulator".

    name: None means what `kgraph.set_device` was given. Raises ValueError for another name, DeviceError where there is
    no such device, saying what is missing.
    """
    name = target_name(name)
    if name == "cpu":
        return host_target()
    device = device_for(name)
    if name == "cuda-simulator":
        target = simulator_target()
    else:
        target = make_target(device.capability, device.num_sms, device.ordinal)
    return replace(target, products=device.offers(Product), convolutions=device.offers(Convolution), tf32=allows_tf32())


def target_name(name: str | None) -> str:
    """The name of a device that a target stands for."""
    current = get_device()
    if name is None or (name == "cuda" and current.startswith("cuda:")):
        return current
    return name
