"""A Python object in place of NVIDIA's driver library: it keeps memory on the host, records calls, fails on demand."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

ATTRIBUTES = {75: 9, 76: 0, 16: 132, 97: 232448}
CUBIN = b"\x7fELF\0of "
NAMES = {2: "CUDA_ERROR_OUT_OF_MEMORY", 100: "CUDA_ERROR_NO_DEVICE", 700: "CUDA_ERROR_ILLEGAL_ADDRESS"}


@dataclass
class Launched:
    """A kernel launch as the driver saw it. arguments: the words that the parameter pointers point to."""

    function: int
    grid: int
    block: int
    shared_bytes: int
    arguments: list[int] = field(default_factory=list)


def number_of(x) -> int:
    return x if isinstance(x, int) else (x.value or 0)


class FakeDriver:
    """calls: (function, ...) in order, launches as `Launched`. parameters: of every kernel, by its source, so that the
    argument block can be read. failures: error code by function name, given once per entry of the list.
    run: called with each `Launched` that is executed.
    """

    def __init__(self, parameters: dict[bytes, int] | None = None, version: int = 13000, total: int = 1 << 30):
        self.parameters, self.version, self.total = parameters or {}, version, total
        self.calls: list[tuple] = []
        self.failures: dict[str, list[int]] = {}
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.run: Callable[[Launched], None] = lambda launched: None
        self._functions: dict[int, int] = {}  # handle -> number of parameters
        self._graphs: dict[int, list] = {}
        self._linked: dict[int, ctypes.Array] = {}
        self._capturing: list | None = None
        self._next = 1000

    def _handle(self) -> int:
        self._next += 8
        return self._next

    def __getattr__(self, name: str):
        if not name.startswith("cu"):
            raise AttributeError(name)
        implementation = getattr(type(self), f"_{name}", None)

        def function(*arguments) -> int:
            pending = self.failures.get(name)
            if pending and (code := pending.pop(0)):
                self.calls.append((name, "failed", code))
                return code
            if implementation is None:
                self.calls.append((name, *arguments))
                return 0
            return implementation(self, *arguments) or 0

        return function

    def names(self) -> list[str]:
        """The names of the calls so far."""
        return [call[0] for call in self.calls]

    # -- the device ---------------------------------------------------------------------------------------------------
    def _cuDriverGetVersion(self, out):
        out._obj.value = self.version

    def _cuDeviceGet(self, out, ordinal):
        out._obj.value = ordinal

    def _cuDeviceGetName(self, buffer, length, handle):
        buffer.value = b"Fake GPU"

    def _cuDeviceGetAttribute(self, out, number, handle):
        out._obj.value = ATTRIBUTES[number]

    def _cuDevicePrimaryCtxRetain(self, out, handle):
        out._obj.value = self._handle()

    def _cuCtxSetCurrent(self, context):
        return 0

    def _cuGetErrorName(self, code, out):
        out._obj.value = NAMES.get(code, f"CUDA_ERROR_{code}").encode()

    def _cuGetErrorString(self, code, out):
        out._obj.value = b"what the driver says"

    # -- memory -------------------------------------------------------------------------------------------------------
    def _used(self) -> int:
        return sum(m.nbytes for m in self.memory.values())

    def _cuMemGetInfo_v2(self, free, total):
        free._obj.value, total._obj.value = self.total - self._used(), self.total

    def _cuMemAlloc_v2(self, out, size):
        self.calls.append(("cuMemAlloc_v2", size))
        if self._used() + size > self.total:
            return 2
        memory = np.zeros(size, np.uint8)
        self.memory[memory.ctypes.data] = memory
        out._obj.value = memory.ctypes.data
        return 0

    def _cuMemFree_v2(self, address):
        self.calls.append(("cuMemFree_v2", address))
        del self.memory[address]

    def _cuMemHostAlloc(self, out, size, flags):
        memory = np.zeros(size, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        out._obj.value = memory.ctypes.data

    def _cuMemFreeHost(self, address):
        del self.pinned[number_of(address)]

    def _copy(self, name, target, source, nbytes):
        self.calls.append((name, nbytes))
        run = lambda: ctypes.memmove(number_of(target), number_of(source), nbytes)
        if self._capturing is not None:
            assert name == "cuMemcpyDtoDAsync_v2", "a graph holds no copies to or from the host"
            self._capturing.append(run)
        else:
            run()

    def _cuMemcpyHtoDAsync_v2(self, target, source, nbytes, stream):
        self._copy("cuMemcpyHtoDAsync_v2", target, source, nbytes)

    def _cuMemcpyDtoHAsync_v2(self, target, source, nbytes, stream):
        self._copy("cuMemcpyDtoHAsync_v2", target, source, nbytes)

    def _cuMemcpyDtoDAsync_v2(self, target, source, nbytes, stream):
        self._copy("cuMemcpyDtoDAsync_v2", target, source, nbytes)

    # -- kernels ------------------------------------------------------------------------------------------------------
    def _cuLinkCreate_v2(self, count, options, values, out):
        self.calls.append(("cuLinkCreate_v2",))
        out._obj.value = self._handle()

    def _cuLinkAddData_v2(self, state, kind, text, size, name, count, options, values):
        assert (kind, count) == (1, 0)
        assert text.raw[size - 1] == 0
        self._linked[number_of(state)] = ctypes.create_string_buffer(CUBIN + text.value)

    def _cuLinkComplete(self, state, out, size):
        code = self._linked[number_of(state)]
        out._obj.value, size._obj.value = ctypes.addressof(code), len(code)

    def _cuLinkDestroy(self, state):
        self.calls.append(("cuLinkDestroy",))
        code = self._linked.pop(number_of(state), None)
        if code is not None:
            ctypes.memset(code, 0xA5, len(code))  # it is the state's

    def _cuModuleLoadDataEx(self, out, image, count, options, values):
        self.calls.append(("cuModuleLoadDataEx", image.raw[:-1]))
        out._obj.value = self._handle()
        self._functions[out._obj.value] = self.parameters.get(image.raw.removeprefix(CUBIN).split(b"\0")[0], 0)

    def _cuModuleGetFunction(self, out, module, name):
        assert name == b"kernel"
        out._obj.value = self._handle()
        self._functions[out._obj.value] = self._functions[number_of(module)]

    def _cuStreamCreate(self, out, flags):
        out._obj.value = self._handle()

    def _cuEventCreate(self, out, flags):
        out._obj.value = self._handle()

    def _cuEventElapsedTime(self, out, start, end):
        out._obj.value = 0.5

    def _cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, None)
        count = self._functions[number_of(function)]
        words = [ctypes.c_uint64.from_address(parameters[i]).value for i in range(count)]
        launched = Launched(number_of(function), gx, bx, shared, words)
        self.calls.append(("cuLaunchKernel", launched))
        if self._capturing is not None:
            self._capturing.append(lambda: self.run(launched))
        else:
            self.run(launched)

    # -- graphs -------------------------------------------------------------------------------------------------------
    def _cuStreamBeginCapture_v2(self, stream, mode):
        self.calls.append(("cuStreamBeginCapture_v2",))
        self._capturing = []

    def _cuStreamEndCapture(self, stream, out):
        self.calls.append(("cuStreamEndCapture",))
        out._obj.value = self._handle()
        self._graphs[out._obj.value], self._capturing = self._capturing or [], None

    def _cuGraphInstantiateWithFlags(self, out, graph, flags):
        self.calls.append(("cuGraphInstantiateWithFlags",))
        out._obj.value = self._handle()
        self._graphs[out._obj.value] = self._graphs[number_of(graph)]

    def _cuGraphLaunch(self, graph, stream):
        self.calls.append(("cuGraphLaunch",))
        for run in self._graphs[number_of(graph)]:
            run()
