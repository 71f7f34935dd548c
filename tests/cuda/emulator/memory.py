"""Memory that checks its accesses: bounds and alignment, and whether threads may race.

Threads run in step here, so that one which reads too early what another one writes gets it all the same. That this may
happen shows in marks: of every byte, which thread wrote it last, which one read it, and how many barriers both had
passed by then. Whether it matters, `machine` finds out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ALIGNMENT = 256
_MANY = np.uint32(0xFFFFFFFF)  # in place of a reader's number where several threads read
POISON = 0xA5


class EmulatedFault(Exception):
    """What a GPU would do at random: see the message."""


@dataclass
class Threads:
    """Who accesses memory. number: of each thread within the launch. block, warp: of each likewise. barriers: that its
    block has passed, in the high half, and its warp, in the low one."""

    number: np.ndarray
    block: np.ndarray
    warp: np.ndarray
    barriers: np.ndarray


class _Marks:
    """Who accessed each byte last, in the launch that is named."""

    def __init__(self, nbytes: int):
        self.thread = _untouched(nbytes, np.uint32)
        self.block = _untouched(nbytes, np.uint32)
        self.warp = _untouched(nbytes, np.uint32)
        self.barriers = _untouched(nbytes, np.uint64)
        self.launch = _untouched(nbytes, np.uint32)

    def unordered(self, at: np.ndarray, threads: Threads, launch: int) -> np.ndarray:
        """Whether nothing lies between the access that left its mark and one of these threads now."""
        before, now = self.barriers[at], threads.barriers
        same_block, same_warp = self.block[at] == threads.block, self.warp[at] == threads.warp
        in_order = same_block & (before >> np.uint64(32) < now >> np.uint64(32))
        in_order |= same_warp & (before & np.uint64(0xFFFFFFFF) < now & np.uint64(0xFFFFFFFF))
        return (self.launch[at] == launch) & (self.thread[at] != threads.number) & ~in_order

    def leave(self, at: np.ndarray, threads: Threads, launch: int, many: np.ndarray | None = None) -> None:
        self.thread[at] = threads.number if many is None else np.where(many, _MANY, threads.number)
        self.block[at], self.warp[at] = threads.block, threads.warp
        self.barriers[at], self.launch[at] = threads.barriers, launch


def _untouched(count: int, dtype) -> np.ndarray:
    """Zeros that take memory only where they are written."""
    return np.zeros(count, dtype)


class Memory:
    """Bytes at addresses from `base` on. valid: which of them are there. space: its name, for messages.

    suspicion: where threads may have raced in this launch, "" without. watches: whether that is looked at.
    """

    def __init__(self, space: str, nbytes: int, is_valid: bool = True):
        self.space, self.nbytes = space, nbytes
        self.content = _untouched(nbytes, np.uint8)
        self.valid = np.ones(nbytes, bool) if is_valid else _untouched(nbytes, bool)
        self.base = self.content.ctypes.data if space == "global" else 0
        self.launch = 1
        self.suspicion, self.watches = "", True
        self._written, self._read = _Marks(nbytes), _Marks(nbytes)

    def _offsets(self, addresses: np.ndarray, width: int, line: str) -> np.ndarray:
        """Indices of elements of `width` bytes."""
        offsets = addresses - np.uint64(self.base)
        wrong = offsets > np.uint64(self.nbytes - width) if self.nbytes >= width else np.ones(offsets.shape, bool)
        if not wrong.any():
            wrong = ~(self.valid[offsets] & self.valid[offsets + np.uint64(width - 1)])
        if wrong.any():
            raise EmulatedFault(f"{self.space} memory is not there, {wrong.sum()} threads: {line}")
        if (offsets & np.uint64(width - 1)).any():
            raise EmulatedFault(f"{self.space} memory is not aligned to {width} bytes: {line}")
        return offsets

    def load(self, addresses: np.ndarray, dtype: np.dtype, threads: Threads, line: str) -> np.ndarray:
        """The elements at these addresses (uint64). Raises EmulatedFault."""
        at = self._offsets(addresses, dtype.itemsize, line)
        if self.watches:
            self._suspect(self._written.unordered(at, threads, self.launch), "reads", "wrote", line)
            self._read.leave(at, threads, self.launch, self._read.unordered(at, threads, self.launch))
        return self.content.view(dtype)[at >> np.uint64(dtype.itemsize.bit_length() - 1)]

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: Threads, line: str) -> None:
        """Write elements to these addresses (uint64). Raises EmulatedFault."""
        dtype = values.dtype
        at = self._offsets(addresses, dtype.itemsize, line)
        elements, index = self.content.view(dtype), at >> np.uint64(dtype.itemsize.bit_length() - 1)
        elements[index] = values
        if self.watches:
            self._suspect(self._written.unordered(at, threads, self.launch), "writes", "wrote", line)
            self._suspect(self._read.unordered(at, threads, self.launch), "writes", "read", line)
            if not np.array_equal(elements[index].view(np.uint8), values.view(np.uint8)):
                raise EmulatedFault(f"threads write different values to one place in {self.space} memory: {line}")
            self._written.leave(at, threads, self.launch)

    def _suspect(self, races: np.ndarray, does: str, did: str, line: str) -> None:
        if not self.suspicion and races.any():
            self.suspicion = f"threads race: one {does} what another one {did} in {self.space} memory: {line}"


class GlobalMemory(Memory):
    """Memory of a device, given out in pieces between which there is a gap."""

    def __init__(self, nbytes: int):
        super().__init__("global", nbytes, is_valid=False)
        self._sizes: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}
        self._end = -self.base % ALIGNMENT

    @property
    def used(self) -> int:
        return sum(self._sizes.values())

    @property
    def in_use(self) -> np.ndarray:
        """All bytes that have been given out so far."""
        return self.content[: self._end]

    def allocate(self, nbytes: int) -> int | None:
        """The address of fresh memory; None where there is none left."""
        room = (nbytes // ALIGNMENT + 2) * ALIGNMENT
        kept = self._free.get(nbytes)
        if kept:
            start = kept.pop()
        elif self._end + room > self.nbytes:
            return None
        else:
            start, self._end = self._end, self._end + room
        self.valid[start : start + nbytes] = True
        self.content[start : start + nbytes] = POISON
        self._sizes[self.base + start] = nbytes
        return self.base + start

    def release(self, address: int) -> None:
        nbytes, start = self._sizes.pop(address), address - self.base
        self.valid[start : start + nbytes] = False
        self._free.setdefault(nbytes, []).append(start)
