"""What programs ask of a device, and which device is in use."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from kgraph.runtime.cuda.libraries import Library


class Argument(NamedTuple):
    """A buffer that a kernel is called with: its address on the device, its bytes, the dtype of its elements."""

    address: int
    nbytes: int
    dtype: str


class Holder(Protocol):
    """Something that can do without its memory on the device for a while."""

    def release_idle(self) -> None:
        """Give the memory back unless it is in use."""


class Device(ABC):
    """Memory and execution of one device. All work goes to one stream, in order.

    machine: "cuda" or "cuda-simulator". name: of the product. ordinal: number of the GPU. stream_number: the stream as
    other libraries know it. capability: (major, minor). num_sms: multiprocessors. most_blocks: of a grid.
    lock: held while the launches of a call are handed over, so that those of several threads do not mix.
    copies: what programs have on the device of host arrays (`resident.py`), by the array's id and how it is made of it.
    Every method raises DeviceError for a fault of the device, and all of them from then on if the device is lost.
    """

    machine = "cuda"
    name: str
    ordinal = 0
    stream_number = 0
    capability: tuple[int, int]
    num_sms: int
    most_blocks: int

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._holders: weakref.WeakSet = weakref.WeakSet()
        self.copies: weakref.WeakValueDictionary[tuple, Any] = weakref.WeakValueDictionary()

    @property
    def is_lost(self) -> bool:
        """Whether the device cannot be used any more."""
        return False

    def add_holder(self, holder: Holder) -> None:
        """Ask `holder` for its memory when an allocation fails."""
        self._holders.add(holder)

    def _reclaim(self) -> None:
        for holder in list(self._holders):
            holder.release_idle()

    # -- memory -------------------------------------------------------------------------------------------------------
    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """The address of fresh memory, aligned to 256 bytes.

        Where there is not enough, what idle programs hold is given back first. Raises DeviceMemoryError.
        """

    @abstractmethod
    def release(self, address: int, shared: bool = False) -> None:
        """Give memory back; work that was asked for before may still use it.

        shared: another library may have used it, whose work is waited for.
        """

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""

    @abstractmethod
    def pinned(self, nbytes: int) -> np.ndarray:
        """Fresh host memory (uint8) from which copies run beside other work."""

    # -- copies -------------------------------------------------------------------------------------------------------
    @abstractmethod
    def copy_in(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device; it may change as soon as this returns, unless it is pinned memory."""

    @abstractmethod
    def copy_out(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a contiguous array, which has the values when this returns."""

    @abstractmethod
    def copy_out_later(self, array: np.ndarray, address: int) -> None:
        """Like `copy_out`; the array has the values after `synchronize`."""

    @abstractmethod
    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device."""

    @abstractmethod
    def copy_ahead(self, address: int, array: np.ndarray, after: Any) -> None:
        """Copy from pinned memory beside the work that was asked for, but not before the moment `after`."""

    @abstractmethod
    def join_copies(self) -> Any:
        """Let work that is asked for from now on wait for those copies; gives the moment at which they are done."""

    # -- kernels ------------------------------------------------------------------------------------------------------
    @abstractmethod
    def load(self, kernels: Mapping[str, bytes]) -> dict[str, Any]:
        """Functions for `launch` by key. Raises DeviceError with the driver's log for objects that it refuses."""

    @abstractmethod
    def launch(
        self, function: Any, grid: int, block: int, shared_bytes: int, buffers: Sequence[Argument], sizes: Sequence[int]
    ) -> None:
        """Run a kernel on `grid` blocks of `block` threads; shared_bytes: beside what the kernel declares."""

    @abstractmethod
    def begin_capture(self) -> None:
        """From now on launches and copies within the device are kept instead of run."""

    @abstractmethod
    def end_capture(self) -> Any:
        """What was kept, for `replay`."""

    @abstractmethod
    def replay(self, graph: Any) -> None:
        """Run what was kept."""

    @abstractmethod
    def make_current(self) -> None:
        """Make the device that of the calling thread, for what libraries do there."""

    def offers(self, kind: type) -> bool:
        """Whether the device has a library for tasks of this kind (`Product` or `Convolution` of `runtime.steps`)."""
        return False

    def library(self, kind: type) -> Library | str:
        """The library for tasks of this kind, opened when it is first asked for; a string says why there is none."""
        return f"{self.name} has no library"

    # -- time ---------------------------------------------------------------------------------------------------------
    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work is done."""

    @abstractmethod
    def synchronize_stream(self, stream: int) -> None:
        """Wait until the work of another library's stream is done."""

    @abstractmethod
    def mark(self, timing: bool = False) -> Any:
        """The moment at which all work so far is done. timing: for `milliseconds`."""

    @abstractmethod
    def wait(self, event: Any) -> None:
        """Wait for such a moment."""

    @abstractmethod
    def milliseconds(self, start: Any, end: Any) -> float:
        """The time between two moments."""


_lock = threading.Lock()
_devices: dict[str, Device] = {}
_current = "cpu"
_tf32 = False


def device_for(name: str) -> Device:
    """The device called "cuda" (the first GPU), "cuda:N" or "cuda-simulator".

    Raises ValueError for another name, DeviceError where there is no such device, saying what is missing.
    """
    name = "cuda:0" if name == "cuda" else name
    with _lock:
        if name not in _devices:
            if name == "cuda-simulator":
                from kgraph.runtime.cuda.simulator import SimulatorDevice

                _devices[name] = SimulatorDevice()
            elif name.startswith("cuda:") and name[5:].isdigit():
                from kgraph.disk_cache import disk_cache
                from kgraph.runtime.cuda.gpu import Gpu

                _devices[name] = Gpu(int(name[5:]), cache=disk_cache())
            else:
                raise ValueError(f"there is no device {name!r}: use 'cpu', 'cuda', 'cuda:N' or 'cuda-simulator'")
        return _devices[name]


def set_device(name: str, *, tf32: bool = False) -> None:
    """Compile for this device from now on, where no target is named: "cpu", "cuda", "cuda:N" or "cuda-simulator".

    tf32: let float32 matrix products and convolutions round their operands to TF32, which has 10 bits of mantissa in
    place of 23, for tensor cores; sums stay float32. It holds for whatever is compiled for GPUs from now on.

    `fit`, `evaluate` and `predict` of Keras models run there too, if they have not been compiled yet. Weights and the
    optimizer's state stay on the device between steps, and are copied back when they are read.
    Raises ValueError for another name, DeviceError where there is no such device, saying what is missing.
    """
    global _current, _tf32
    if name != "cpu":
        device_for(name)
    _current, _tf32 = name, tf32


def get_device() -> str:
    """The name that `set_device` was last given; "cpu" without."""
    return _current


def allows_tf32() -> bool:
    """Whether `set_device` was told that products may round to TF32."""
    return _tf32
