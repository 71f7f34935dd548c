"""What programs ask of a device, and which device is in use."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Argument(NamedTuple):
    """A buffer that a kernel is called with: its address on the device, its bytes, the dtype of its elements."""

    address: int
    nbytes: int
    dtype: str


class Device(ABC):
    """Memory and execution of one device. All work goes to one stream, in order.

    name: of the product. capability: (major, minor). num_sms: multiprocessors. most_blocks: of a grid.
    Every method raises DeviceError for a fault of the device, and all of them from then on if the device is lost.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    most_blocks: int

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """The address of fresh memory, aligned to 256 bytes. Raises DeviceMemoryError."""

    @abstractmethod
    def release(self, address: int) -> None:
        """Give memory back, once all work that was asked for so far is done."""

    @abstractmethod
    def copy_in(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device; the array may change as soon as this returns."""

    @abstractmethod
    def copy_out(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a contiguous array, which has the values when this returns."""

    @abstractmethod
    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device."""

    @abstractmethod
    def load(self, kernels: Mapping[str, bytes]) -> dict[str, Any]:
        """Functions for `launch` by key. Raises DeviceError with the driver's log for objects that it refuses."""

    @abstractmethod
    def launch(
        self, function: Any, grid: int, block: int, shared_bytes: int, buffers: Sequence[Argument], sizes: Sequence[int]
    ) -> None:
        """Run a kernel on `grid` blocks of `block` threads; shared_bytes: beside what the kernel declares."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work is done."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""


_lock = threading.Lock()
_devices: dict[str, Device] = {}


def device_for(name: str) -> Device:
    """The device of the targets "cuda" and "cuda-simulator". Raises DeviceError saying what is missing."""
    with _lock:
        if name not in _devices:
            if name == "cuda-simulator":
                from kgraph.runtime.cuda.simulator import SimulatorDevice

                _devices[name] = SimulatorDevice()
            else:
                from kgraph.runtime.cuda.gpu import Gpu

                _devices[name] = Gpu()
        return _devices[name]
