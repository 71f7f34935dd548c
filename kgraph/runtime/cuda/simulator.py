"""A device whose kernels run in Numba's CUDA simulator, their threads in turns (`simulated_threads`).

Objects are the kernels' sources, and addresses those of host memory. Kernels see buffers of just the bytes that a step
names and fail on an index outside of them. Numba reads NUMBA_ENABLE_CUDASIM=1 when it is imported: it has to be set for
the process.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kgraph.errors import DeviceError, DeviceMemoryError
from kgraph.runtime.cuda.device import Argument, Device
from kgraph.runtime.cuda.libraries import Library

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
            from numba import config, cuda  # noqa: F401
        except ImportError as error:
            raise DeviceError(f"the CUDA simulator needs numba and numba-cuda: {error}") from error
        if not getattr(config, "ENABLE_CUDASIM", False):
            raise DeviceError(
                "Numba's CUDA simulator is off: set NUMBA_ENABLE_CUDASIM=1 before the process first imports numba.cuda"
            )
        super().__init__()
        self.libraries: dict[type, Library] = {}  # by kind of task: what tests put there
        self._captured: list | None = None
        self._limit, self._used = limit, 0
        self._memory: dict[int, np.ndarray] = {}
        self._running = threading.Lock()  # one kernel at a time

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
        if nbytes == 0:  # wherever it is
            return np.empty(0, np.uint8)
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
        from kgraph.runtime.cuda import simulated_threads

        function = simulated_threads.load(key, source)
        # Kernels read memory as what their parameters say, like pointers on a GPU.
        dtypes = [kind.rstrip("*") for kind in function.__annotations__.values() if kind.endswith("*")]
        return functools.partial(simulated_threads.run, function), dtypes

    def launch(
        self, function: Any, grid: int, block: int, shared_bytes: int, buffers: Sequence[Argument], sizes: Sequence[int]
    ) -> None:
        if self._captured is not None:
            self._captured.append(lambda: self.launch(function, grid, block, shared_bytes, buffers, sizes))
            return
        run, dtypes = function
        pointers = [_Pointer(self._view(b.address, b.nbytes), dtype) for b, dtype in zip(buffers, dtypes, strict=True)]
        with self._running, np.errstate(all="ignore"):  # integers wrap, floats overflow
            run(grid, block, shared_bytes, [*pointers, *map(np.int64, sizes)])

    def make_current(self) -> None:
        pass

    def offers(self, kind: type) -> bool:
        return kind in self.libraries

    def library(self, kind: type) -> Library | str:
        return self.libraries.get(kind) or super().library(kind)

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


class _Pointer:
    """A buffer as kernels see it, with its bounds checked."""

    __slots__ = ("_elements",)

    def __init__(self, memory: np.ndarray, dtype: str):
        self._elements = memory.view(dtype)

    @property
    def address(self) -> int:
        return self._elements.ctypes.data

    def _checked(self, index) -> int:
        number = int(index)
        if not 0 <= number < len(self._elements):
            raise IndexError(f"element {number} of a buffer of {len(self._elements)}")
        return number

    def __getitem__(self, index):
        return self._elements[self._checked(index)]

    def __setitem__(self, index, value):
        self._elements[self._checked(index)] = value
