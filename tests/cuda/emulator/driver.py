"""A driver whose GPU is emulated: what `tests.cuda.fake_driver` keeps a record of is done here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kgraph.runtime.cuda.gpu import Gpu
from tests.cuda.emulator.counts import Counts
from tests.cuda.emulator.machine import Kernel
from tests.cuda.emulator.memory import GlobalMemory
from tests.cuda.fake_driver import CUBIN, FakeDriver, Launched, number_of

TOTAL = 1 << 28


class EmulatedDriver(FakeDriver):
    """See the module's docstring. Only kernels and device memory differ."""

    def __init__(self, total: int = TOTAL):
        super().__init__(total=total)
        self.device_memory = GlobalMemory(total)
        self._kernels: dict[int, Kernel] = {}
        self._counted: list[tuple[str, Counts]] | None = None
        self.run = self._emulate

    def _used(self) -> int:
        return self.device_memory.used

    def _cuMemAlloc_v2(self, out, size):
        address = self.device_memory.allocate(size)
        if address is None:
            return 2
        out._obj.value = address
        return 0

    def _cuMemFree_v2(self, address):
        self.device_memory.release(number_of(address))

    def _cuModuleLoadDataEx(self, out, image, count, options, values):
        text = image.raw.removeprefix(CUBIN).split(b"\0")[0].decode()
        out._obj.value = self._handle()
        self._kernels[out._obj.value] = kernel = Kernel(text, self.device_memory)
        self._functions[out._obj.value] = kernel.num_parameters

    def _cuModuleGetFunction(self, out, module, name):
        super()._cuModuleGetFunction(out, module, name)
        self._kernels[out._obj.value] = self._kernels[number_of(module)]

    def _emulate(self, launched: Launched) -> None:
        kernel = self._kernels[launched.function]
        if self._counted is not None:
            kernel.counts = Counts(launched.grid, launched.block)
            self._counted.append((kernel.name, kernel.counts))
        kernel.launch(launched.grid, launched.block, launched.shared_bytes, launched.arguments)
        self.calls.clear()

    @contextmanager
    def counted(self) -> Iterator[list[tuple[str, Counts]]]:
        """Counts what launches within ask for, with the names of the kernels. Races are not looked for meanwhile."""
        self._counted, self.device_memory.watches = [], False
        try:
            yield self._counted
        finally:
            self._counted, self.device_memory.watches = None, True


def emulated_gpu() -> Gpu:
    """A GPU that nobody else uses."""
    return Gpu(library=EmulatedDriver())
