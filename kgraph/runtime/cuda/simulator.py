"""A device whose kernels run in Numba's CUDA simulator: every thread of a block is a Python thread.

Objects are the kernels' sources, and addresses those of host memory. Kernels see buffers of just the bytes that a step
names and fail on an index outside of them. Numba reads NUMBA_ENABLE_CUDASIM=1 when it is imported: it has to be set for
the process.
"""

from __future__ import annotations

import linecache
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import numpy as np

from kgraph.errors import DeviceError, DeviceMemoryError
from kgraph.runtime.cuda.device import Argument, Device
from kgraph.runtime.cuda.libraries import Products

_ALIGNMENT = 256


class SimulatorDevice(Device):
    """See the module's docstring. limit: bytes that can be allocated, for tests of what happens beyond."""

    machine = "cuda-simulator"
    name = "Numba's CUDA simulator"
    capability = (9, 0)
    num_sms = 1
    most_blocks = 2  # more than one, so that loops over the grid are put to the test

    def __init__(self, limit: int = 1 << 34):
        try:
            from numba import config, cuda
        except ImportError as error:
            raise DeviceError(f"the CUDA simulator needs numba and numba-cuda: {error}") from error
        if not getattr(config, "ENABLE_CUDASIM", False):
            raise DeviceError(
                "Numba's CUDA simulator is off: set NUMBA_ENABLE_CUDASIM=1 before the process first imports numba.cuda"
            )
        super().__init__()
        self._cuda = cuda
        self.library: Products | None = None  # what tests put there
        self._captured: list | None = None
        self._limit, self._used = limit, 0
        self._memory: dict[int, np.ndarray] = {}
        self._running = threading.Lock()  # the simulator runs one kernel at a time
        _make_shared_arrays_safe()

    def allocate(self, nbytes: int) -> int:
        if self._used + nbytes > self._limit:
            self._reclaim()
        if self._used + nbytes > self._limit:
            free = self._limit - self._used
            raise DeviceMemoryError(f"{self.name}: {nbytes} bytes were asked for, {free} of {self._limit} are free")
        raw = np.full(nbytes + _ALIGNMENT, 0xA5, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        memory = raw[start : start + nbytes]
        address = raw.ctypes.data + start
        self._memory[address] = memory
        self._used += nbytes
        return address

    def release(self, address: int, shared: bool = False) -> None:
        self._used -= self._memory.pop(address).nbytes

    def _view(self, address: int, nbytes: int) -> np.ndarray:
        for start, memory in self._memory.items():
            if start <= address and address + nbytes <= start + memory.nbytes:
                return memory[address - start : address - start + nbytes]
        raise DeviceError(f"{self.name}: {nbytes} bytes at {address:#x} are not allocated")

    def copy_in(self, address: int, array: np.ndarray) -> None:
        if array.nbytes:
            self._view(address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

    def copy_out(self, array: np.ndarray, address: int) -> None:
        if array.nbytes:
            array.reshape(-1).view(np.uint8)[:] = self._view(address, array.nbytes)

    def copy_out_later(self, array: np.ndarray, address: int) -> None:
        self.copy_out(array, address)

    def copy_ahead(self, address: int, array: np.ndarray, after: Any) -> None:
        self.copy_in(address, array)

    def join_copies(self) -> Any:
        return self.mark()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        if self._captured is not None:
            self._captured.append(lambda: self.copy(target, source, nbytes))
        elif nbytes:
            self._view(target, nbytes)[:] = self._view(source, nbytes)

    def load(self, kernels: Mapping[str, bytes]) -> dict[str, Any]:
        return {key: self._load(key, source.decode()) for key, source in kernels.items()}

    def _load(self, key: str, source: str) -> Any:
        name = f"<kernel {key}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        namespace: dict = {"__name__": name}
        exec(compile(source, name, "exec", dont_inherit=True), namespace)
        (function,) = (v for v in namespace.values() if isinstance(v, FunctionType) and v.__module__ == name)
        # Kernels read memory as what their parameters say, like pointers on a GPU.
        dtypes = [kind.rstrip("*") for kind in function.__annotations__.values() if kind.endswith("*")]
        return self._cuda.jit(function), dtypes

    def launch(
        self, function: Any, grid: int, block: int, shared_bytes: int, buffers: Sequence[Argument], sizes: Sequence[int]
    ) -> None:
        if self._captured is not None:
            self._captured.append(lambda: self.launch(function, grid, block, shared_bytes, buffers, sizes))
            return
        kernel, dtypes = function
        pointers = [_Pointer(self._view(b.address, b.nbytes), dtype) for b, dtype in zip(buffers, dtypes, strict=True)]
        with self._running, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # integers wrap, floats overflow
            kernel[grid, block, 0, shared_bytes](*pointers, *map(np.int64, sizes))

    def products(self) -> Products | None:
        return self.library

    def begin_capture(self) -> None:
        self._captured = []

    def end_capture(self) -> Any:
        captured, self._captured = self._captured, None
        return captured

    def replay(self, graph: Any) -> None:
        for run in graph:
            run()

    def synchronize(self) -> None:
        pass

    def synchronize_stream(self, stream: int) -> None:
        pass

    def mark(self, timing: bool = False) -> Any:
        return time.perf_counter()

    def wait(self, event: Any) -> None:
        pass

    def milliseconds(self, start: Any, end: Any) -> float:
        return (end - start) * 1e3

    def pinned(self, nbytes: int) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def memory(self) -> tuple[int, int]:
        return self._limit - self._used, self._limit


def _make_shared_arrays_safe() -> None:
    """Numba's simulator may give two threads of a block two arrays for one declaration, if both come to it at once.

    So its method is replaced by one that does the same (a declaration is known by its line) under a lock.
    """
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    lock = threading.Lock()

    def array(self, shape, dtype, alignment=None):
        dtype = np.dtype(getattr(dtype, "name", dtype))
        if shape == 0:
            return np.frombuffer(self._dynshared.data, dtype, self._dynshared_size // dtype.itemsize)
        caller = sys._getframe(1)
        with lock:
            key = caller.f_code.co_filename, caller.f_lineno
            if key not in self._allocations:
                self._allocations[key] = np.empty(shape, dtype)
            return self._allocations[key]

    FakeCUDAShared.array = array  # type: ignore[method-assign]


class _Pointer:
    """A buffer as kernels see it, with its bounds checked."""

    __slots__ = ("_elements",)
    ndim = 1

    def __init__(self, memory: np.ndarray, dtype: str):
        self._elements = memory.view(dtype)

    def _checked(self, index) -> int:
        number = int(index[0] if isinstance(index, tuple) else index)
        if not 0 <= number < len(self._elements):
            raise IndexError(f"element {number} of a buffer of {len(self._elements)}")
        return number

    def __getitem__(self, index):
        return self._elements[self._checked(index)]

    def __setitem__(self, index, value):
        self._elements[self._checked(index)] = value
