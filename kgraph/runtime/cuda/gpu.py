"""An NVIDIA GPU as a device of programs, on the driver library alone."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from ctypes import byref, c_float, c_int, c_size_t, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

import numpy as np

from kgraph.errors import DeviceError, DeviceMemoryError
from kgraph.runtime.cuda.device import Argument, Device
from kgraph.runtime.cuda.driver import Driver
from kgraph.runtime.cuda.libraries import Library, is_installed, open_library
from kgraph.runtime.steps import Product

if TYPE_CHECKING:
    from kgraph.disk_cache import DiskCache

# The entry of every kernel's PTX.
_ENTRY = b"kernel"
_MAJOR, _MINOR, _MULTIPROCESSORS, _SHARED_OPT_IN = 75, 76, 16, 97  # CU_DEVICE_ATTRIBUTE_*
_MOST_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NON_BLOCKING_STREAM, _RELAXED_CAPTURE, _NO_TIMING = 1, 2, 2
_JIT_ERROR_LOG, _JIT_ERROR_LOG_SIZE = 5, 6
_LOG_BYTES = 8192
_PTX = 1  # CU_JIT_INPUT_PTX
_SHARED_WITHOUT_ASKING = 48 << 10
_OLDEST_DRIVER = 12000
_GRAIN = 512  # bytes to which allocations are rounded up
_BLOCKS_PER_SM = 16


class Gpu(Device):
    """GPU number `ordinal` of the process, its primary context, a stream for work and one for copies ahead of it.

    Memory that is released is kept for later allocations of the same size: since all work goes to one stream, in order,
    it can be given out at once. library: what stands in place of libcuda, for tests. cache: keeps what the driver makes
    of kernels' PTX, which takes it longer than all else that a process begins with.
    """

    def __init__(self, ordinal: int = 0, library: Any = None, cache: DiskCache | None = None):
        super().__init__()
        self._cache = cache
        self.driver = driver = Driver(library)
        self._process = os.getpid()
        driver.call("cuInit", 0)
        version = c_int()
        driver.call("cuDriverGetVersion", byref(version))
        if version.value < _OLDEST_DRIVER:
            found = f"{version.value // 1000}.{version.value % 1000 // 10}"
            raise DeviceError(f"the GPU's driver is one of CUDA {found}: kgraph needs a driver of CUDA 12 or later")
        self.driver_version = version.value
        self._has_libraries = library is None  # what stands in the driver's place has none
        self._libraries: dict[type, Library | str] = {}  # by kind of task
        handle = c_int()
        driver.call("cuDeviceGet", byref(handle), ordinal)
        self._handle = handle.value
        name = ctypes.create_string_buffer(128)
        driver.call("cuDeviceGetName", name, len(name), self._handle)
        self.name, self.ordinal = name.value.decode(errors="replace"), ordinal
        self.capability = self._attribute(_MAJOR), self._attribute(_MINOR)
        self.num_sms = self._attribute(_MULTIPROCESSORS)
        self.most_blocks = self.num_sms * _BLOCKS_PER_SM
        self._most_shared = self._attribute(_SHARED_OPT_IN)
        context = c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", byref(context), self._handle)
        self._context = context
        self._memory_lock = threading.RLock()
        self._sizes: dict[int, int] = {}  # by address, of what is given out
        self._free: dict[int, list[int]] = {}  # addresses by size, of what is kept
        self._enter()
        self.stream, self._copies = self._new_stream(), self._new_stream()
        self.stream_number = self.stream.value or 0

    def _new_stream(self) -> c_void_p:
        stream = c_void_p()
        self.driver.call("cuStreamCreate", byref(stream), _NON_BLOCKING_STREAM)
        return stream

    def _attribute(self, number: int) -> int:
        value = c_int()
        self.driver.call("cuDeviceGetAttribute", byref(value), number, self._handle)
        return value.value

    def _enter(self) -> None:
        """Make the context this thread's. Raises DeviceError in a forked child, where the driver does not work."""
        if os.getpid() != self._process:
            raise DeviceError(
                "this process was forked from one that uses the GPU, and cannot use it: start processes by 'spawn', or "
                "fork before the GPU is first used"
            )
        self.driver.call("cuCtxSetCurrent", self._context)

    @property
    def is_lost(self) -> bool:
        return self.driver.lost is not None

    # -- memory -------------------------------------------------------------------------------------------------------
    def allocate(self, nbytes: int) -> int:
        size = max(-(-nbytes // _GRAIN), 1) * _GRAIN
        with self._memory_lock:
            self._enter()
            kept = self._free.get(size)
            if kept:
                address = kept.pop()
            else:
                try:
                    address = self._fresh(size)
                except DeviceMemoryError:
                    self._reclaim()
                    try:
                        address = self._fresh(size)
                    except DeviceMemoryError as error:
                        free, total = self.memory()
                        raise DeviceMemoryError(
                            f"{self.name}: {nbytes} bytes were asked for, {free} of {total} are free "
                            f"({sum(self._sizes.values())} are in use by this process); use a smaller batch"
                        ) from error
            self._sizes[address] = size
            return address

    def _fresh(self, size: int) -> int:
        address = c_uint64()
        self.driver.call("cuMemAlloc_v2", byref(address), size)
        return address.value

    def release(self, address: int, shared: bool = False) -> None:
        if os.getpid() != self._process:
            return
        if shared and not self.is_lost:
            self._enter()
            self.driver.call("cuCtxSynchronize")
        with self._memory_lock:
            size = self._sizes.pop(address)
            if not self.is_lost:
                self._free.setdefault(size, []).append(address)

    def trim(self) -> None:
        """Give all memory that is kept for later back to the driver."""
        with self._memory_lock:
            kept, self._free = self._free, {}
            for address in [a for addresses in kept.values() for a in addresses]:
                self.driver.call("cuMemFree_v2", address)

    def _reclaim(self) -> None:
        super()._reclaim()
        self.synchronize()
        self.trim()

    def memory(self) -> tuple[int, int]:
        self._enter()
        free, total = c_size_t(), c_size_t()
        self.driver.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def pinned(self, nbytes: int) -> np.ndarray:
        self._enter()
        address = c_void_p()
        self.driver.call("cuMemHostAlloc", byref(address), max(nbytes, 1), 0)
        memory = (ctypes.c_uint8 * max(nbytes, 1)).from_address(address.value or 0)
        weakref.finalize(memory, self._free_pinned, address).atexit = False
        return np.ctypeslib.as_array(memory)[:nbytes]

    def _free_pinned(self, address: c_void_p) -> None:
        if not self.is_lost and os.getpid() == self._process:
            self._enter()
            self.driver.call("cuMemFreeHost", address)

    # -- copies -------------------------------------------------------------------------------------------------------
    def copy_in(self, address: int, array: np.ndarray) -> None:
        if array.nbytes:
            self._enter()
            # From memory that is not pinned, this returns when the array has been read.
            self.driver.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)

    def copy_out(self, array: np.ndarray, address: int) -> None:
        if array.nbytes:
            self.copy_out_later(array, address)
            self.synchronize()

    def copy_out_later(self, array: np.ndarray, address: int) -> None:
        if array.nbytes:
            self._enter()
            self.driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        if nbytes:
            self._enter()
            self.driver.call("cuMemcpyDtoDAsync_v2", target, source, nbytes, self.stream)

    def copy_ahead(self, address: int, array: np.ndarray, after: Any) -> None:
        self._enter()
        self.driver.call("cuStreamWaitEvent", self._copies, after.handle, 0)
        self.driver.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self._copies)

    def join_copies(self) -> Event:
        self._enter()
        event = self._event(self._copies, _NO_TIMING)
        self.driver.call("cuStreamWaitEvent", self.stream, event.handle, 0)
        return event

    # -- kernels ------------------------------------------------------------------------------------------------------
    def load(self, kernels: Mapping[str, bytes]) -> dict[str, Any]:
        return {key: Kernel(self, key, self._compiled(key, ptx)) for key, ptx in kernels.items()}

    def _compiled(self, key: str, ptx: bytes) -> bytes:
        """The machine code of a kernel if there is a cache, which has it from then on; else the PTX itself."""
        if self._cache is None:
            return ptx
        of = repr((self.driver_version, self.capability)).encode()
        name = hashlib.sha256(b"cubin" + of + ptx).hexdigest()[:40]
        found = self._cache.get(name)
        if found is None:
            found = self._link(key, ptx)
            self._cache.put(name, found)
        return found

    def _link(self, key: str, ptx: bytes) -> bytes:
        """What the driver makes of PTX. Raises DeviceError with its log."""
        self._enter()
        log, state, code, size = Log(), c_void_p(), c_void_p(), c_size_t()
        text = ctypes.create_string_buffer(ptx)
        with log.told(key):
            self.driver.call("cuLinkCreate_v2", *log.options, byref(state))
            try:
                self.driver.call("cuLinkAddData_v2", state, _PTX, text, len(text), key.encode(), 0, None, None)
                self.driver.call("cuLinkComplete", state, byref(code), byref(size))
                return ctypes.string_at(code, size.value)
            finally:
                self.driver.call("cuLinkDestroy", state)

    def launch(
        self, function: Any, grid: int, block: int, shared_bytes: int, buffers: Sequence[Argument], sizes: Sequence[int]
    ) -> None:
        self._enter()
        if shared_bytes > function.shared_bytes:
            if shared_bytes > self._most_shared:
                raise DeviceError(f"a kernel needs {shared_bytes} bytes of shared memory, {self.name} has fewer")
            self.driver.call("cuFuncSetAttribute", function.handle, _MOST_DYNAMIC_SHARED, shared_bytes)
            function.shared_bytes = shared_bytes
        # Every argument is a word: a pointer or an int64. The driver reads them during the call.
        words = (c_uint64 * (len(buffers) + len(sizes)))(*[b.address for b in buffers], *[s % (1 << 64) for s in sizes])
        first = ctypes.addressof(words)
        pointers = (c_void_p * len(words))(*range(first, first + 8 * len(words), 8))
        shape = (grid, 1, 1, block, 1, 1, shared_bytes)
        self.driver.call("cuLaunchKernel", function.handle, *shape, self.stream, pointers, None)

    def make_current(self) -> None:
        self._enter()

    def offers(self, kind: type) -> bool:
        return self._has_libraries and is_installed(kind) and not isinstance(self.library(Product), str)

    def library(self, kind: type) -> Library | str:
        with self._memory_lock:
            if kind not in self._libraries:
                self._enter()
                self._libraries[kind] = open_library(kind, self, self.driver_version)
        return self._libraries[kind]

    # -- graphs -------------------------------------------------------------------------------------------------------
    def begin_capture(self) -> None:
        self._enter()
        self.driver.call("cuStreamBeginCapture_v2", self.stream, _RELAXED_CAPTURE)

    def end_capture(self) -> Graph:
        self._enter()
        graph = c_void_p()
        self.driver.call("cuStreamEndCapture", self.stream, byref(graph))
        try:
            executable = c_void_p()
            self.driver.call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        finally:
            self.driver.call("cuGraphDestroy", graph)
        return Graph(self, executable)

    def replay(self, graph: Any) -> None:
        self._enter()
        self.driver.call("cuGraphLaunch", graph.handle, self.stream)

    # -- time ---------------------------------------------------------------------------------------------------------
    def synchronize(self) -> None:
        self._enter()
        self.driver.call("cuStreamSynchronize", self.stream)

    def mark(self, timing: bool = False) -> Event:
        self._enter()
        return self._event(self.stream, 0 if timing else _NO_TIMING)

    def _event(self, stream: c_void_p, flags: int) -> Event:
        event = c_void_p()
        self.driver.call("cuEventCreate", byref(event), flags)
        self.driver.call("cuEventRecord", event, stream)
        return Event(self, event)

    def wait(self, event: Any) -> None:
        self._enter()
        self.driver.call("cuEventSynchronize", event.handle)

    def milliseconds(self, start: Any, end: Any) -> float:
        self.wait(end)
        elapsed = c_float()
        self.driver.call("cuEventElapsedTime", byref(elapsed), start.handle, end.handle)
        return elapsed.value

    def synchronize_stream(self, stream: int) -> None:
        self._enter()
        self.driver.call("cuStreamSynchronize", c_void_p(stream))


