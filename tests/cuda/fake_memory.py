"""The memory that stand-ins of libraries see: arrays of the host, and what a simulator has allocated."""

from __future__ import annotations

import ctypes

import numpy as np


def elements(address: int, count: int, dtype: np.dtype, host: list[np.ndarray], device) -> np.ndarray:
    """Memory as elements. Raises DeviceError where it is not all allocated."""
    size = count * dtype.itemsize
    for array in host:
        first = array.ctypes.data
        if first <= address and address + size <= first + array.nbytes:
            return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype)
    return device._view(address, size).view(dtype)


def do_or_keep(device, action) -> None:
    """Does what a library was asked for, or keeps it where the device captures."""
    captured = getattr(device, "_captured", None)
    if captured is not None:
        captured.append(action)
    else:
        action()