class _Handle:
    """Something of the driver's that is destroyed with the last reference to it."""

    destroy = ""

    def __init__(self, device: Gpu, handle: c_void_p):
        self.device, self.handle = device, handle

    def __del__(self):
        device = self.device
        if not device.is_lost and os.getpid() == device._process:
            try:
                device._enter()
                device.driver.call(self.destroy, self.handle)
            except DeviceError:
                pass  # the fault belongs to work that was asked for before, and shows in the next call


class Graph(_Handle):
    """An instantiated graph of launches."""

    destroy = "cuGraphExecDestroy"


class Event(_Handle):
    """A moment in the stream."""

    destroy = "cuEventDestroy_v2"


class _Module(_Handle):
    destroy = "cuModuleUnload"


class Log:
    """What the driver's compiler says. options: for the driver's functions: their number, names and values."""

    def __init__(self):
        self._text = ctypes.create_string_buffer(_LOG_BYTES)
        names = (c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_SIZE)
        self.options = 2, names, (c_void_p * 2)(ctypes.addressof(self._text), _LOG_BYTES)

    @contextlib.contextmanager
    def told(self, key: str) -> Iterator[None]:
        """Errors inside of it name the kernel, and end with the log."""
        try:
            yield
        except DeviceMemoryError:
            raise
        except DeviceError as error:
            raise DeviceError(f"kernel {key}: {error}\n{self._text.value.decode(errors='replace')}") from error


class Kernel:
    """A function of a module. shared_bytes: dynamic shared memory that launches may ask for without more ado."""

    def __init__(self, device: Gpu, key: str, image: bytes):
        device._enter()
        log, module = Log(), c_void_p()
        text = ctypes.create_string_buffer(image)  # with a zero behind, which ends PTX
        with log.told(key):
            device.driver.call("cuModuleLoadDataEx", byref(module), text, *log.options)
        self._module = _Module(device, module)
        self.handle = c_void_p()
        device.driver.call("cuModuleGetFunction", byref(self.handle), module, _ENTRY)
        self.shared_bytes = 0
